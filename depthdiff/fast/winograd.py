"""3x3 convolutions with a quarter of the multiplications, for float32 on a processor: Winograd's F(4x4, 3x3).

Every 4x4 pixels of the result come from 6x6 of the input. Both and the filter are transformed, so that the convolution
becomes 36 matrix products, one for each number of a transformed tile; a convolution takes 144 multiplications for the
same 16 pixels. Source: arXiv:1509.09308 (Lavin and Gray), sec. 4.3.

Some rows of tiles are transformed at a time, along one axis after the other, so that intermediates stay in the cache.
The relative error is 1.3e-6, that of torch's convolution 3e-7; within a tile it scales with the largest of its 36
pixels.

Letters: B batch, C channels in, K channels out, H and W height and width in pixels, T tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from depthdiff.fast.eligible import only_computes, products_are_exact
from depthdiff.fast.memory import empty_map

TILE = 4
"""Height and width of a tile of the result; one of the input has two more."""

ROOT = math.sqrt(2)
FILTER = (
    (1, 0, 0),
    (-1 / 3, -1 / 3 / ROOT, -1 / 6),
    (-1 / 3, 1 / 3 / ROOT, -1 / 6),
    (1 / 6, ROOT / 6, 1 / 3),
    (1 / 6, -ROOT / 6, 1 / 3),
    (0, 0, 1),
)
"""The filter's transform along one axis, G of the source, for the points of `transform_axis`. What belongs to the
second and third of them is halved here and doubled in `restore_axis`, which saves a multiplication."""

ROWS_BYTES = 2**19
"""Pixels that each thread transforms at once; with their transforms, about the size of a core's L2 cache."""

PRODUCT_BYTES = 2**25
"""Transformed pixels and products that are held at once."""

FILTER_BYTES = 2**25
"""Transformed filters held at once. They are computed at every call: all of them would take four times the weights."""

