"""3x3 convolutions of maps far larger than a processor's cache, a strip of rows at a time, with what is around them.

So the activation before and the addition after work on what is in the cache, and have no memory of their own, which the
system would hand out page by page: a map of 128 channels of 512x512 takes 64 MiB. In float32 `winograd.py` does so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.models.convolution import Conv3x3
from depthdiff.models.plain import is_bare, only_computes

LARGE_BYTES, MOST_WEIGHTS = 2**25, 2**16
"""Of one picture's map, from which on strips are faster, and up to how many pairs of channels: torch rearranges the
filters for every strip."""

STRIP_BYTES = 2**23
"""Of the map that is read at a time."""

ELEMENTWISE = (nn.SiLU, nn.GELU, nn.ReLU, nn.Mish)

GEOMETRY = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
"""Of a convolution that keeps height and width: filters, stride, padding, dilation, groups, and zeros beyond."""


def strips_are_faster(x: Tensor, conv: nn.Module, act: nn.Module | None = None, *others: Tensor) -> bool:
    """Tell whether to prefer `striped_conv3x3`: for large maps in bfloat16 on a processor, where nothing is trained.

    Args:
        x: what is activated and convolved.
        conv: a 3x3 convolution that keeps height and width. One of another kind, hooked, or with a `forward` put in its
            place is called as it is.
        act: the activation before it, in the same way; one of those that work element by element.
        *others: what else goes into the result.
    """
    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, Conv3x3) or not is_bare(conv):
        return False
    if (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode) != GEOMETRY:
        return False
    if x.dim() != 4 or not x.dtype == conv.weight.dtype == torch.bfloat16:
        return False
    if x[:1].nbytes < LARGE_BYTES or conv.in_channels * conv.out_channels > MOST_WEIGHTS:
        return False
    if act is not None and (type(act) not in ELEMENTWISE or not is_bare(act) or getattr(act, "inplace", False)):
        return False
    return only_computes(x, *conv.parameters(), *others)


def striped_conv3x3(x: Tensor, conv: nn.Conv2d, act: nn.Module | None = None, plus: Tensor | None = None) -> Tensor:
    """Activate, convolve, and add: plus + conv(act(x)).

    Args:
        x: (B, C, H, W), bfloat16.
        conv: a 3x3 convolution that keeps height and width, C -> K.
        act: works element by element, if there is one.
        plus: (B, K, H, W), if there is something to add.

    Returns:
        (B, K, H, W), channels last in memory.
    """
    batch, _, height, width = x.shape
    out = x.new_empty(batch, height, width, conv.out_channels).movedim(3, 1)
    rows = max(1, STRIP_BYTES // max(1, x[:1, :, :1].nbytes))
    for b in range(batch):
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            part = x[b : b + 1, :, max(0, top - 1) : bottom + 1]  # with the rows above and below
            part = part if act is None else act(part)
            part = F.pad(part, (0, 0, int(top == 0), int(bottom == height)))
            part = F.conv2d(part, conv.weight, conv.bias, padding=(0, 1))
            place = out[b : b + 1, :, top:bottom]
            if plus is None:
                place.copy_(part)
            else:
                torch.add(plus[b : b + 1, :, top:bottom], part, out=place)
    return out
