"""Half precision ends at 65504: a stage that overflows is run in float32, or named. No picture turns black silently.

Each stage is looked at once, after its work, and the UNet after its first step; looking at every step would make the
device wait for the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthdiff.devices import dtype_of
from depthdiff.sharing import with_weights

if TYPE_CHECKING:
    from depthdiff.run import Run, Step

logger = logging.getLogger(__name__)


def is_finite(x: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; waits for the device."""
    return bool(torch.isfinite(x).all())


def finite(stage: str, network: Any, work: Callable[[Any], Tensor], given: Tensor | None = None) -> Tensor:
    """Run a stage, and once more in float32 where its network's float16 overflows.

    Nothing is remembered: what a call returns depends on its inputs alone, not on the calls before it.

    Args:
        stage: its name, that of the network in the pipeline.
        network: that works in it.
        work: the stage, given the network; it casts its inputs to that one's dtype.
        given: what the stage starts from.

    Returns:
        What `work` returns, all finite; in float32 where that was needed.

    Raises:
        FloatingPointError: NaN or infinity in float32 as well, or already in `given`.
    """
    result = work(network)
    if is_finite(result):
        return result
    if given is not None:
        check_finite(given, f"what the {stage} is given")
    if dtype_of(network) != torch.float16 or getattr(network, "storage_dtype", None) is not None:
        raise FloatingPointError(_explain(f"the {stage}", dtype_of(network)))
    logger.warning(
        "the %s overflows in float16 and is run in float32; pipe.%s.float() saves the first try", stage, stage
    )
    return check_finite(work(in_float32(network)), f"the {stage}")


def in_float32(network: Any) -> Any:
    """Return a network with the same weights in float32; the given one stays as it is, for other calls as well."""
    return with_weights(network, {name: parameter.data.float() for name, parameter in network.named_parameters()})


def check_finite(x: Tensor, what: str) -> Tensor:
    """Return a tensor in which all is finite.

    Raises:
        FloatingPointError: NaN or infinity; names `what` they are in.
    """
    if not is_finite(x):
        raise FloatingPointError(_explain(what, x.dtype))
    return x


def check_first_step(step: Step, run: Run, dtype: torch.dtype) -> None:
    """Refuse a first step in which the UNet has spoilt the latents; later ones are not looked at.

    Args:
        step: just taken.
        run: what the UNet was given; named instead of the UNet where it is spoilt itself.
        dtype: of the UNet.

    Raises:
        FloatingPointError: NaN or infinity.
    """
    if step.index == 0 and not is_finite(step.latents):
        for name in ("latents", "prompt_embeds", "depth"):
            check_finite(getattr(run, name), f"the {name} that the unet is given")
        raise FloatingPointError(_explain("the unet", dtype))


def _explain(what: str, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        remedy = "load with torch_dtype=torch.bfloat16 or torch.float32, whose range is larger"
    else:
        remedy = "its weights are damaged, were too large for float16 when they were cast, or an adapter is too strong"
    return f"{what} holds NaN or infinity in {name}: {remedy}"
