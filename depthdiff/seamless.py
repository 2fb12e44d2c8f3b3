"""Pictures that can be laid side by side: convolutions see the opposite border beyond a border.

Attention has no borders and normalisation no places, so that a network whose convolutions wrap around commutes with
rolling its input by whole cells of its coarsest level.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.sharing import with_weights

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


def seamless(network: AnyNetwork, axes: str) -> AnyNetwork:
    """Return a network with the same weights whose convolutions wrap around; the given one stays as it is.

    Args:
        network: a UNet, or an autoencoder.
        axes: "x", "y" or "xy"; "" returns the network itself.
    """
    if not axes:
        return network
    twin = with_weights(network, {})
    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            vars(module)["_conv_forward"] = partial(wrapped_conv, module, axes)
        elif _pads_itself(module):
            vars(module)["forward"] = partial(wrapped_downsample, module, axes)
    return twin


def wrapped_conv(conv: nn.Conv2d, axes: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (B, C, H, W) with what `conv` pads taken from the opposite border along the axes, zeros along others."""
    bottom, right = cast("tuple[int, int]", conv.padding)
    x = wrap(x, (right, right, bottom, bottom), axes)
    return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)


def wrapped_downsample(module: Any, axes: str, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Halve (B, C, H, W) by a convolution that reaches one row and column beyond the end."""
    return module.conv(wrap(hidden_states, (0, 1, 0, 1), axes))


def wrap(x: Tensor, margins: tuple[int, int, int, int], axes: str) -> Tensor:
    """Pad (B, C, H, W) on the left, right, top and bottom, by the opposite border along the axes, else by zeros."""
    left, right, top, bottom = margins
    for kept, sides in (("x", (left, right, 0, 0)), ("y", (0, 0, top, bottom))):
        if any(sides):
            x = F.pad(x, sides, mode="circular" if kept in axes else "constant")
    return x


def _pads_itself(module: Any) -> bool:
    """Return whether a module is a downsampler of the autoencoder, which pads before its convolution."""
    conv = getattr(module, "conv", None)
    return isinstance(conv, nn.Conv2d) and conv.stride == (2, 2) and getattr(module, "padding", None) == 0