FEWEST_TILES, FEWEST_CHANNELS, FEWEST_PRODUCTS = 16, 128, 2**23
"""Below these the transforms cost more than the products save; tiles are those of a picture, products those of one of
the 36. The batch does not count, so that a picture does not depend on the others of its batch."""


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Return whether to prefer `winograd_conv3x3`: for large float32 maps on a CPU, where nothing is trained."""
    if x.dim() != 4 or not x.dtype == weight.dtype == torch.float32 or not only_computes(x, weight):
        return False
    if not products_are_exact():
        return False
    channels, height, width = x.shape[1:]
    if height % TILE or width % TILE or min(channels, weight.shape[0]) < FEWEST_CHANNELS:
        return False
    tiles = height * width // TILE**2
    return tiles >= FEWEST_TILES and tiles * channels * weight.shape[0] >= FEWEST_PRODUCTS


def winograd_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    read: Callable[[int, int, int], Tensor] | None = None,
    add: Callable[[int, int, int], Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve with 3x3 filters and a border of zeros. Fastest where channels come last in memory; no gradients.

    Args:
        x: (B, C, H, W), float32; H and W multiples of TILE.
        weight: (K, C, 3, 3), float32.
        bias: (K,), float32, or None.
        read: returns rows of the input instead of `x`, (1, C, rows, W), for a picture, a first row and a last.
        add: returns rows to add to the result, (1, K, rows, W), for the same arguments.
        out: (B, K, H, W), written from the first row to the last; new memory if None.

    Returns:
        (B, K, H, W), float32, channels last in memory unless `out` was given.
    """
    batch, channels, height, width = x.shape
    filters, across = weight.shape[0], width // TILE
    read = read or (lambda picture, first, last: x[picture : picture + 1, :, first:last])
    out = empty_map(x, filters, height, width) if out is None else out
    few = split(filters, FILTER_BYTES // (36 * 4 * channels))  # filters at once
    rows = split(batch * height // TILE, PRODUCT_BYTES // (36 * 4 * across * (channels + few)))  # of tiles at once
    tile_rows = min(rows, ROWS_BYTES * torch.get_num_threads() // (4 * TILE * width * channels))
    for group in grouped_rows(batch, height // TILE, tile_rows, rows):
        v = x.new_empty(6, 6, group[-1].place.stop, across, channels)  # the transformed pixels
        for tiles in group:
            transform_rows(with_border(read, tiles, height), v[:, :, tiles.place])
        for k in range(0, filters, few):
            u = transform_filters(weight[k : k + few])
            products = torch.bmm(v.flatten(2, 3).flatten(0, 1), u)  # (36, T, C) x (36, C, K) -> (36, T, K)
            products = products.unflatten(1, (-1, across)).unflatten(0, (6, 6))
            for tiles in group:
                first, last = TILE * tiles.start, TILE * tiles.stop
                here = out[tiles.picture, k : k + few, first:last].permute(1, 2, 0)
                restore_rows(products[:, :, tiles.place], here)
                if bias is not None:
                    here += bias[k : k + few]
                if add is not None:
                    here += add(tiles.picture, first, last)[0, k : k + few].permute(1, 2, 0)
            del u, products  # before the next ones are made
        del v
    return out


class TileRows(NamedTuple):
    """Rows of tiles of one picture, and their place in the group that is multiplied together."""

    picture: int
    start: int
    stop: int
    place: slice


def split(count: int, most: int) -> int:
    """Return the size of the fewest equal parts, none of them larger than `most` or empty."""
    parts = max(1, -(-count // max(1, most)))
    return -(-count // parts)


def grouped_rows(batch: int, rows: int, most: int, together: int) -> list[list[TileRows]]:
    """Cut every picture into blocks of at most `most` rows of tiles; group about `together` rows."""
    size = split(rows, most)
    groups: list[list[TileRows]] = []
    for picture in range(batch):
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            if not groups or groups[-1][-1].place.stop + size > together:
                groups.append([])
            begin = groups[-1][-1].place.stop if groups[-1] else 0
            groups[-1].append(TileRows(picture, start, stop, slice(begin, begin + stop - start)))
    return groups


def transform_filters(weight: Tensor) -> Tensor:
    """Transform filters along both axes: (K, C, 3, 3) -> (36, C, K)."""
    one = torch.tensor(FILTER, dtype=torch.float64, device=weight.device)
    both = torch.kron(one, one).to(weight.dtype)  # (36, 9)
    return torch.matmul(both, weight.permute(0, 2, 3, 1).flatten(1, 2)).permute(1, 2, 0)


def with_border(read: Callable[[int, int, int], Tensor], tiles: TileRows, height: int) -> Tensor:
    """Read the pixels of some rows of tiles, (rows, W + 2, C), with a border of one pixel, zero outside the picture."""
    first, last = TILE * tiles.start - 1, TILE * tiles.stop + 1
    inside = read(tiles.picture, max(first, 0), min(last, height))[0].permute(1, 2, 0)
    return F.pad(inside, (0, 0, 1, 1, max(-first, 0), max(last - height, 0)))


def transform_rows(pixels: Tensor, out: Tensor) -> None:
    """Transform the tiles of some rows.

    Args:
        pixels: (TILE * rows + 2, W + 2, C).
        out: (6, 6, rows, W / TILE, C), written.
    """
    _, _, rows, across, channels = out.shape
    height, width = TILE * rows, TILE * across
    down = pixels.new_empty(6, rows, width + 2, channels)
    transform_axis([pixels[i : i + height - 3 : TILE] for i in range(6)], down)
    transform_axis([down[:, :, i : i + width - 3 : TILE] for i in range(6)], out.transpose(0, 1))


def transform_axis(d: Sequence[Tensor], out: Tensor) -> None:
    """Transform six neighbours along one axis into six numbers, `out`: Bᵀ of the source.

    The points are 0, ±1/√2, ±√2 and infinity instead of the source's 0, ±1, ±2 and infinity, which halves the error and
    quarters the largest one. Source of their form, ±1/c and ±c: arXiv:2201.10369.
    """
    a, b = torch.empty_like(out[0]), torch.empty_like(out[0])
    torch.sub(d[4], d[2], alpha=2.5, out=out[0]).add_(d[0])
    torch.sub(d[5], d[3], alpha=2.5, out=out[5]).add_(d[1])
    torch.sub(d[4], d[2], alpha=2, out=a)
    torch.sub(d[3], d[1], alpha=2, out=b)
    torch.add(a, b, alpha=1 / ROOT, out=out[1])
    torch.sub(a, b, alpha=1 / ROOT, out=out[2])
    torch.sub(d[4], d[2], alpha=0.5, out=a)
    torch.sub(d[3], d[1], alpha=0.5, out=b)
    torch.add(a, b, alpha=ROOT, out=out[3])
    torch.sub(a, b, alpha=ROOT, out=out[4])


def restore_rows(products: Tensor, out: Tensor) -> None:
    """Turn the products of some rows of tiles into pixels.

    Args:
        products: (6, 6, rows, W / TILE, K).
        out: (TILE * rows, W, K), written.
    """
    _, _, rows, across, filters = products.shape
    down = products.new_empty(TILE, 6, rows, across, filters)
    restore_axis(products, down)
    tiles = out.unflatten(1, (across, TILE)).unflatten(0, (rows, TILE))  # (rows, TILE, W / TILE, TILE, K)
    restore_axis(down.transpose(0, 1), tiles.permute(3, 1, 0, 2, 4))


def restore_axis(m: Tensor, out: Tensor) -> None:
    """Turn six numbers into the four pixels of a tile along one axis, `out`: Aᵀ of the source."""
    a, b = torch.empty_like(m[0]), torch.empty_like(m[0])
    torch.add(m[1], m[2], out=a)
    torch.add(m[3], m[4], out=b)
    torch.add(m[0], a, alpha=2, out=out[0]).add_(b)
    torch.add(a, b, alpha=2, out=out[2])
    torch.sub(m[1], m[2], out=a)
    torch.sub(m[3], m[4], out=b)
    torch.add(a, b, out=out[1]).mul_(ROOT)
    torch.add(m[5], a, alpha=1 / ROOT, out=out[3]).add_(b, alpha=2 * ROOT)
