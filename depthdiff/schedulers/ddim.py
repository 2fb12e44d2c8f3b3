"""DDIM: deterministic steps along the diffusion, or noisy ones for eta > 0. Source: arXiv:2010.02502."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from depthdiff.checks import check_flag, check_generators, check_number
from depthdiff.config import BaseOutput, FrozenDict, register_to_config
from depthdiff.noise import randn
from depthdiff.schedulers.base import Plan, SchedulerMixin, StepOutput, Steps
from depthdiff.schedulers.schedule import (
    Levels,
    check_pair,
    clip_x0,
    dynamic_threshold,
    epsilon_from_x0,
    noisy_at,
    predict_epsilon,
    predict_x0,
    read_timestep,
)


@dataclass
class DDIMSchedulerOutput(BaseOutput):
    """Result of `DDIMScheduler.step`.

    Attributes:
        prev_sample: (B, C, h, w), one step less noisy.
        pred_original_sample: (B, C, h, w), the clean latents as predicted at this step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def ddim_variance(alpha_prod_t: Tensor, alpha_prod_t_prev: Tensor) -> Tensor:
    """Compute the variance of the noise that a step adds for eta 1: arXiv:2010.02502, eq. 16."""
    if alpha_prod_t == 1:
        return torch.zeros_like(alpha_prod_t)
    return (1 - alpha_prod_t_prev) / (1 - alpha_prod_t) * (1 - alpha_prod_t / alpha_prod_t_prev)


