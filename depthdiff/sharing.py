"""A network with some other weights for one call, which shares everything else, while others use the network itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


def with_weights(network: AnyNetwork, weights: Mapping[str, Tensor]) -> AnyNetwork:
    """Return a network whose named weights are others; the given network stays as it is.

    Args:
        network: whose modules are copied, and whose other weights, buffers and hooks are shared.
        weights: key of a parameter -> tensor of its shape.

    Raises:
        KeyError: a key that the network does not have.
    """
    copies: dict[nn.Module, nn.Module] = {}
    twin = _copy(network, copies)
    for key, tensor in weights.items():
        path, _, name = key.rpartition(".")
        twin.get_submodule(path)._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return twin


def _copy(module: AnyNetwork, copies: dict[nn.Module, nn.Module]) -> AnyNetwork:
    """Copy a module and those in it, each once; a module that is in two places stays one."""
    if module not in copies:
        twin = copies[module] = copy.copy(module)
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {
            name: None if child is None else _copy(child, copies) for name, child in module._modules.items()
        }
    return copies[module]  # type: ignore[return-value]
