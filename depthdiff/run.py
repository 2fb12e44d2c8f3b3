"""A prepared run and its steps, and what a call returns.

Letters: B pictures, L tokens, C their channels, H and W height and width in pixels, h and w in latents.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from depthdiff.approximations import Approximations
from depthdiff.checks import check_dense, check_generators, check_number, check_tensor, nearest, show
from depthdiff.config import BaseOutput
from depthdiff.devices import dtype_of
from depthdiff.inputs import check_scales, is_guided, read_guidance, widths_read
from depthdiff.interruption import Stop
from depthdiff.masks import Kept
from depthdiff.schedulers.exponential import ExponentialSchedulerMixin
from depthdiff.schedulers.schedule import predict_x0

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]
"""(pipeline, index, timestep, tensors by name) -> the tensors to replace; diffusers' `callback_on_step_end`."""


@dataclass
class StableDiffusionPipelineOutput(BaseOutput):
    """Result of a call.

    Attributes:
        images: B PIL images, an array (B, H, W, 3) in [0, 1], or a tensor, as `output_type` says.
        nsfw_content_detected: always None: there is no safety checker.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None = None

    def _repr_png_(self) -> bytes | None:
        """Show PIL images side by side in a notebook."""
        if not isinstance(self.images, list) or not self.images:
            return None
        sheet = Image.new("RGB", (sum(image.width for image in self.images), max(one.height for one in self.images)))
        left = 0
        for image in self.images:
            sheet.paste(image, (left, 0))
            left += image.width
        file = io.BytesIO()
        sheet.save(file, "PNG")
        return file.getvalue()


def step_kwargs(scheduler: Any, generator: Any, eta: float) -> dict[str, Any]:
    """Return `eta` and `generator`, as far as the scheduler's `step` accepts them."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}


@dataclass
class Run:
    """Everything that a run needs once it is prepared; assign to a field to change the run.

    `generator` and `eta` are read when `denoise` starts, as are `scheduler` and `timesteps`; the other fields are read
    again at every step.

    Attributes:
        scheduler: the run's own copy of the pipeline's, with its timesteps set.
        timesteps: (steps,), what the UNet sees, already cut by the strength.
        num_inference_steps: steps that are run, PNDM's second call for its first step aside.
        latents: (B, 4, h, w), as noisy as the next step expects.
        prompt_embeds: (B, L, C), the prompts; with guidance (2B, L, C), the negative ones first.
        depth: (B, 1, h, w) in [-1, 1], near is large; with guidance (2B, 1, h, w), once for each prompt.
        guidance_scale: guidance is on above 1; one, or one a picture. `prompt_embeds` must match when it turns off.
        generator: for schedulers that add noise on the way.
        eta: noise added on the way, for DDIM.
        cross_attention_kwargs: for the attention processors; "scale" multiplies the active adapters.
        approximations: what is left out for speed.
        guidance_rescale: share of the deviation to bring back, see `depthdiff.guidance.rescale_guidance`.
        seamless: axes along which the pictures repeat: "", "x", "y" or "xy".
        windows: (size, stride) in latents, of which the UNet sees one at a time; None for the whole.
        kept: what stays of the image outside a mask; None where there is no mask.
        stop: whether the run is asked to stop.
    """

    scheduler: Any
    timesteps: Tensor
    num_inference_steps: int
    latents: Tensor
    prompt_embeds: Tensor
    depth: Tensor
    guidance_scale: float | tuple[float, ...]
    generator: Generator | Sequence[Generator] | None = None
    eta: float = 0.0
    cross_attention_kwargs: dict[str, Any] | None = None
    approximations: Approximations = field(default_factory=Approximations)
    guidance_rescale: float = 0.0
    seamless: str = ""
    windows: tuple[int, int] | None = None
    kept: Kept | None = None
    stop: Stop = field(default_factory=Stop)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def order(self) -> int:
        """Calls of the UNet for each step but the last."""
        return int(getattr(self.scheduler, "order", 1))

    @property
    def shapes_the_picture(self) -> bool:
        """Whether `decode` needs to know the run beside its latents."""
        return self.kept is not None or bool(self.seamless) or self.windows is not None

    def ends_step(self, index: int) -> bool:
        """Return whether a step's last call is that at an index; as in diffusers, PNDM's extra call ends none."""
        extra = len(self) - self.num_inference_steps * self.order
        return index == len(self) - 1 or (index + 1 > extra and (index + 1) % self.order == 0)

    def guides(self, timestep: Tensor) -> bool:
        """Return whether a step uses guidance: where it is on, and its interval holds the timestep."""
        if not is_guided(self.guidance_scale) or self.approximations.guidance_interval == (0.0, 1.0):
            return is_guided(self.guidance_scale)
        return self.approximations.guides(float(timestep) / self.scheduler.config.num_train_timesteps)

    def add_noise(self, clean: Tensor, noise: Tensor, index: int = 0) -> Tensor:
        """Make clean latents (B, 4, h, w) as noisy as a step of this run expects them.

        Args:
            clean: (B, 4, h, w).
            noise: (B, 4, h, w), unit normal.
            index: of the step, from 0; as many as there are steps leaves them clean.
        """
        if check_number("index", index, 0, len(self), whole=True) == len(self):
            return clean
        timestep = self.timesteps[index : index + 1].repeat(len(clean))
        scheduler = self.scheduler
        if hasattr(scheduler, "set_begin_index"):  # such schedulers go by the step's index, not by the timestep
            scheduler = copy.copy(scheduler)
            scheduler.set_begin_index(len(scheduler.timesteps) - len(self) + index)
        return scheduler.add_noise(clean, noise, timestep)

    def with_kept(self, latents: Tensor, index: int) -> Tensor:
        """Put what is kept of the image into latents (B, 4, h, w), as noisy as a step expects them."""
        if self.kept is None:
            return latents
        return self.kept.put_back(latents, self.add_noise(self.kept.clean, self.kept.noise, index))