def ddim_step(
    sample: Tensor,
    model_output: Tensor,
    alpha_prod_t: Tensor,
    alpha_prod_t_prev: Tensor,
    config: Mapping[str, Any],
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generator | Sequence[Generator] | None = None,
    variance_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Move latents from one noise level to another: arXiv:2010.02502, eq. 12.

    Args:
        sample: (B, C, h, w), at the level of `alpha_prod_t`.
        model_output: (B, C, h, w), what the network returned.
        alpha_prod_t: 0-d, ᾱ of the level at which the step begins.
        alpha_prod_t_prev: 0-d, ᾱ of the level at which it ends.
        config: of the scheduler: what is predicted, and how predictions are clipped.
        eta: share of the variance of eq. 16 that is added as noise.
        use_clipped_model_output: compute the noise from the clipped clean latents.
        generator: for that noise.
        variance_noise: (B, C, h, w), that noise itself.

    Returns:
        The latents at the new level, and the predicted clean latents.
    """
    prediction_type = config["prediction_type"]
    pred_original_sample = clip_x0(predict_x0(prediction_type, sample, model_output, alpha_prod_t), config)
    pred_epsilon = predict_epsilon(prediction_type, sample, model_output, alpha_prod_t)
    if use_clipped_model_output:
        pred_epsilon = epsilon_from_x0(sample, pred_original_sample, alpha_prod_t)

    variance = ddim_variance(alpha_prod_t, alpha_prod_t_prev).clamp(min=0)
    std_dev = eta * variance**0.5
    direction = (1 - alpha_prod_t_prev - std_dev**2).clamp(min=0) ** 0.5 * pred_epsilon  # to x_t
    prev_sample = alpha_prod_t_prev**0.5 * pred_original_sample + direction
    if eta > 0:
        if variance_noise is None:
            variance_noise = randn(sample.shape, generator, device=sample.device, dtype=model_output.dtype)
        prev_sample = prev_sample + std_dev * variance_noise
    return prev_sample, pred_original_sample


@dataclass(frozen=True, eq=False)
class DDIMPlan(Plan):
    """A run of DDIM; see `Plan`.

    Attributes:
        alpha_prod_t: ᾱ at which each step begins, 0-d each.
        alpha_prod_t_prev: ᾱ at which it ends.
        eta: share of the noise that is added on the way.
    """

    alpha_prod_t: tuple[Tensor, ...]
    alpha_prod_t_prev: tuple[Tensor, ...]
    eta: float

    def step(
        self,
        noise_pred: Tensor,
        index: int,
        latents: Tensor,
        state: Any = None,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> StepOutput:
        """See `Plan`; there is no state."""
        index = self._check_step(noise_pred, index, latents)
        begin, end = self.alpha_prod_t[index], self.alpha_prod_t_prev[index]
        return StepOutput(
            *ddim_step(latents, noise_pred, begin, end, self.config, eta=self.eta, generator=generator), state
        )

    def _noisy(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        return noisy_at(clean, noise, self.alpha_prod_t[index])

    def inverted(self) -> DDIMPlan:
        """Return the plan that leads from the clean latents back to the noise of the first step.

        The network sees the timestep of the noisier end of each step, forwards and backwards; with the same
        predictions, the inverse of a run leads back to where it began.

        Raises:
            ValueError: noise is added on the way.

        Source: arXiv:2010.02502, sec. 4.3; arXiv:2211.09794, sec. 3.2.
        """
        if self.eta > 0:
            raise ValueError(f"eta must be 0 for a plan to be inverted, got {self.eta}")
        return dataclasses.replace(
            self,
            timesteps=self.timesteps.flip(0),
            numbers=self.numbers[::-1],
            alpha_prod_t=self.alpha_prod_t_prev[::-1],
            alpha_prod_t_prev=self.alpha_prod_t[::-1],
        )


def ddim_plan(numbers: Sequence[int], levels: Levels, config: FrozenDict, eta: float, device: torch.device) -> DDIMPlan:
    """Plan a run over falling timesteps."""
    alpha_prod_t = levels.alpha_prods(numbers)
    alpha_prod_t_prev = levels.alpha_prods([levels.after(one) for one in numbers])
    timesteps = torch.tensor(numbers, dtype=torch.int64, device=device)
    return DDIMPlan(timesteps, tuple(numbers), config, alpha_prod_t, alpha_prod_t_prev, eta)


class DDIMScheduler(SchedulerMixin):
    """Denoising diffusion implicit models.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        clip_sample: clip the predicted clean latents; for models of pixels.
        set_alpha_to_one: end at ᾱ = 1, else at that of the first training timestep.
        steps_offset: added to every timestep, with "leading" spacing.
        prediction_type: "epsilon", "v_prediction" or "sample".
        thresholding: clip each sample to a quantile of its own; for models of pixels.
        dynamic_thresholding_ratio: that quantile, in [0, 1].
        clip_sample_range: where `clip_sample` clips.
        sample_max_value: the most that `thresholding` lets pass.
        timestep_spacing: "leading", "trailing" or "linspace".
        rescale_betas_zero_snr: rescale the betas to end in pure noise.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: arXiv:2010.02502.
    """

    POSITIVE: ClassVar[tuple[str, ...]] = ("clip_sample_range", "sample_max_value")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        check_number("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0.0, 1.0)
        self._make_noise_schedule(zero_terminal_snr=rescale_betas_zero_snr)
        self.final_alpha_cumprod: Any = torch.tensor(1.0, device="cpu") if set_alpha_to_one else self.alphas_cumprod[0]
        self.init_noise_sigma: Any = 1.0

    def _make_plan(self, steps: Steps, t_start: int, eta: float, device: torch.device) -> DDIMPlan:
        numbers, step_ratio = self._whole_timesteps(steps), steps.step_ratio
        levels = self._levels_of(step_ratio or 0, numbers if step_ratio is None else ())
        return ddim_plan(numbers[t_start:], levels, FrozenDict(self.config), eta, device)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator | Sequence[Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the run that `set_timesteps` started.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; steps may come in any order.
            sample: (B, C, h, w), the latents.
            eta: in [0, 1], share of the noise that is added.
            use_clipped_model_output: compute the noise from the clipped clean latents.
            generator: for the noise that is added.
            variance_noise: (B, C, h, w), that noise itself, instead of a generator.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: no run was started, or an argument out of range.
        """
        check_pair("model_output", model_output, "sample", sample)
        check_generators("generator", generator)
        eta = check_number("eta", eta, 0, 1)
        if variance_noise is not None:
            check_pair("variance_noise", variance_noise, "sample", sample)
            if eta > 0 and generator is not None:
                raise ValueError("generator and variance_noise must not both be given: each determines the noise")
        number, levels = read_timestep(timestep, len(self) - 1), self._levels()
        prev_sample, pred_original_sample = ddim_step(
            sample,
            model_output,
            levels.alpha_prod(number),
            levels.alpha_prod(levels.after(number)),
            self.config,
            eta=eta,
            use_clipped_model_output=check_flag("use_clipped_model_output", use_clipped_model_output),
            generator=generator,
            variance_noise=variance_noise,
        )
        if not check_flag("return_dict", return_dict):
            return prev_sample, pred_original_sample
        return DDIMSchedulerOutput(prev_sample, pred_original_sample)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute v, what a network of prediction type "v_prediction" learns: arXiv:2202.00512, appendix D."""
        return self._velocity(sample, noise, timesteps)

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        levels = self._levels_of(0, ())
        return ddim_variance(levels.alpha_prod(timestep), levels.alpha_prod(prev_timestep))

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        return dynamic_threshold(sample, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)


class DDIMInverseScheduler(SchedulerMixin):
    """DDIM run backwards, from clean latents to noise.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        clip_sample: clip the predicted clean latents; for models of pixels.
        set_alpha_to_one: begin at ᾱ = 1, else at that of the first training timestep.
        steps_offset: added to every timestep, with "leading" spacing.
        prediction_type: "epsilon", "v_prediction" or "sample".
        clip_sample_range: where `clip_sample` clips.
        timestep_spacing: "leading" or "trailing".
        rescale_betas_zero_snr: rescale the betas to end in pure noise.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Attributes:
        initial_alpha_cumprod: ᾱ at which a run begins.

    Source: arXiv:2010.02502, sec. 4.3; arXiv:2211.09794, sec. 3.2.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SchedulerMixin.CHOICES,
        "timestep_spacing": ("leading", "trailing"),
    }
    POSITIVE: ClassVar[tuple[str, ...]] = ("clip_sample_range",)
    _compatibles: ClassVar[list[str]] = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._make_noise_schedule(zero_terminal_snr=rescale_betas_zero_snr)
        self.initial_alpha_cumprod = torch.tensor(1.0, device="cpu") if set_alpha_to_one else self.alphas_cumprod[0]
        self.init_noise_sigma: Any = 1.0
        self.timesteps = self.timesteps.flip(0)

    def _make_plan(self, steps: Steps, t_start: int, eta: float, device: torch.device) -> DDIMPlan:
        numbers, step_ratio = self._whole_timesteps(steps), steps.step_ratio
        levels = self._levels_of(step_ratio or 0, numbers if step_ratio is None else ())
        config = FrozenDict({**self.config, "thresholding": False})
        return ddim_plan(numbers[t_start:], levels, config, 0.0, device).inverted()

    def _levels_of(self, step_ratio: int, run: Sequence[float]) -> Levels:
        begin = self.initial_alpha_cumprod.cpu().clone()
        return Levels(self.alphas_cumprod.cpu().clone(), begin, step_ratio, tuple(run))

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, towards noise, of the run that `set_timesteps` started.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw, that of the step's noisier end; steps may come in any order.
            sample: (B, C, h, w), the latents.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: no run was started, or an argument out of range.
        """
        check_pair("model_output", model_output, "sample", sample)
        number, levels = read_timestep(timestep, len(self) - 1), self._levels()
        config = {**self.config, "thresholding": False}
        ends = levels.alpha_prod(levels.after(number)), levels.alpha_prod(number)
        result = ddim_step(sample, model_output, *ends, config)
        return DDIMSchedulerOutput(*result) if check_flag("return_dict", return_dict) else result
