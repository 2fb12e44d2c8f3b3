"""What a call holds while it runs and what it returns.

Letters: B pictures, L tokens, C their channels, H and W height and width in pixels, h and w in latents.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Generator, Tensor

from depthdiff.config import Output
from depthdiff.sampler import Step
from depthdiff.schedulers.plan import Plan
from depthdiff.shortcuts import Shortcuts

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
    """

    guidance_scale: float = 7.5
    clip_skip: int | None = None
    num_timesteps: int = 0

    def __reduce__(self) -> tuple[type[CallState], tuple[()]]:
        return CallState, ()


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
    """
    tensors = {
        "latents": step.latents,
        "prompt_embeds": run.context,
        "negative_prompt_embeds": run.context.chunk(2)[0] if run.guidance_scale > 1 else None,
        "depth_mask": run.depth,
    }
    replaced = function(pipeline, step.index, step.timestep, {name: tensors[name] for name in names}) or {}
    step.latents = replaced.get("latents", step.latents)
    run.context = replaced.get("prompt_embeds", run.context)
    run.depth = replaced.get("depth_mask", run.depth)
    run.guidance_scale = pipeline.guidance_scale
