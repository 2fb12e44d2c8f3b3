"""What a call holds while it runs and what it returns.

Letters: B pictures, L tokens, C their channels, H and W height and width in pixels, h and w in latents.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from PIL import Image
from torch import Generator, Tensor

from depthdiff.checks import check_generators, check_number, check_tensor, show
from depthdiff.config import Output
from depthdiff.inputs import LARGEST_SCALE
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.sampler import Step
from depthdiff.schedulers.plan import Plan
from depthdiff.shortcuts import Shortcuts

P = ParamSpec("P")
R = TypeVar("R")
StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]
"""(pipeline, index, timestep, tensors by name) -> the tensors to replace; diffusers' `callback_on_step_end`."""


@dataclass
class StableDiffusionPipelineOutput(Output):
    """What a call returns.

    Attributes:
        images: B PIL images, an array (B, H, W, 3) in [0, 1], or a tensor, as `output_type` says.
        nsfw_content_detected: None: no safety check runs.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None = None


class CallState(threading.local):
    """What a pipeline says of the present call, or the last one, of the thread that asks.

    Attributes:
        guidance_scale: of the call.
        clip_skip: of the call.
        num_timesteps: how many times it runs the UNet.
        depth: how many calls are under way, one within a callback of the other.
    """

    guidance_scale: float = 7.5
    clip_skip: int | None = None
    num_timesteps: int = 0
    depth: int = 0

    def begin(self, guidance_scale: float, clip_skip: int | None, num_timesteps: int) -> None:
        """Take over what the call that begins was given."""
        self.guidance_scale, self.clip_skip, self.num_timesteps = guidance_scale, clip_skip, num_timesteps

    def __reduce__(self) -> tuple[type[CallState], tuple[()]]:
        return CallState, ()


def keeps_the_outer_call(call: Callable[P, R]) -> Callable[P, R]:
    """Let a call within a callback of another leave what the pipeline says of the other."""

    @wraps(call)
    def keeping(*args: P.args, **kwargs: P.kwargs) -> R:
        state: CallState = args[0]._call  # type: ignore[attr-defined]
        before = state.guidance_scale, state.clip_skip, state.num_timesteps
        state.depth += 1
        try:
            return call(*args, **kwargs)
        finally:
            state.depth -= 1
            if state.depth:
                state.begin(*before)

    return keeping


@dataclass
class Run:
    """Everything that a run needs once it is prepared; assign to a field to change the course of the run.

    Attributes:
        plan: the scheduler's steps, already cut by the strength.
        latents: (B, 4, h, w), as noisy as the next step expects.
        context: (B, L, C), the prompts; with guidance (2B, L, C), the negative ones first.
        depth: (B, 1, h, w) in [-1, 1], near is large; with guidance it may be (2B, 1, h, w), one for each prompt, and
            then what both halves of guidance have in common is computed twice.
        guidance_scale: guidance is on above 1.
        generator: for schedulers that add noise on the way.
        lora_scale: times the weights of the active adapters.
        shortcuts: what is left out for speed, as it stands when the run starts.
    """

    plan: Plan
    latents: Tensor
    context: Tensor
    depth: Tensor
    guidance_scale: float
    generator: Generator | Sequence[Generator] | None
    lora_scale: float = 1.0
    shortcuts: Shortcuts = field(default_factory=Shortcuts)

    def __len__(self) -> int:
        return len(self.plan)


def call_back(function: StepCallback, names: Sequence[str], pipeline: Any, run: Run, step: Step) -> None:
    """Hand a finished step to diffusers' kind of callback, and take over what it returns.

    Args:
        function: the callback.
        names: of the tensors it wants to see.
        pipeline: its first argument, whose `_guidance_scale` it may change.
        run: whose context and depth it may replace.
        step: whose latents it may replace.

    Raises:
        TypeError: it returns neither a dict nor None, or sets a guidance scale that is no number.
        ValueError: it sets a guidance scale out of range.
    """
    tensors = {
        "latents": step.latents,
        "prompt_embeds": run.context,
        "negative_prompt_embeds": run.context.chunk(2)[0] if run.guidance_scale > 1 else None,
        "depth_mask": run.depth,
    }
    replaced = function(pipeline, step.index, step.timestep, {name: tensors[name] for name in names})
    if replaced is None:
        replaced = {}
    if not isinstance(replaced, Mapping):
        raise TypeError(f"callback_on_step_end must return a dict of tensors by name, or None, got {show(replaced)}")
    step.latents = replaced.get("latents", step.latents)
    run.context = replaced.get("prompt_embeds", run.context)
    run.depth = replaced.get("depth_mask", run.depth)
    run.guidance_scale = check_number("guidance_scale", pipeline.guidance_scale, 0, LARGEST_SCALE)


def check_run(run: object) -> None:
    """Refuse what is not a prepared run, or one whose fields were replaced by something else.

    Raises:
        TypeError: always names the field.
        ValueError: a number out of range.
    """
    if not isinstance(run, Run):
        raise TypeError(f"run must be what `prepare` returns, got {show(run)}")
    for name, part, kind in (("plan", run.plan, Plan), ("shortcuts", run.shortcuts, Shortcuts)):
        if not isinstance(part, kind):
            raise TypeError(f"{name} of a run must be a {kind.__name__}, got {show(part)}")
    check_generators("generator", run.generator)
    run.lora_scale = check_number("lora_scale", run.lora_scale, -LARGEST_SCALE, LARGEST_SCALE)
    check_tensor("latents", run.latents, "(B, 4, h, w)", 4)


def check_tensors(run: Run, latents: Tensor, unet: UNet2DConditionModel) -> None:
    """Refuse tensors of a run, which the caller may have replaced, that fit neither each other nor the UNet.

    Args:
        run: whose context and depth.
        latents: of the present step.
        unet: reads them.

    Raises:
        TypeError: no tensor, or a guidance scale that is no number.
        ValueError: names the tensor, its shape or dtype, and what it must be.
    """
    run.guidance_scale = check_number("guidance_scale", run.guidance_scale, 0, LARGEST_SCALE)
    guided, (batch, channels, height, width) = run.guidance_scale > 1, latents.shape
    if channels != unet.config.in_channels - 1:
        raise ValueError(f"latents must have {unet.config.in_channels - 1} channels, got {channels}")
    for name, tensor, form in (("context", run.context, "(B, L, C)"), ("depth", run.depth, "(B, 1, h, w)")):
        check_tensor(name, tensor, form, form.count(",") + 1)
        if tensor.dtype != unet.dtype or tensor.device != latents.device:
            raise ValueError(
                f"{name} must be {unet.dtype} on {latents.device}, as the unet and the latents are, got {tensor.dtype} "
                f"on {tensor.device}; bring it there with .to"
            )
    wanted, each = (2 * batch, "two") if guided else (batch, "one")
    if len(run.context) != wanted:
        rows = "row" if wanted == 1 else "rows"
        raise ValueError(
            f"context must have {wanted} {rows}, {each} for each of the latents, got {len(run.context)}; with guidance "
            f"it is the negative prompts and then the prompts, without it the prompts alone"
        )
    reads = max(unet.config.per_level("cross_attention_dim"))
    if run.context.shape[2] != reads:
        raise ValueError(f"context must be {reads} wide, which this UNet reads, got {run.context.shape[2]}")
    if len(run.depth) not in (batch, wanted) or run.depth.shape[1:] != (1, height, width):
        raise ValueError(
            f"depth must be {(batch, 1, height, width)} as the latents{', or twice that' if guided else ''}, got "
            f"{tuple(run.depth.shape)}"
        )
