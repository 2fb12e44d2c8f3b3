"""3x3 convolutions by the fastest algorithm for their size: torch's, Winograd's, or one matrix product.

torch reorders the filters at every call. For small maps of many channels, as at the UNet's coarsest levels, that takes
longer than the convolution itself, while the filters in memory already form a matrix.

Convolving a map after repeating its pixels equals convolving the map before, with other filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.fast import winograd
from depthdiff.fast.calls import is_bare
from depthdiff.fast.eligible import fuses_bfloat16, has_tiles, only_computes, products_are_exact, uses_onednn
from depthdiff.models.resnet import Upsample2D

MOST_PIXELS, FEWEST_WEIGHTS = 256, 2**20
"""Largest map of a result, and fewest pairs of channels, for which a matrix product is faster. The batch does not
count, so that a picture does not depend on the others of its batch."""

COVERED_BYTES = 2**25
"""Size of the unfolded input, nine times the input, that is held at a time."""

DOUBLED = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
"""Which weights of a filter along one axis fall on the copies of a pixel, by the filter's position."""

CONV_FORWARD = nn.Conv2d._conv_forward

FEWEST_DOUBLED = 64 * 64
"""Pixels of a map from which `doubled_conv3x3` is faster: it sums its filters at every call."""


def fast_conv3x3(conv: nn.Conv2d, input: Tensor) -> Tensor:
    """Convolve a map (B, C, H, W) with 3x3 filters; NotImplemented where torch's algorithm is faster, or required."""
    x = input
    weights = (conv.weight,) if conv.bias is None else (conv.weight, conv.bias)
    if conv.kernel_size != (3, 3) or not only_computes(x, *weights) or not is_usual(conv, (3, 3)) or not fits(x, conv):
        return NotImplemented
    stride, padding = conv.stride[0], int(conv.padding[0])
    if (stride, padding) == (1, 1) and winograd.is_faster(x, conv.weight):
        return winograd.winograd_conv3x3(x, conv.weight, conv.bias)
    if product_is_faster(x, conv.weight, stride, padding):
        return im2col_conv3x3(x, conv.weight, conv.bias, stride, padding)
    return NotImplemented


