"""DDPM: the reverse diffusion, with noise at every step but the last. Source: arXiv:2006.11239."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from depthdiff.checks import check_flag, check_number
from depthdiff.config import FrozenDict, register_to_config
from depthdiff.schedulers.base import Plan, SchedulerMixin, StepOutput, Steps
from depthdiff.schedulers.indexed import Draw, drawing
from depthdiff.schedulers.schedule import Levels, check_pair, clip_x0, noisy_at, predict_x0, read_timestep
from depthdiff.schedulers.sigmas import SigmaSchedulerOutput

SMALLEST_VARIANCE = 1e-20
VARIANCES = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


class DDPMSchedulerOutput(SigmaSchedulerOutput):
    """Result of `DDPMScheduler.step`."""


def ddpm_deviation(
    alpha_prod_t: Tensor, alpha_prod_t_prev: Tensor, variance_type: str, predicted: Tensor | None = None
) -> Tensor:
    """Compute the deviation of the noise that a step adds.

    Args:
        alpha_prod_t: 0-d, ᾱ of the level at which the step begins.
        alpha_prod_t_prev: 0-d, ᾱ of the level at which it ends.
        variance_type: "fixed_small": the posterior's variance; "fixed_large": that of the forward step; "learned": what
            the network predicts; "learned_range": its logarithm between those two, as the network says.
        predicted: (B, C, h, w), by the network.

    Source: arXiv:2006.11239, eq. 7 and sec. 3.2; arXiv:2102.09672, eq. 15.
    """
    beta = 1 - alpha_prod_t / alpha_prod_t_prev
    posterior = ((1 - alpha_prod_t_prev) / (1 - alpha_prod_t) * beta).clamp(min=SMALLEST_VARIANCE)
    if predicted is not None and variance_type == "learned":
        return predicted**0.5
    if predicted is not None and variance_type == "learned_range":
        share = (predicted + 1) / 2
        return torch.exp((share * beta.log() + (1 - share) * posterior.log()) / 2)
    return (beta if variance_type.startswith("fixed_large") else posterior) ** 0.5


def ddpm_step(
    sample: Tensor,
    model_output: Tensor,
    alpha_prod_t: Tensor,
    alpha_prod_t_prev: Tensor,
    config: Mapping[str, Any],
    variance_type: str,
    draw: Draw | None,
) -> tuple[Tensor, Tensor]:
    """Take a step of the reverse diffusion: arXiv:2006.11239, algorithm 2 and eq. 7.

    Args:
        sample: (B, C, h, w), at the level of `alpha_prod_t`.
        model_output: (B, C, h, w), or (B, 2C, h, w) with a learnt variance.
        alpha_prod_t: 0-d, ᾱ of the level at which the step begins.
        alpha_prod_t_prev: 0-d, ᾱ of the level at which it ends.
        config: of the scheduler: what is predicted, and how predictions are clipped.
        variance_type: see `ddpm_deviation`.
        draw: draws the noise; None adds none.

    Returns:
        The latents at the new level, and the predicted clean latents.
    """
    channels = sample.shape[1]
    predicted = None
    if variance_type.startswith("learned") and model_output.shape[1] == 2 * channels:
        model_output, predicted = model_output.split(channels, dim=1)
    x0 = clip_x0(predict_x0(config["prediction_type"], sample, model_output, alpha_prod_t), config)
    alpha = alpha_prod_t / alpha_prod_t_prev
    rest, rest_prev = 1 - alpha_prod_t, 1 - alpha_prod_t_prev
    prev_sample = alpha_prod_t_prev**0.5 * (1 - alpha) / rest * x0 + alpha**0.5 * rest_prev / rest * sample
    if draw is not None:
        deviation = ddpm_deviation(alpha_prod_t, alpha_prod_t_prev, variance_type, predicted)
        prev_sample = prev_sample + deviation * draw(model_output.dtype)
    return prev_sample, x0


@dataclass(frozen=True, eq=False)
class DDPMPlan(Plan):
    """A run of DDPM; see `Plan`. There is no state.

    Attributes:
        alpha_prod_t: ᾱ at which each step begins, 0-d each.
        alpha_prod_t_prev: ᾱ at which it ends.
    """

    alpha_prod_t: tuple[Tensor, ...]
    alpha_prod_t_prev: tuple[Tensor, ...]

    def step(
        self,
        noise_pred: Tensor,
        index: int,
        latents: Tensor,
        state: Any = None,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> StepOutput:
        """See `Plan`."""
        learnt, kind = learnt_variance(self.config, noise_pred, latents), self.config.variance_type
        index = self._check_step(noise_pred[:, : latents.shape[1]] if learnt else noise_pred, index, latents)
        draw = drawing(latents, generator) if self.numbers[index] > 0 else None
        levels = self.alpha_prod_t[index], self.alpha_prod_t_prev[index]
        return StepOutput(*ddpm_step(latents, noise_pred, *levels, self.config, kind, draw), state)

    def _noisy(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        return noisy_at(clean, noise, self.alpha_prod_t[index])


def learnt_variance(config: Mapping[str, Any], model_output: Tensor, sample: Tensor) -> bool:
    """Return whether a network's output holds a variance beside the prediction."""
    learnt = str(config["variance_type"]).startswith("learned")
    return learnt and model_output.ndim == sample.ndim and model_output.shape[1] == 2 * sample.shape[1]


