"""Ways for the UNet to compute less than it was trained to: reuse what lies deep, and merge tokens that are alike.

Both are objects of one run, which the caller makes and hands to every call; the network keeps nothing of them.

Letters: B batch, C channels, H and W height and width of a feature map, N = HW its tokens, M groups of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SEED = 0
"""Of the destinations that tokens merge into; every run draws the same ones."""
DRAWS = 256
"""Calls for which destinations are drawn at a time, so that the host rarely waits for a copy to the device."""


@dataclass
class DeepFeatures:
    """What the UNet's deeper part returned last, for the calls that only run its shallow part.

    The shallow part is the first convolution and the last residual block with its attention: branch 0 of the paper's
    code. All else is run in every `every`-th call. Source: arXiv:2312.00858 (DeepCache), sec. 3.3.

    Attributes:
        every: 1 runs everything in every call.
        kept: (B, C, h, w), what the last but one residual block of the way up returned; None where all is to be run.
        age: how many calls have used it, the one that computed it included.
    """

    every: int
    kept: Tensor | None = None
    age: int = 0

    def recall(self, rows: int, size: torch.Size) -> Tensor | None:
        """Return what is kept for a call of so many rows and this size (h, w); None where it must be computed anew."""
        kept = self.kept
        if kept is None or self.age >= self.every or (len(kept), kept.shape[2:]) != (rows, size):
            return None
        self.age += 1
        return kept

    def keep(self, features: Tensor) -> Tensor:
        """Keep features that were just computed, and return them."""
        self.kept, self.age = features if self.every > 1 else None, 1
        return features

    def keep_second_half(self) -> None:
        """Go on with the second half of the batch alone."""
        if self.kept is not None:
            self.kept = self.kept.chunk(2)[-1]

    def forget(self) -> None:
        """Let the next call run everything."""
        self.kept = None


class Groups(NamedTuple):
    """Which tokens are treated as one.

    Attributes:
        home: (B, N), the number of each token's group.
        total: M.
    """

    home: Tensor
    total: int

    def merge(self, tokens: Tensor) -> Tensor:
        """Average each group: (B, N, C) -> (B, M, C)."""
        sums = tokens.new_zeros(len(tokens), self.total, tokens.shape[2])
        home = self.home[..., None].expand_as(tokens)
        return sums.scatter_reduce(1, home, tokens, "mean", include_self=False)

    def unmerge(self, merged: Tensor) -> Tensor:
        """Give every token what its group has: (B, M, C) -> (B, N, C)."""
        return merged.gather(1, self.home[..., None].expand(-1, -1, merged.shape[2]))


class TokenMerging:
    """Lets tokens that are alike go through self-attention as one.

    Of every 2x2 tokens one, drawn at random, is a destination; the others are sources, of which those most alike to a
    destination merge into it. The draw is the same for all pictures of a batch, as both halves of guidance should lose
    the same, and comes from a generator of this object: two runs of the same calls draw the same.

    Source: arXiv:2303.17604 (token merging for Stable Diffusion), sec. 4, in the form that merges for self-attention
    alone. Sums of several tokens have no fixed order on CUDA: results may differ there in the last bits. Where pairs of
    tokens are nearly as much alike as others, rounding decides which merge, and a picture may change visibly with what
    else changes the last bits, such as the size of a batch.

    Args:
        ratio: of tokens to merge away, in [0, 0.75].
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.generator = Generator().manual_seed(SEED)
        self.drawn: dict[tuple[int, int, torch.device], Iterator[Tensor]] = {}

    def group(self, tokens: Tensor, size: torch.Size) -> Groups | None:
        """Group the tokens (B, HW, C) of a feature map of `size` (H, W); None where nothing is to be merged."""
        height, width = size
        destinations, sources = self._split(height, width, tokens.device)
        total = height * width
        merged = min(int(self.ratio * total), len(sources)) if len(destinations) else 0
        if merged == 0:
            return None
        unit = F.normalize(tokens, dim=-1)
        likeness, nearest = (unit[:, sources] @ unit[:, destinations].transpose(1, 2)).max(dim=-1)  # (B, sources)
        order = likeness.argsort(dim=-1, descending=True, stable=True)
        staying = order[:, merged:]
        own = torch.arange(len(destinations), total - merged, device=tokens.device)  # numbers of groups of one
        home = torch.empty(len(tokens), total, dtype=torch.long, device=tokens.device)
        home[:, destinations] = torch.arange(len(destinations), device=tokens.device)
        home[:, sources] = nearest.scatter(1, staying, own.expand_as(staying))
        return Groups(home, total - merged)

    def _split(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw one token of every whole 2x2 as destination; return the places of these and of all others."""
        rows, columns = height // 2, width // 2
        drawn = self._draw(rows, columns, device)
        y = 2 * torch.arange(rows, device=device)[:, None] + drawn // 2
        x = 2 * torch.arange(columns, device=device) + drawn % 2
        destinations = (y * width + x).flatten()
        is_destination = torch.zeros(height * width, dtype=torch.uint8, device=device)
        is_destination = is_destination.index_fill(0, destinations, 1)
        return destinations, is_destination.argsort(stable=True)[: height * width - len(destinations)]

    def _draw(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Draw (rows, columns) whole numbers below 4."""
        place = rows, columns, device
        drawn = next(self.drawn.get(place, iter(())), None)
        if drawn is None:
            draws = torch.randint(4, (DRAWS, rows, columns), generator=self.generator, device="cpu", dtype=torch.uint8)
            self.drawn[place] = iter(draws.to(device).unbind())
            drawn = next(self.drawn[place])
        return drawn
