"""What a pipeline's components must be able to do, and where they may be moved."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch

from depthdiff.checks import show

NEEDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "vae": ("AutoencoderKL", ("config", "encode", "decode")),
    "text_encoder": ("CLIPTextModel", ("config", "__call__")),
    "tokenizer": ("CLIPTokenizer", ("__call__", "decode", "model_max_length")),
    "unet": ("UNet2DConditionModel", ("config", "__call__")),
    "scheduler": ("scheduler", ("config", "set_timesteps", "scale_model_input", "step", "add_noise")),
    "depth_estimator": ("DPTForDepthEstimation", ("config", "__call__", "parameters")),
    "feature_extractor": ("DPTImageProcessor", ("__call__",)),
}
"""Component -> its class, and what of that is used."""

FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial)
"""What counts as a function; of any other object its `__call__` does."""

MEMORY_FORMATS = (None, torch.contiguous_format, torch.preserve_format, torch.channels_last)


def is_function(part: object) -> bool:
    """Return whether a depth estimator is a plain function, which needs no image processor and cannot be saved."""
    return isinstance(part, FUNCTIONS)


def check_part(name: str, part: object) -> None:
    """Refuse what cannot be a component; None is looked at when a call needs it.

    A `depth_estimator` may also be a plain function, from an RGB image to its disparity (H, W).

    Raises:
        TypeError: names the component and what it lacks.
    """
    kind, uses = NEEDED[name]
    lacks = ", ".join(one for one in uses if not hasattr(part, one) or isinstance(part, type))
    if name == "depth_estimator" and is_function(part):
        return
    if part is not None and lacks:
        function = ", or be a function" if name == "depth_estimator" else ""
        raise TypeError(f"{name} must be a {kind} or work like one{function}, got {show(part)} without {lacks}")


def parse_move(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, bool, Any]:
    """Read the arguments of `torch.nn.Module.to`: device, dtype, whether to wait, and memory format.

    Raises:
        TypeError: no such arguments, or an unknown device.
    """
    for name, value in [*((f"argument {i}", value) for i, value in enumerate(args, 1)), *kwargs.items()]:
        if not isinstance(value, (str, torch.device, torch.dtype, torch.memory_format, torch.Tensor, bool, type(None))):
            raise TypeError(f"{name} of `to` must be a device, a dtype or a tensor, got {show(value)}")
    try:
        return torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError, ValueError) as error:
        found = ", ".join([*map(show, args), *(f"{name}={show(value)}" for name, value in kwargs.items())])
        raise TypeError(
            f"`to` takes a device, a dtype or both, non_blocking and memory_format, got {found or 'nothing'}"
        ) from error
