"""Pictures larger than the network was trained on, one window at a time.

Letters: B batch, C channels, h and w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from depthdiff.sharing import with_weights

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


def over_windows(network: Callable[[Tensor], Tensor], x: Tensor, windows: tuple[int, int] | None) -> Tensor:
    """Run a network on each window, and average what it returns where windows overlap.

    Averaging predictions equals averaging the latents after a step, as the paper does, where these depend linearly on
    the prediction, as in all solvers here without clipping. Source: arXiv:2302.08113 (MultiDiffusion), eq. 5, with
    equal weights.

    Args:
        network: (B, C, size, size) -> (B, C', size, size).
        x: (B, C, h, w).
        windows: (size, stride) in latents; None runs `x` as a whole.

    Returns:
        (B, C', h, w).
    """
    if windows is None:
        return network(x)
    size, stride = windows
    total, count = None, torch.zeros(x.shape[2:], device=x.device)
    for top in starts(x.shape[2], size, stride):
        for left in starts(x.shape[3], size, stride):
            rows, columns = slice(top, top + size), slice(left, left + size)
            result = network(x[:, :, rows, columns])
            if total is None:
                dtype, wide = result.dtype, torch.promote_types(result.dtype, torch.float32)
                total = torch.zeros((*result.shape[:2], *x.shape[2:]), device=x.device, dtype=wide)
            total[:, :, rows, columns] += result
            count[rows, columns] += 1
    assert total is not None
    return (total / count).to(dtype)


def starts(length: int, size: int, stride: int) -> Iterator[int]:
    """List where windows begin along a side; the last one ends with the side."""
    last = max(length - size, 0)
    yield from range(0, last, stride)
    yield last


def tiled(vae: AnyNetwork, size: int, factor: int) -> AnyNetwork:
    """Return an autoencoder with the same weights that works in tiles; the given one stays as it is.

    Tiles are joined right where a quarter of them, which the next one covers again, is whole: they have a multiple of
    four latents.

    Args:
        vae: ours, or one of diffusers.
        size: of a tile in latents, about.
        factor: pixels that a latent stands for.
    """
    if not hasattr(vae, "use_tiling"):
        return vae
    twin, size = with_weights(vae, {}), max(4, size - size % 4)
    vars(twin).update(use_tiling=True, tile_sample_min_size=size * factor, tile_latent_min_size=size)
    return twin
