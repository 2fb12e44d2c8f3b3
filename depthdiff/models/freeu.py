"""FreeU: weaker skips and a stronger backbone on the way up. Source: arXiv:2309.11497.

Letters: B batch, C channels, H and W height and width of a feature map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

THRESHOLD = 1
"""Half the side of the square of low frequencies."""


def apply_freeu(block: Any, hidden_states: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Scale what a level on the way up reads, where `enable_freeu` has set its scales.

    Args:
        block: the level; its `s1`, `b1` are for the coarsest resolution, `s2`, `b2` for the next.
        hidden_states: (B, C, H, W), the backbone's features, of whose channels the first half is multiplied by b.
        skip: (B, C', H, W), whose low frequencies are multiplied by s.
    """
    scales = [getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")]
    if not all(scales) or block.resolution_idx not in (0, 1):
        return hidden_states, skip
    s, b = scales[block.resolution_idx], scales[2 + block.resolution_idx]
    half = hidden_states.shape[1] // 2
    backbone = torch.cat([hidden_states[:, :half] * b, hidden_states[:, half:]], dim=1)
    return backbone, scale_low_frequencies(skip, s)


def scale_low_frequencies(x: Tensor, scale: float) -> Tensor:
    """Multiply the lowest frequencies of maps (B, C, H, W) by `scale`."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones(height, width, device=x.device)
    row, column = height // 2, width // 2
    mask[row - THRESHOLD : row + THRESHOLD, column - THRESHOLD : column + THRESHOLD] = scale
    spectrum = torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))
    return torch.fft.ifftn(spectrum, dim=(-2, -1)).real.to(x.dtype)
