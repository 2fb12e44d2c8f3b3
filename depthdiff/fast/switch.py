"""Switches of the fast computations, and a report on where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from depthdiff.fast.attention import fast_attention
from depthdiff.fast.calls import Computation, FastCall, chain, find, is_bare, put_on, take_off
from depthdiff.fast.convolution import fast_conv3x3, fast_upsample
from depthdiff.fast.guidance import fast_unet
from depthdiff.fast.linear import fast_feed_forward
from depthdiff.fast.tiled import fast_decoder, fast_downsample, fast_encoder, fast_resnet
from depthdiff.models.attention import Attention
from depthdiff.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from depthdiff.models.transformer import FeedForward
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.models.vae import Decoder, Encoder

COMPUTATIONS: dict[type[nn.Module], Computation] = {
    Attention: fast_attention,
    Decoder: fast_decoder,
    Downsample2D: fast_downsample,
    Encoder: fast_encoder,
    FeedForward: fast_feed_forward,
    nn.Conv2d: fast_conv3x3,
    ResnetBlock2D: fast_resnet,
    UNet2DConditionModel: fast_unet,
    Upsample2D: fast_upsample,
}
"""Class -> its fast computation."""

OURS = "depthdiff.models."


def enable(target: Any) -> None:
    """Put the fast computations on a network of this package, or on all networks of a pipeline.

    What `module.compile()` was called on keeps that. A pipeline puts them on what it is assigned later, too.

    Args:
        target: a pipeline, a network, or a layer.

    Raises:
        TypeError: something else.
    """
    for module in _modules(target):
        if type(module) in COMPUTATIONS and find(module, FastCall) is None and _is_ours(chain(module)):
            put_on(module, FastCall(module, COMPUTATIONS[type(module)]))
    _note(target, True)


def disable(target: Any) -> None:
    """Take the fast computations off a pipeline, a network or a layer, which are then as if they never had them.

    Convolutions keep the order in memory that `lay_out` chose.

    Args:
        target: as that of `enable`.

    Raises:
        TypeError: something else.
    """
    for module in _modules(target):
        take_off(module, FastCall)
    _note(target, False)


def report(target: Any) -> dict[str, str]:
    """Count by class how many modules have a fast computation, and why others do not use theirs.

    A call decides once more: no fast computation runs under autocast, tracing or gradients.

    Args:
        target: as that of `enable`.

    Returns:
        Class -> a line such as "32 on" or "31 on; 1 not: hooks or another forward".

    Raises:
        TypeError: something else.
    """
    counts: dict[str, Counter[str]] = {}
    for module in _modules(target):
        if isinstance(module, tuple(COMPUTATIONS)):
            counts.setdefault(type(module).__name__, Counter())[_state(module)] += 1
    return {kind: "; ".join(f"{count} {state}" for state, count in found.items()) for kind, found in counts.items()}


def networks_of(target: Any) -> list[nn.Module]:
    """List the networks of a pipeline; a module is the only one of itself.

    Raises:
        TypeError: neither.
    """
    if isinstance(target, nn.Module):
        return [target]
    networks = getattr(target, "networks", None)
    if not isinstance(networks, dict):
        raise TypeError(f"target must be a pipeline of depthdiff or a module, got {type(target).__name__}")
    return list(networks.values())


def _modules(target: Any) -> Iterator[nn.Module]:
    """List the modules within networks of this package; of another package's, those that are of this one."""
    listed: set[nn.Module] = set()
    for network in networks_of(target):
        roots = [network] if network is target else []
        roots += [part for part in network.modules() if any(k.__module__.startswith(OURS) for k in type(part).__mro__)]
        for root in roots:
            if root not in listed:
                parts = [part for part in root.modules() if part not in listed]
                listed.update(parts)
                yield from parts


def _is_ours(calls: list[Any]) -> bool:
    """Return whether nobody else has put a call on a module."""
    return all(hasattr(call, "rank") for call in calls)


def _note(target: Any, on: bool) -> None:
    """Set whether components that are assigned to a pipeline later become fast."""
    if not isinstance(target, nn.Module):
        target._fast = on


def _state(module: nn.Module) -> str:
    """Describe whether a module's fast computation is on, or why it is not used."""
    if type(module) not in COMPUTATIONS:
        return "not: a subclass"
    if find(module, FastCall) is None:
        return "off" if _is_ours(chain(module)) else "not: compiled"
    devices = {parameter.device.type for parameter in module.parameters()} - {"cpu"}
    if devices:
        return f"not: on {', '.join(sorted(devices))}"
    return "on" if is_bare(module) else "not: hooks or another forward"
