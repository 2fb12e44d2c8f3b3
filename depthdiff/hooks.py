"""Hooks that move or cast a layer's weights for the length of its forward pass: offloading, and layerwise casting."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CASTABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)
"""Layers whose weights may be stored in a narrow dtype; norms are small, and need their digits."""

SKIPPED = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
"""Names of layers that keep their dtype unless others are named. Source: diffusers, hooks/layerwise_casting.py."""

STORAGE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16)
COMPUTE = (torch.float16, torch.bfloat16, torch.float32)


class WeightHook:
    """Converts a layer's own weights and buffers by `Tensor.to` for its forward pass, and puts the originals back.

    Args:
        target: arguments of `torch.Tensor.to`.
    """

    def __init__(self, **target: Any) -> None:
        self.target = target
        self.saved: dict[str, Tensor] = {}

    def attach(self, layer: nn.Module) -> list[RemovableHandle]:
        """Register the hooks; of several on one layer, the last to convert is the first to put back."""
        after = layer.register_forward_hook(self.post_forward, prepend=True, always_call=True)
        return [layer.register_forward_pre_hook(self.pre_forward), after]

    def pre_forward(self, layer: nn.Module, args: object) -> None:
        """Convert the weights."""
        for name, tensor in own_tensors(layer):
            self.saved[name] = tensor.data
            tensor.data = tensor.data.to(**self.target)

    def post_forward(self, layer: nn.Module, args: object, output: object) -> None:
        """Put the weights back."""
        for name, tensor in own_tensors(layer):
            tensor.data = self.saved.pop(name)


def own_tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """List a layer's own parameters and buffers, without those of its children."""
    return [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]


def enable_layerwise_casting(
    network: Any,
    storage_dtype: torch.dtype = torch.float8_e4m3fn,
    compute_dtype: torch.dtype | None = None,
    skip_modules_pattern: str | tuple[str, ...] | None = None,
    skip_modules_classes: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    non_blocking: bool = False,
) -> None:
    """Store a network's weights in fewer bits than they compute in: float8 takes half of float16's memory.

    It cannot be undone, since digits are lost. The network cannot be cast afterwards, and is neither compiled nor
    captured; adapters are rounded to what they are merged into. For inference only.

    Args:
        network: a network of this package.
        storage_dtype: in which the weights are stored, one of STORAGE.
        compute_dtype: in which they compute, one of COMPUTE; their present dtype if None.
        skip_modules_pattern: patterns, searched in the names of layers and of what they are in, of what stays as it is;
            SKIPPED if None.
        skip_modules_classes: classes of what stays as it is.
        non_blocking: see `torch.Tensor.to`.

    Raises:
        ValueError: a dtype is not one of those, or none would be narrower; it is on already; or no layer is cast.
    """
    compute = network.dtype if compute_dtype is None else compute_dtype
    for name, dtype, known in (("storage_dtype", storage_dtype, STORAGE), ("compute_dtype", compute, COMPUTE)):
        if dtype not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {dtype!r}")
    if storage_dtype.itemsize >= compute.itemsize:
        raise ValueError(f"storage_dtype must be narrower than compute_dtype, got {storage_dtype} and {compute}")
    stored = network.storage_dtype
    if stored is not None:
        raise ValueError(f"weights are stored in {stored} already; reload the network to choose another dtype")
    names = (skip_modules_pattern,) if isinstance(skip_modules_pattern, str) else skip_modules_pattern
    layers = list(castable(network, SKIPPED if names is None else tuple(names), skip_modules_classes or ()))
    if not layers:
        raise ValueError("skip_modules_pattern and skip_modules_classes leave no layer to cast; name fewer")
    network.to(compute)
    for layer in layers:
        layer.to(storage_dtype)
        WeightHook(dtype=compute, non_blocking=non_blocking).attach(layer)
    network._storage_dtype, network._compute_dtype = storage_dtype, compute


def refuse_to_cast(network: Any, function: Any) -> None:
    """Refuse to cast a network whose weights are stored in fewer bits than they compute in.

    Args:
        network: about to be changed.
        function: tensor -> tensor, applied to each weight.

    Raises:
        ValueError: it changes the dtype of what is stored.
    """
    stored = network._storage_dtype
    if stored is not None and function(torch.empty(0, dtype=stored)).dtype != stored:
        raise ValueError(f"weights are stored in {stored} and cannot be cast again; reload the network")


def castable(
    network: nn.Module, names: tuple[str, ...], classes: type[nn.Module] | tuple[type[nn.Module], ...]
) -> Iterator[nn.Module]:
    """List the layers whose weights may be stored in a narrow dtype.

    Args:
        network: whose layers.
        names: patterns of what is left out, searched in the names of layers and of all that they are in.
        classes: likewise.
    """
    left_out: set[nn.Module] = set()
    for name, layer in network.named_modules():
        if layer in left_out or isinstance(layer, classes):
            left_out.update(layer.children())
        elif isinstance(layer, CASTABLE):
            inside = accumulate(name.split("."), "{}.{}".format)
            if not any(re.search(pattern, place) for place in inside for pattern in names):
                yield layer