@dataclass
class Step:
    """One finished step of a run.

    Attributes:
        index: of the step, from 0.
        timestep: what the UNet saw, a tensor without dimensions.
        latents: (B, 4, h, w), what the next step starts from; assign to it to change the course of the run.
        denoised: (B, 4, h, w), the clean latents as predicted at this step; None where the scheduler does not tell.
    """

    index: int
    timestep: Tensor
    latents: Tensor
    denoised: Tensor | None


def call_back(function: StepCallback, names: Sequence[str], pipeline: Any, run: Run, step: Step) -> None:
    """Call a callback in the style of diffusers, and apply the tensors that it returns.

    Args:
        function: the callback.
        names: of the tensors that it is given.
        pipeline: its first argument, whose `_guidance_scale` it may change.
        run: whose embeddings and depth it may replace.
        step: whose latents it may replace.

    Raises:
        TypeError: it returns neither a dict nor None, or sets a guidance scale that is not a number.
        ValueError: it sets a guidance scale out of range.
    """
    tensors = {
        "latents": step.latents,
        "prompt_embeds": run.prompt_embeds,
        "negative_prompt_embeds": run.prompt_embeds.chunk(2)[0] if is_guided(run.guidance_scale) else None,
        "depth_mask": run.depth,
    }
    replaced = function(pipeline, step.index, step.timestep, {name: tensors[name] for name in names})
    if replaced is None:
        replaced = {}
    if not isinstance(replaced, Mapping):
        raise TypeError(f"callback_on_step_end must return a dict of tensors by name, or None, got {show(replaced)}")
    for name in replaced.keys() - tensors.keys():
        raise TypeError(f"callback_on_step_end returned an unknown tensor {name!r}{nearest(name, tensors)}")
    step.latents = replaced.get("latents", step.latents)
    negative = replaced.get("negative_prompt_embeds")  # as in diffusers, `prompt_embeds` holds both halves and wins
    if negative is not None and is_guided(run.guidance_scale) and "prompt_embeds" not in replaced:
        replaced = {**replaced, "prompt_embeds": _with_negative(run.prompt_embeds, negative)}
    run.prompt_embeds = replaced.get("prompt_embeds", run.prompt_embeds)
    run.depth = replaced.get("depth_mask", run.depth)
    run.guidance_scale = read_guidance(pipeline.guidance_scale)


