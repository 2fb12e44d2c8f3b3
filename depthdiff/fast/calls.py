"""Where fast computations are put: in the place of a module's call where torch keeps that of `module.compile()`.

torch calls `module._compiled_call_impl` instead of hooks and `forward`, leaves it out when a module is copied or
pickled, and does not see it when it traces, compiles or exports the module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from depthdiff.fast.attention import fast_attention
from depthdiff.fast.convolution import fast_conv3x3, fast_upsample
from depthdiff.fast.eligible import is_bare
from depthdiff.fast.guidance import fast_unet
from depthdiff.fast.linear import fast_clip_mlp, fast_feed_forward
from depthdiff.fast.tiled import fast_decoder, fast_downsample, fast_encoder, fast_resnet
from depthdiff.models.attention import Attention
from depthdiff.models.base import Network
from depthdiff.models.clip import CLIPMLP
from depthdiff.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from depthdiff.models.transformer import FeedForward
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.models.vae import Decoder, Encoder

Computation = Callable[..., Tensor]

COMPUTATIONS: dict[type[nn.Module], Computation] = {
    Attention: fast_attention,
    CLIPMLP: fast_clip_mlp,
    Decoder: fast_decoder,
    Downsample2D: fast_downsample,
    Encoder: fast_encoder,
    FeedForward: fast_feed_forward,
    nn.Conv2d: fast_conv3x3,
    ResnetBlock2D: fast_resnet,
    UNet2DConditionModel: fast_unet,
    Upsample2D: fast_upsample,
}
"""Class -> its fast computation: (module, *arguments of its call) -> the result, or NotImplemented."""


class FastCall:
    """The call of a module with a fast computation on it.

    Args:
        module: whose call it is.
        compute: its fast computation.
    """

    def __init__(self, module: nn.Module, compute: Computation) -> None:
        self.module, self.compute = module, compute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the fast way, or the plain way where that may differ."""
        module = self.module
        if is_bare(module):
            result = self.compute(module, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return module._call_impl(*args, **kwargs)


def enable(target: Any) -> None:
    """Put the fast computations on a network of this package, or on all networks of a pipeline.

    A module that is compiled stays so.
    """
    for module in _modules(target):
        if module._compiled_call_impl is None and type(module) in COMPUTATIONS:
            module._compiled_call_impl = FastCall(module, COMPUTATIONS[type(module)])


def disable(target: Any) -> None:
    """Take the fast computations off a network, or off all networks of a pipeline."""
    for module in _modules(target):
        if isinstance(module._compiled_call_impl, FastCall):
            module._compiled_call_impl = None


def report(target: Any) -> dict[str, str]:
    """List by class how many modules have a fast computation, and why others will not use theirs.

    Args:
        target: a network or a pipeline.

    Returns:
        Class -> a line such as "32 on" or "31 on, 1 not: hooks".
    """
    counts: dict[str, Counter[str]] = {}
    for module in _modules(target):
        if any(isinstance(module, kind) for kind in COMPUTATIONS):
            counts.setdefault(type(module).__name__, Counter())[_state(module)] += 1
    return {kind: ", ".join(f"{count} {state}" for state, count in found.items()) for kind, found in counts.items()}


def _state(module: nn.Module) -> str:
    """Say whether a module's fast computation is on, or why it will not be used."""
    if not isinstance(module._compiled_call_impl, FastCall):
        if type(module) not in COMPUTATIONS:
            return "not: a subclass"
        return "off" if module._compiled_call_impl is None else "not: compiled"
    return "on" if is_bare(module) else "not: hooks, or another forward"


def _modules(target: Any) -> Iterator[Any]:
    """List the modules of a network of this package, or of all of a pipeline's."""
    networks = [target] if isinstance(target, nn.Module) else list(target.networks.values())
    for network in networks:
        if isinstance(network, Network):
            yield from network.modules()
