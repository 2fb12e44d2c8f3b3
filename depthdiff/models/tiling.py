"""Large images in overlapping tiles, blended where they meet, so that memory does not grow with the image.

Letters: B batch, C channels, H and W height and width of what goes in or comes out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def run_in_tiles(
    run: Callable[[Tensor], Tensor], x: Tensor, size_in: int, size_out: int, overlap_factor: float
) -> Tensor:
    """Run tiles that overlap, and join the results.

    A tile's result first fades out of the one above it, then out of the one to its left; what is blended is the tile
    already blended, so that corners mix all four. Source: huggingface/diffusers, `AutoencoderKL`, whose numbers it has.

    Args:
        run: the network, (B, C, size_in, size_in) -> (B, C', size_out, size_out), proportional for smaller tiles.
        x: (B, C, H, W).
        size_in: height and width of a tile.
        size_out: of its result.
        overlap_factor: share of a tile that the next one covers again.

    Returns:
        (B, C', H size_out / size_in, W size_out / size_in).
    """
    step = int(size_in * (1 - overlap_factor))
    overlap = int(size_out * overlap_factor)
    keep = size_out - overlap
    above: list[Tensor] = []
    rows = []
    for top in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], step):
            tile = run(x[:, :, top : top + size_in, left : left + size_in])
            if above:
                tile = fade(above[len(row)], tile, overlap, dim=2)
            if row:
                tile = fade(row[-1], tile, overlap, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def run_in_slices(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run the samples of a batch (B, C, H, W) one after the other, and join the results."""
    return torch.cat([run(one) for one in x.split(1)]) if len(x) > 1 else run(x)


def fade(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Blend the first `extent` rows (dim 2) or columns (dim 3) of `after` with the last ones of `before`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    ramp = torch.arange(extent, device=after.device, dtype=after.dtype) / extent
    ramp = F.pad(ramp, (0, after.shape[dim] - extent), value=1.0).view(-1, *(1,) * (3 - dim))
    start = before.narrow(dim, before.shape[dim] - extent, extent)
    start = F.pad(start, (0, 0) * (3 - dim) + (0, after.shape[dim] - extent))
    return start * (1 - ramp) + after * ramp
