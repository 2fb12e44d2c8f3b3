"""3x3 convolutions, each on the way that is fastest for its size: torch's, Winograd's, or one matrix product.

torch's rearranges its filters at every call. Where a map is small and its channels many, as at the UNet's coarsest
levels, that takes longer than the convolution itself, and the filters as they lie in memory are a matrix already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.models import winograd
from depthdiff.models.plain import has_tiles, only_computes

MOST_PIXELS, FEWEST_WEIGHTS = 256, 2**20
"""Largest map of a result, and fewest pairs of channels, for which a matrix product is faster. The batch does not
count, so that a picture does not depend on its company."""


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution.

    Args:
        in_channels: C.
        out_channels: K.
        stride: of the filters; 1 keeps height and width.
        padding: rows and columns of zeros at each border.
        bias: whether to add one.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, padding: int = 1, bias: bool = True):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H', W')."""
        stride, padding = self.stride[0], int(self.padding[0])
        if (stride, padding) == (1, 1) and winograd.is_faster(x, self.weight):
            return winograd.winograd_conv3x3(x, self.weight, self.bias)
        if product_is_faster(x, self.weight, stride):
            return im2col_conv3x3(x, self.weight, self.bias, stride, padding)
        return super().forward(x)


def product_is_faster(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Tell whether to prefer `im2col_conv3x3`: for small maps of many channels, where nothing is trained.

    In float32 on any processor, in bfloat16 on those that multiply it in tiles (AMX).
    """
    if x.dim() != 4 or x.dtype != weight.dtype or not only_computes(x, weight):
        return False
    if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and has_tiles()):
        return False
    pixels = x.shape[2] * x.shape[3] // stride**2
    return 0 < pixels <= MOST_PIXELS and weight.shape[0] * weight.shape[1] >= FEWEST_WEIGHTS


def im2col_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Convolve with 3x3 filters by one product of their matrix and the matrix of what each of them covers.

    Args:
        x: (B, C, H, W), float.
        weight: (K, C, 3, 3), float; with the channels last in memory or in torch's order, which is not changed.
        bias: (K,), float, or None.
        stride: of the filters.
        padding: rows and columns of zeros at each border.

    Returns:
        (B, K, H', W'), float, channels last in memory.

    Source: Chellapilla et al., High performance convolutional neural networks for document processing, 2006.
    """
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, *(padding,) * 4))
    covered = pixels.unfold(1, 3, stride).unfold(2, 3, stride)  # (B, H', W', C, 3, 3)
    if weight.is_contiguous(memory_format=torch.channels_last):
        covered, weight = covered.movedim(3, 5), weight.movedim(1, 3)
    result = F.linear(covered.flatten(3), weight.flatten(1), bias)
    return result.movedim(3, 1)
