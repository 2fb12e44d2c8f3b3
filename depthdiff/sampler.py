"""The loop: ask for the noise, take the scheduler's step, hand the result out. It knows no model and no file.

Letters: B batch, h and w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from depthdiff.checks import check_tensor
from depthdiff.schedulers.plan import Plan


@dataclass
class Step:
    """One finished step of a run.

    Attributes:
        index: position in the plan, from 0.
        timestep: what the network saw, a tensor without dimensions.
        latents: (B, 4, h, w), what the next step starts from; assign to it to change the course of the run.
        denoised: (B, 4, h, w), the clean latents as predicted at this step.
    """

    index: int
    timestep: Tensor
    latents: Tensor
    denoised: Tensor


def guide(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Push a prediction away from the one without the prompt.

    Args:
        uncond: (B, 4, h, w), prediction for the negative prompt.
        cond: (B, 4, h, w), prediction for the prompt.
        guidance_scale: 1 gives `cond`, 0 `uncond`; larger follows the prompt more closely.

    Source: arXiv:2207.12598, eq. 6, with w = guidance_scale - 1.
    """
    return uncond + guidance_scale * (cond - uncond)


def denoise(
    predict_noise: Callable[[Tensor, Tensor], Tensor],
    plan: Plan,
    latents: Tensor,
    generator: Generator | Sequence[Generator] | None = None,
) -> Iterator[Step]:
    """Walk through a plan, from noisy latents to clean ones.

    Args:
        predict_noise: (latents scaled for the network (B, 4, h, w), timestep) -> its prediction (B, 4, h, w).
        plan: of a scheduler.
        latents: (B, 4, h, w), at the noise level of the plan's first step.
        generator: for schedulers that add noise on the way.

    Yields:
        Every step once it is taken; the next one starts from its `latents`, which the caller may have changed.

    Raises:
        TypeError: the caller has put something else than a tensor there.
        ValueError: of another form, or of another size where the method remembers past steps.

    Examples:
        >>> import torch
        >>> from depthdiff import DDIMScheduler
        >>> clean, noise = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 0.5)
        >>> plan = DDIMScheduler(set_alpha_to_one=True).plan(10, strength=0.5)
        >>> for step in denoise(lambda latents, timestep: noise, plan, plan.add_noise(clean, noise)):
        ...     pass  # who predicts the true noise is led to the clean latents
        >>> torch.allclose(step.latents, clean, atol=1e-5)
        True
    """
    state = plan.init_state()
    for index, timestep in enumerate(plan.calls):
        noise_pred = predict_noise(plan.scale_model_input(latents, index), timestep)
        result = plan.step(noise_pred, index, latents, state, generator)
        step = Step(index, timestep, result.latents, result.denoised)
        yield step
        latents, state = check_tensor("latents", step.latents, "(B, 4, h, w)", 4), result.state