class DDPMScheduler(SchedulerMixin):
    """Denoising diffusion probabilistic models.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid" or "laplace".
        trained_betas: T numbers to use instead.
        variance_type: of the noise that is added; see `ddpm_deviation`. "..._log" are the same, and None is
            "fixed_small".
        clip_sample: clip the predicted clean latents; for models of pixels.
        prediction_type: "epsilon", "v_prediction" or "sample".
        thresholding: clip each sample to a quantile of its own; for models of pixels.
        dynamic_thresholding_ratio: that quantile, in [0, 1].
        clip_sample_range: where `clip_sample` clips.
        sample_max_value: the most that `thresholding` lets pass.
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.
        rescale_betas_zero_snr: rescale the betas to end in pure noise.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: arXiv:2006.11239.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SchedulerMixin.CHOICES,
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
        "variance_type": VARIANCES,
    }
    POSITIVE: ClassVar[tuple[str, ...]] = ("clip_sample_range", "sample_max_value")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        check_number("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0.0, 1.0)
        self._make_noise_schedule(zero_terminal_snr=rescale_betas_zero_snr)
        self.one = torch.tensor(1.0, device="cpu")
        self.variance_type = variance_type or "fixed_small"
        self.init_noise_sigma: Any = 1.0

    def _make_plan(self, steps: Steps, t_start: int, eta: float, device: torch.device) -> DDPMPlan:
        run = self._whole_timesteps(steps)
        levels = Levels(self.alphas_cumprod.cpu(), self.one, 0)
        ends = [*run[1:], -1]
        alpha_prod_t, alpha_prod_t_prev = levels.alpha_prods(run[t_start:]), levels.alpha_prods(ends[t_start:])
        timesteps = torch.tensor(run[t_start:], dtype=torch.int64, device=device)
        config = FrozenDict({**self.config, "variance_type": self.variance_type})
        return DDPMPlan(timesteps, tuple(run[t_start:]), config, alpha_prod_t, alpha_prod_t_prev)

    def _levels_at(self, timestep: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return ᾱ where the step from a timestep begins and ends."""
        levels, end = self.alphas_cumprod.cpu(), int(self.previous_timestep(timestep))
        return levels[int(timestep)], levels[end] if end >= 0 else self.one

    def _get_variance(
        self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        kind = variance_type or self.variance_type
        return ddpm_deviation(*self._levels_at(t), kind, predicted_variance) ** (1 if kind == "fixed_small_log" else 2)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the present run, or without one a step of the training's length.

        Args:
            model_output: (B, C, h, w), what the network returned; (B, 2C, h, w) with a learnt variance.
            timestep: what it saw; steps may come in any order.
            sample: (B, C, h, w), the latents.
            generator: for the noise that is added, one, or one a sample.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: an argument out of range.
        """
        learnt = learnt_variance({"variance_type": self.variance_type}, model_output, sample)
        check_pair("model_output", model_output[:, : sample.shape[1]] if learnt else model_output, "sample", sample)
        draw = drawing(sample, generator) if read_timestep(timestep, len(self) - 1) > 0 else None
        levels = self._levels_at(timestep)
        result = ddpm_step(sample, model_output, *levels, self.config, self.variance_type, draw)
        return DDPMSchedulerOutput(*result) if check_flag("return_dict", return_dict) else result

    def previous_timestep(self, timestep: Tensor | int) -> Tensor:
        """Return the timestep at which the step from this one ends, 0-d; -1 after the last."""
        return self._previous_timestep(timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute v, what a network of prediction type "v_prediction" learns: arXiv:2202.00512, appendix D."""
        return self._velocity(sample, noise, timesteps)

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        return clip_x0(sample, {**self.config, "thresholding": True})