def _with_negative(both: Tensor, value: object) -> Tensor:
    """Replace the negative half of the embeddings (2B, L, C) of guidance."""
    _, positive = both.chunk(2)
    negative = check_tensor("negative_prompt_embeds", value, "(B, L, C)", 3)
    if negative.shape != positive.shape:
        raise ValueError(
            f"callback_on_step_end returned negative_prompt_embeds of shape {tuple(negative.shape)}, expected "
            f"{tuple(positive.shape)}, that of the embeddings of the prompt"
        )
    return torch.cat([negative.to(positive), positive])


def check_run(run: object) -> None:
    """Check that a run comes from `prepare`, and that its fields still have valid types.

    Raises:
        TypeError: names the field.
        ValueError: `latents` has another number of dimensions than 4.
    """
    if not isinstance(run, Run):
        raise TypeError(f"run must be what `prepare` returns, got {show(run)}")
    if not isinstance(run.approximations, Approximations):
        raise TypeError(f"approximations of a run must be Approximations, got {show(run.approximations)}")
    check_generators("generator", run.generator)
    if not isinstance(run.timesteps, Tensor):
        raise TypeError(f"timesteps of a run must be a tensor (steps,), got {show(run.timesteps)}")
    check_dense("timesteps", run.timesteps)
    check_tensor("latents", run.latents, "(B, 4, h, w)", 4)
    if not hasattr(run.scheduler, "step"):
        raise TypeError(f"scheduler of a run must have step, got {show(run.scheduler)}")


def check_tensors(run: Run, latents: Tensor, unet: Any) -> None:
    """Refuse tensors of a run, which the caller may have replaced, that fit neither each other nor the UNet.

    Args:
        run: whose embeddings and depth.
        latents: of the present step.
        unet: reads them.

    Raises:
        TypeError: not a tensor, or a guidance scale that is not a number.
        ValueError: names the tensor, its shape or dtype, and what it must be.
    """
    run.guidance_scale = read_guidance(run.guidance_scale)
    check_tensor("latents", latents, "(B, 4, h, w)", 4)
    check_scales(run.guidance_scale, len(latents))
    guided, (batch, channels, height, width), dtype = is_guided(run.guidance_scale), latents.shape, dtype_of(unet)
    if channels != unet.config.in_channels - 1:
        raise ValueError(f"latents must have {unet.config.in_channels - 1} channels, got {channels}")
    check_tensor("prompt_embeds", run.prompt_embeds, "(B, L, C)", 3)
    check_tensor("depth", run.depth, "(B, 1, h, w)", 4)
    for name, tensor in (("prompt_embeds", run.prompt_embeds), ("depth", run.depth)):
        if tensor.dtype != dtype or tensor.device != latents.device:
            raise ValueError(
                f"{name} must be {dtype} on {latents.device}, as the unet and the latents are, got {tensor.dtype} "
                f"on {tensor.device}; bring it there with .to"
            )
    wanted = 2 * batch if guided else batch
    if len(run.prompt_embeds) != wanted:
        raise ValueError(
            f"prompt_embeds must have {wanted} rows (with guidance the negative prompts first, then the prompts; else "
            f"the prompts only), got {len(run.prompt_embeds)}"
        )
    reads = max(widths_read(unet))
    if run.prompt_embeds.shape[2] != reads:
        raise ValueError(f"prompt_embeds must be {reads} wide, which this UNet reads, got {run.prompt_embeds.shape[2]}")
    if len(run.depth) not in (batch, wanted) or run.depth.shape[1:] != (1, height, width):
        raise ValueError(
            f"depth must be {(batch, 1, height, width)} as the latents{', or twice that' if guided else ''}, got "
            f"{tuple(run.depth.shape)}"
        )


def denoised(scheduler: Any, output: Any, noise_pred: Tensor, timestep: Tensor, latents: Tensor) -> Tensor | None:
    """Return the clean latents (B, 4, h, w) that a step predicts; None where the scheduler does not tell."""
    for name in ("pred_original_sample", "denoised"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    if isinstance(scheduler, ExponentialSchedulerMixin):
        return scheduler.denoised(noise_pred, latents)
    alpha_bar, kind = scheduler.alphas_cumprod.cpu()[timestep.cpu().long()], scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample") or (kind == "epsilon" and alpha_bar == 0):
        return None
    return predict_x0(kind, latents, noise_pred, alpha_bar)
