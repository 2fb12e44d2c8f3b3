"""Weights that are something else while their layer works: on another device, or in a wider dtype than they lie in."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CASTABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)
"""Layers whose weights may lie in a narrow dtype; norms are small, and need their digits."""

SKIPPED = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
"""Names of layers that keep their dtype unless others are named. Source: diffusers, hooks/layerwise_casting.py."""


def visit(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Make a layer's own weights what `change` makes of them before it works, and what they were after it."""
    at_home: dict[str, Tensor] = {}

    def go(module: nn.Module, args: object) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            at_home[name] = parameter.data
            parameter.data = change(parameter.data)

    def come_back(module: nn.Module, args: object, output: object) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = at_home.pop(name)

    return [layer.register_forward_pre_hook(go), layer.register_forward_hook(come_back, always_call=True)]


def cast_layerwise(
    network: nn.Module,
    name_of: Callable[[str], str],
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skipped_names: tuple[str, ...],
    skipped_classes: tuple[type[nn.Module], ...] = (),
    non_blocking: bool = False,
) -> int:
    """Let the weights of layers lie in `storage_dtype`, and be `compute_dtype` while they work.

    Args:
        network: whose layers.
        name_of: our name of a layer -> the name that `skipped_names` means.
        storage_dtype: such as torch.float8_e4m3fn.
        compute_dtype: of the network's work.
        skipped_names: patterns, searched in names, of layers that stay as they are.
        skipped_classes: likewise.
        non_blocking: see `torch.Tensor.to`.

    Returns:
        How many layers were cast.
    """
    count = 0
    for name, layer in network.named_modules():
        if not isinstance(layer, CASTABLE) or isinstance(layer, skipped_classes):
            continue
        if not any(re.search(pattern, name_of(name)) for pattern in skipped_names):
            layer.to(storage_dtype)
            visit(layer, lambda weight: weight.to(compute_dtype, non_blocking=non_blocking))
            count += 1
    return count
