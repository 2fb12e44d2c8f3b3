"""A network with some other weights for one call, which shares everything else, while others use the network itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


def with_weights(network: AnyNetwork, weights: Mapping[str, Tensor]) -> AnyNetwork:
    """Return a network whose named weights are others; the given network stays as it is.

    Args:
        network: whose modules are copied, and whose other weights, buffers and hooks are shared; of what
            `torch.compile` returns, the network within. Methods that were put on its modules are bound to the copies.
        weights: key of a parameter -> tensor of its shape.

    Raises:
        KeyError: a key that the network does not have.
    """
    copies: dict[nn.Module, nn.Module] = {}
    twin = _copy(uncompiled(network), copies)
    for one in copies.values():
        vars(one).update({name: _rebound(value, copies) for name, value in vars(one).items()})
    for key, tensor in weights.items():
        owner, name = _owner(twin, key)
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return twin


def uncompiled(network: AnyNetwork) -> AnyNetwork:
    """Return the network within what `torch.compile` returns; others as they are."""
    return network._modules.get("_orig_mod", network) if isinstance(network, nn.Module) else network  # type: ignore[return-value]


def _owner(network: nn.Module, key: str) -> tuple[nn.Module, str]:
    """Find the module that holds a parameter, and its name there; PEFT's layer holds the one that it stands for."""
    path, _, name = key.rpartition(".")
    try:
        module = network.get_submodule(path)
    except AttributeError as error:
        raise KeyError(f"{type(network).__name__} has no {key}") from error
    while name not in module._parameters and isinstance(module._modules.get("base_layer"), nn.Module):
        module = module.get_submodule("base_layer")
    if name not in module._parameters:
        raise KeyError(f"{type(network).__name__} has no {key}")
    return module, name


def _rebound(value: Any, copies: dict[nn.Module, nn.Module]) -> Any:
    """Bind a method, or a function with arguments, to the copies of the modules that it is bound to."""
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, copies.get(value.__self__, value.__self__))
    if isinstance(value, partial):
        bound = [copies.get(one, one) if isinstance(one, nn.Module) else one for one in value.args]
        return partial(_rebound(value.func, copies), *bound, **value.keywords)
    return value


def _copy(module: AnyNetwork, copies: dict[nn.Module, nn.Module]) -> AnyNetwork:
    """Copy a module and those in it, each once; a module that is in two places stays one."""
    if module not in copies:
        twin = copies[module] = copy.copy(module)
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {
            name: None if child is None else _copy(child, copies) for name, child in module._modules.items()
        }
    return copies[module]  # type: ignore[return-value]
