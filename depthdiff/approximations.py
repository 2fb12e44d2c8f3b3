"""Approximations: guidance at some steps, the UNet's deep part at some steps, similar tokens merged.

Each changes the picture, and none is on unless it is asked for. They are put on a copy of the UNet's module tree that
shares its weights, for one run; the UNet itself does not change.

Letters: B batch, C channels, H and W height and width of a feature map, N = HW its tokens, M groups of tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from depthdiff.checks import brief, check_number
from depthdiff.models.unet import UNet2DConditionOutput
from depthdiff.sharing import with_weights

MOST_MERGED = 0.75
"""One of 2x2 tokens is a destination."""
SEED = 0
"""Seed of the choice of destinations; every run draws the same ones."""
DRAWS = 256
"""Calls for which destinations are drawn at a time, so that the host rarely waits for a copy to the device."""


@dataclass(frozen=True)
class Approximations:
    """Approximations of a run; the defaults are exact.

    Attributes:
        guidance_interval: guidance is on while the share of the training timesteps, t / 1000 for Stable Diffusion, is
            in [low, high], of which 0 is a clean picture and 1 pure noise; elsewhere the prompt alone is run, as with a
            guidance scale of 1. The paper states noise levels sigma, which are other numbers: 0.28 and 5.42, which it
            uses for Stable Diffusion XL, are shares of 0.07 and 0.81 in Stable Diffusion's noise schedule.
            Source: arXiv:2404.07724, eq. 6.
        deep_cache: run the deeper part of the UNet at every N-th step. Source: arXiv:2312.00858.
        token_merging: share of tokens that self-attention of the finest level merges away, in [0, 0.75].
            Source: arXiv:2303.17604.
    """

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    deep_cache: int = 1
    token_merging: float = 0.0

    def __post_init__(self) -> None:
        interval = self.guidance_interval
        if not isinstance(interval, (tuple, list)) or len(interval) != 2:
            raise ValueError(f"guidance_interval must be two numbers, low and high, got {brief(interval)}")
        low, high = (float(check_number("guidance_interval", number, 0.0, 1.0)) for number in interval)
        if low > high:
            raise ValueError(f"guidance_interval must be (low, high) with low <= high, got {(low, high)}")
        object.__setattr__(self, "guidance_interval", (low, high))
        object.__setattr__(self, "deep_cache", check_number("deep_cache", self.deep_cache, 1, whole=True))
        merged = check_number("token_merging", self.token_merging, 0.0, MOST_MERGED)
        object.__setattr__(self, "token_merging", merged)

    def guides(self, share: float) -> bool:
        """Return whether guidance is on at a share of the training timesteps; 0 and 1 as limits have no end."""
        low, high = self.guidance_interval
        return (low if low > 0 else -math.inf) <= share <= (high if high < 1 else math.inf)


PRESETS: Mapping[str, Approximations] = {"fast": Approximations(guidance_interval=(0.2, 1.0), deep_cache=3)}
"""Approximations by name; `scripts/mini/approximations.py` measures what they cost in quality."""


def resolve_preset(preset: str | None, **options: Any) -> Approximations:
    """Combine a preset with options of `Approximations`; those that are not None count instead of the preset's.

    Raises:
        TypeError: an option of a wrong type.
        ValueError: an unknown preset, or an option out of range.
    """
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, or None, got {brief(preset)}")
    chosen = Approximations() if preset is None else PRESETS[preset]
    return dataclasses.replace(chosen, **{name: value for name, value in options.items() if value is not None})


def approximated(unet: nn.Module, chosen: Approximations) -> nn.Module:
    """Return a UNet that shares the weights of the given one and leaves out what is chosen; for one run."""
    if chosen.deep_cache == 1 and not chosen.token_merging:
        return unet
    twin = with_weights(unet, {})
    if chosen.token_merging:
        TokenMerger(chosen.token_merging).install(twin)
    if chosen.deep_cache > 1:
        DeepCache(chosen.deep_cache).install(twin)
    return twin


class DeepCache:
    """Runs the deep part of a UNet in every N-th call, and reuses its result in the others.

    The shallow part is the first convolution and the last residual block with its transformer: branch 0 of the paper's
    code. Source: arXiv:2312.00858, sec. 3.3.

    Args:
        every: N.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.features: Tensor | None = None
        self.uses = 0

    def install(self, unet: Any) -> None:
        """Replace the UNet's `forward`, and that of its last residual block, on this object."""
        self.unet, self.plain = unet, unet.forward
        self.block = unet.up_blocks[-1]
        self.resnet = self.block.resnets[-1]
        self.read = self.resnet.forward
        self.resnet.forward = self.record
        unet.forward = self.forward

    def record(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Keep what the last residual block reads of the deep part."""
        skip = self.unet.conv_in.out_channels
        self.features = input_tensor[:, :-skip]
        return self.read(input_tensor, *args, **kwargs)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Predict the noise; arguments and result are those of the UNet's `forward`."""
        kept = self._recall(len(encoder_hidden_states), sample.shape[2:])
        if kept is None:
            self.uses = 1
            return self.plain(sample, timestep, encoder_hidden_states, *args, **kwargs)
        self.uses += 1
        scaled = getattr(self.unet, "_scaled_adapters", nullcontext)  # PEFT's, as in the UNet's own `forward`
        with scaled(kwargs.get("cross_attention_kwargs")):
            x = self._shallow(kept, sample, timestep, encoder_hidden_states, kwargs.get("cross_attention_kwargs"))
        return (x,) if kwargs.get("return_dict") is False else UNet2DConditionOutput(x)

    def _shallow(self, kept: Tensor, sample: Tensor, timestep: Any, context: Tensor, attention_kwargs: Any) -> Tensor:
        """Compute the first convolution and what follows the deep part."""
        unet, block = self.unet, self.block
        temb = unet.time_embedding(unet.get_time_embed(sample, timestep))
        x = unet.conv_in(2 * sample - 1 if unet.config.center_input_sample else sample)
        x = self.read(torch.cat([kept, x], dim=1), temb)
        if hasattr(block, "attentions"):
            options = {"cross_attention_kwargs": attention_kwargs, "return_dict": False}
            x = block.attentions[-1](x, encoder_hidden_states=context, **options)[0]
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))

    def _recall(self, rows: int, size: torch.Size) -> Tensor | None:
        """Return the features for a call of so many rows and this size; None where they must be computed."""
        kept = self.features
        if kept is None or self.uses >= self.every or kept.shape[2:] != size:
            return None
        if len(kept) == 2 * rows:  # guidance has stopped: the second half is the prompt's
            kept = self.features = kept.chunk(2)[1]
        return kept if len(kept) == rows else None