def fast_upsample(layer: Upsample2D, hidden_states: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    """Upsample a map twofold and convolve it in one convolution; NotImplemented where that does not apply."""
    if not layer.interpolate or layer.conv is None or not doubling_is_faster(hidden_states, layer.conv, output_size):
        return NotImplemented
    return doubled_conv3x3(hidden_states, layer.conv.weight, layer.conv.bias)


def is_usual(conv: nn.Conv2d, kernel_size: tuple[int, int]) -> bool:
    """Return whether a convolution has filters of this size, zero padding, and the `_conv_forward` of its class.

    Code for seamless textures sets another `padding_mode` or replaces `_conv_forward`.
    """
    if conv.weight.shape != (conv.out_channels, conv.in_channels, *kernel_size) or conv.kernel_size != kernel_size:
        return False
    usual = (conv.padding_mode, conv.dilation, conv.groups) == ("zeros", (1, 1), 1)
    square = len({*conv.stride}) == 1 and len({*conv.padding}) == 1 and not isinstance(conv.padding, str)
    return usual and square and "_conv_forward" not in vars(conv) and type(conv)._conv_forward is CONV_FORWARD


def fits(x: Tensor, conv: nn.Conv2d) -> bool:
    """Return whether x is a batch of maps that a convolution reads without complaint."""
    same = x.dtype == conv.weight.dtype and (conv.bias is None or x.dtype == conv.bias.dtype)
    return same and x.dim() == 4 and x.shape[1] == conv.in_channels and x.numel() > 0


def packed_conv(conv: nn.Conv2d, padding: tuple[int, int], shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Reorder a plain convolution's filters once for many calls; torch does it at every call.

    The operators are those that torch.compile uses; torch has no public name for them.

    Args:
        conv: of any dtype; only bfloat16 filters are reordered in advance.
        padding: rows and columns of zeros, instead of the layer's own.
        shape: approximate (B, C, H, W) of the input.
    """
    weight, bias, stride = conv.weight, conv.bias, list(conv.stride)
    if weight.dtype != torch.bfloat16 or not fuses_bfloat16():
        return lambda x: F.conv2d(x, weight, bias, stride, padding)
    geometry = (list(padding), stride, [1, 1], 1)
    packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, list(shape))
    return lambda x: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")


def product_is_faster(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 1) -> bool:
    """Return whether to prefer `im2col_conv3x3`: for small maps of many channels, where nothing is trained.

    In float32 on any processor, in bfloat16 on those that multiply it in tiles (AMX).
    """
    if x.dim() != 4 or x.dtype != weight.dtype or not only_computes(x, weight):
        return False
    ways = {torch.float32: products_are_exact, torch.bfloat16: has_tiles}
    if x.dtype not in ways or not ways[x.dtype]():
        return False
    pixels = math.prod((side + 2 * padding - 3) // stride + 1 for side in x.shape[2:])
    return 0 < pixels <= MOST_PIXELS and weight.shape[0] * weight.shape[1] >= FEWEST_WEIGHTS


def im2col_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Convolve with 3x3 filters as one matrix product with the unfolded input (im2col).

    Args:
        x: (B, C, H, W), float.
        weight: (K, C, 3, 3), float; channels last in memory or contiguous.
        bias: (K,), float, or None.
        stride: of the filters.
        padding: rows and columns of zeros at each border.

    Returns:
        (B, K, H', W'), float, channels last in memory.

    Source: Chellapilla et al., High performance convolutional neural networks for document processing, 2006.
    """
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, *(padding,) * 4))
    covered = pixels.unfold(1, 3, stride).unfold(2, 3, stride)  # (B, H', W', C, 3, 3), a view
    if weight.is_contiguous(memory_format=torch.channels_last):
        covered, weight = covered.movedim(3, 5), weight.movedim(1, 3)
    few = max(1, COVERED_BYTES // (covered[:1].numel() * x.itemsize or COVERED_BYTES))
    matrix = weight.flatten(1)
    return torch.cat([F.linear(some.flatten(3), matrix, bias) for some in covered.split(few)]).movedim(3, 1)


def doubling_is_faster(x: Tensor, conv: nn.Module, size: Sequence[int] | None) -> bool:
    """Return whether to prefer `doubled_conv3x3`: for all but small maps on a processor, where nothing is trained.

    Args:
        x: (B, C, H, W), before its pixels are repeated.
        conv: the convolution after it. With another class, hooks, or a replaced `forward` it is called as it is.
        size: requested height and width; None for twice those of `x`.
    """
    if type(conv) is not nn.Conv2d or not only_computes(x, *conv.parameters()) or not is_bare(conv):
        return False
    if not is_usual(conv, (3, 3)) or not conv.stride == conv.padding == (1, 1) or not fits(x, conv):
        return False
    ways = {torch.float32: uses_onednn, torch.bfloat16: fuses_bfloat16}  # without oneDNN's kernels it is slower
    if x.dtype not in ways or not ways[x.dtype]() or not products_are_exact():
        return False
    if x.shape[2:].numel() < FEWEST_DOUBLED:
        return False
    return size is None or list(size) == [2 * side for side in x.shape[2:]]


def doubled_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Repeat every pixel twice in height and width and convolve with 3x3 filters, with 4/9 of the multiplications.

    Each pixel is multiplied by the sum of the weights that fall on its copies: a transposed convolution with 4x4
    filters and stride 2. In bfloat16 the sums are rounded once: a relative error of 2.4e-3, 1.7e-3 without.

    Args:
        x: (B, C, H, W), float.
        weight: (K, C, 3, 3), float.
        bias: (K,), float, or None.

    Returns:
        (B, K, 2 H, 2 W), float.
    """
    one = torch.tensor(DOUBLED, dtype=weight.dtype, device=weight.device)
    both = torch.kron(one, one)
    matrix = both @ weight.permute(2, 3, 1, 0).flatten(0, 1).flatten(1)  # (16, C K)
    filters = matrix.view(4, 4, *weight.shape[1::-1]).permute(2, 3, 0, 1)  # K last in memory: quickly rearranged
    return F.conv_transpose2d(x, filters, bias, stride=2, padding=1)
