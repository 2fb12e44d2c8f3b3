"""torch.compile on the networks of a pipeline, from outside."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.checks import brief, check_flag, show
from depthdiff.fast.calls import ModuleCall, chain, put_on, take_off
from depthdiff.fast.switch import networks_of

logger = logging.getLogger(__name__)

COMPILED = ("unet", "text_encoder")
"""Networks to compile, beside the autoencoder's two halves. The depth net runs once a picture: compiling it costs more
than it saves."""

MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
OWN_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which torch's compiler captures CUDA graphs itself, and reuses the memory of results."""


class CompiledCall(ModuleCall):
    """The call of a network through torch.compile; where layers have hooks, it is passed on.

    Args:
        network: whose call it is.
        options: of torch.compile.
    """

    rank = 1

    def __init__(self, network: nn.Module, options: dict[str, Any]) -> None:
        super().__init__(network)
        self.mode = options["mode"]
        self.forward = network.forward
        self.compiled: Callable[..., Any] = torch.compile(network.forward, **options)
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the network does."""
        if torch.compiler.is_compiling():
            return self.module._call_impl(*args, **kwargs)
        if not has_hooks(self.module) and self.module.forward == self.forward:
            self._warned = False
            result = self.compiled(*args, **kwargs)
            return cloned(result) if self.mode in OWN_GRAPHS else result
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s runs uncompiled: it has hooks, or another forward; offloading and layerwise casting set hooks",
                type(self.module).__name__,
            )
        return self.pass_on(*args, **kwargs)


def compile(
    pipe: Any,
    mode: str | None = None,
    fullgraph: bool = True,
    dynamic: bool | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Run the UNet, the text encoder and the autoencoder's halves through torch.compile, each from its next call on.

    Adapters may be loaded and unloaded, and `to` may move the networks. A second image size compiles once more, for any
    size if `dynamic` is None. A network with hooks (of sequential offloading or layerwise casting) runs uncompiled, and
    a warning says so; so does a call with `cross_attention_kwargs={"scale": ...}`, which works on a copy of the UNet.
    Copies of a pipeline, and components that it is assigned later, are not compiled.

    Args:
        pipe: a pipeline, or a network.
        mode: of torch.compile, such as "reduce-overhead" or "max-autotune".
        fullgraph: raise an error instead of compiling in parts.
        dynamic: True compiles for any size at once, False for each size separately.
        backend: of torch.compile.

    Raises:
        TypeError: `pipe` is neither, or an argument has another type.
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {brief(mode)}")
    if not isinstance(backend, str) and not callable(backend):
        raise TypeError(f"backend must be the name of a backend of torch.compile, or a function, got {show(backend)}")
    options = {"fullgraph": check_flag("fullgraph", fullgraph), "mode": mode, "backend": backend}
    options["dynamic"] = None if dynamic is None else check_flag("dynamic", dynamic)
    for network in _compiled_networks(pipe):
        if all(isinstance(call, ModuleCall) for call in chain(network)):
            put_on(network, CompiledCall(network, options))
        else:
            logger.warning("%s stays as module.compile() compiled it", type(network).__name__)


def uncompile(pipe: Any) -> None:
    """Run the networks of a pipeline, or a network, uncompiled again."""
    for network in _compiled_networks(pipe):
        take_off(network, CompiledCall)


def _compiled_networks(pipe: Any) -> list[nn.Module]:
    """List the networks of a pipeline, or the parts of a network, that are compiled each as a whole."""
    networks = networks_of(pipe)
    chosen = [network for network in networks if network is pipe or any(network is getattr(pipe, n) for n in COMPILED)]
    vae = pipe if isinstance(pipe, nn.Module) else pipe.vae
    halves = [getattr(vae, name, None) for name in ("encoder", "decoder")]
    if all(isinstance(half, nn.Module) for half in halves):
        chosen = [network for network in chosen if network is not vae] + [half for half in halves if half is not None]
    return chosen


def has_hooks(network: nn.Module) -> bool:
    """Return whether any layer of a network has hooks, which may do more than compute."""
    return any(
        layer._forward_hooks or layer._forward_pre_hooks or "_hf_hook" in vars(layer) for layer in network.modules()
    )


def cloned(result: Any) -> Any:
    """Copy the tensors of a network's result: a tensor, a tuple, or a record."""
    if isinstance(result, Tensor):
        return result.clone()
    if isinstance(result, (tuple, list)):
        return type(result)(map(cloned, result))
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        fields = {field.name: cloned(getattr(result, field.name)) for field in dataclasses.fields(result)}
        return type(result)(**fields)
    return result