class TokenGroups(NamedTuple):
    """Groups of tokens that are treated as one.

    Attributes:
        group: (B, N), the number of each token's group.
        total: M.
    """

    group: Tensor
    total: int

    def merge(self, tokens: Tensor) -> Tensor:
        """Average each group: (B, N, C) -> (B, M, C)."""
        sums = tokens.new_zeros(len(tokens), self.total, tokens.shape[2])
        index = self.group[..., None].expand_as(tokens)
        return sums.scatter_reduce(1, index, tokens, "mean", include_self=False)

    def unmerge(self, merged: Tensor) -> Tensor:
        """Copy each group's value to its tokens: (B, M, C) -> (B, N, C)."""
        return merged.gather(1, self.group[..., None].expand(-1, -1, merged.shape[2]))


class TokenMerger:
    """Merge similar tokens for self-attention.

    Of every 2x2 tokens one, drawn at random, is a destination; the others are sources, of which those most similar to a
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

    def install(self, unet: Any) -> None:
        """Make the self-attentions of the finest level with attention, of this object, work on merged tokens."""
        blocks = list(zip(unet.down_blocks, reversed(unet.up_blocks), strict=True))
        attending = [pair for pair in blocks if any(hasattr(block, "attentions") for block in pair)]
        for block in attending[0] if attending else ():
            for transformer in getattr(block, "attentions", ()):
                self._install(transformer)

    def _install(self, transformer: Any) -> None:
        plain = transformer.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.size = hidden_states.shape[2:]
            return plain(hidden_states, *args, **kwargs)

        transformer.forward = forward
        for block in transformer.transformer_blocks:
            self._merge_in(block.attn1)

    def _merge_in(self, attention: Any) -> None:
        plain = attention.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            groups = self.group(hidden_states, self.size)
            if groups is None:
                return plain(hidden_states, *args, **kwargs)
            return groups.unmerge(plain(groups.merge(hidden_states), *args, **kwargs))

        attention.forward = forward

    def group(self, tokens: Tensor, size: torch.Size) -> TokenGroups | None:
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
        index = torch.empty(len(tokens), total, dtype=torch.long, device=tokens.device)
        index[:, destinations] = torch.arange(len(destinations), device=tokens.device)
        index[:, sources] = nearest.scatter(1, staying, own.expand_as(staying))
        return TokenGroups(index, total - merged)

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
