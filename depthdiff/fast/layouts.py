"""The order in memory of the weights of convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from depthdiff.checkpoint.weights import give_back_unwritten
from depthdiff.models.base import Network

IMAGE_CHANNELS = 8
"""Pixels, depth and latents have no more channels than this; what reads them is a network's first convolution."""


def lay_out(network: Any, device: torch.device | None = None) -> None:
    """Store convolutions with the channels last, where they are faster so: on a CPU in half precision.

    In float32 a CPU's weights stay as they are, since torch rearranges them anyway, but for the first convolutions:
    their results, and what follows, have the layout of their weights. On another device these get the layout of the
    other convolutions back: CUDA's group norm wants torch's own order, in half precision too. The depth net's backbone
    computes its filters at every use and keeps torch's layout.

    Args:
        network: one of this package; others stay as they are.
        device: where the network is to work; that of its weights if None.
    """
    if not isinstance(network, Network):
        return
    layers = [layer for layer in network.modules() if type(layer) in (nn.Conv2d, nn.ConvTranspose2d)]
    convolutions: list[Any] = layers
    first = [layer for layer in convolutions if layer.in_channels <= IMAGE_CHANNELS]
    if (device or network.device).type == "cpu":
        half = network.dtype in (torch.float16, torch.bfloat16)
        wanted, changed = torch.channels_last, convolutions if half else first
    else:  # first ones that were rearranged for a CPU
        others = (layer for layer in convolutions if layer.in_channels > IMAGE_CHANNELS)
        wanted = torch.contiguous_format
        changed = first if all(layer.weight.is_contiguous() for layer in others) else []
    for layer in changed:
        if not layer.weight.is_contiguous(memory_format=wanted):
            before = layer.weight.data
            with torch.inference_mode(layer.weight.is_inference()):  # an assignment must not change the kind of tensor
                layer.to(memory_format=wanted)
            give_back_unwritten(before)  # what is mapped from a file would count twice
