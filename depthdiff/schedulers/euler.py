"""Euler's method on the diffusion's ordinary differential equation, and with noise added at every step.

Source: arXiv:2206.00364, algorithms 1 and 2, without the correction; crowsonkb/k-diffusion, k_diffusion/sampling.py,
`sample_euler` and `sample_euler_ancestral`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.checks import check_number
from depthdiff.config import register_to_config
from depthdiff.schedulers.base import StepOutput, Steps
from depthdiff.schedulers.indexed import Draw
from depthdiff.schedulers.schedule import check_pair
from depthdiff.schedulers.sigmas import (
    SigmaPlan,
    SigmaSchedulerMixin,
    SigmaSchedulerOutput,
    ancestral_levels,
    predict_x0_from_sigma,
    slope,
)
from depthdiff.schedulers.spacing import exponential_sigmas

MOST_CHURN = 2**0.5 - 1


class EulerDiscreteSchedulerOutput(SigmaSchedulerOutput):
    """Result of `EulerDiscreteScheduler.step`."""


class EulerAncestralDiscreteSchedulerOutput(SigmaSchedulerOutput):
    """Result of `EulerAncestralDiscreteScheduler.step`."""


def euler_step(sample: Tensor, pred_original_sample: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Follow the slope d sample / d sigma from one noise level to another: arXiv:2206.00364, algorithm 1, line 5."""
    return sample + (sigma_next - sigma) * slope(sample, pred_original_sample, sigma)


@dataclass(frozen=True, eq=False)
class EulerPlan(SigmaPlan):
    """A run of Euler's method; see `SigmaPlan`. There is no state."""

    def advance(
        self,
        sample: Tensor,
        model_output: Tensor,
        index: int,
        state: None,
        generator: Any,
        draw: Draw,
        churn: tuple[float, float, float, float] = (0.0, 0.0, math.inf, 1.0),
    ) -> StepOutput:
        """See `IndexedPlan`; `churn` is that of `EulerDiscreteScheduler.step`: its amount, range and deviation."""
        sigma, sigma_next = self.sigmas[index : index + 2].tolist()
        s_churn, s_tmin, s_tmax, s_noise = churn
        gamma = min(s_churn / (len(self.sigmas) - 1), MOST_CHURN) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (gamma + 1)
        if gamma > 0:  # arXiv:2206.00364, algorithm 2, lines 5 and 6
            sample = sample + s_noise * (sigma_hat**2 - sigma**2) ** 0.5 * draw(model_output.dtype)
        x0 = predict_x0_from_sigma(self.config.prediction_type, sample, model_output, sigma_hat)
        return StepOutput(euler_step(sample, x0, sigma_hat, sigma_next), x0, None)


@dataclass(frozen=True, eq=False)
class EulerAncestralPlan(SigmaPlan):
    """A run of Euler's method with added noise; see `SigmaPlan`. There is no state."""

    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: None, generator: Any, draw: Draw
    ) -> StepOutput:
        """See `IndexedPlan`."""
        sigma, sigma_next = self.sigmas[index : index + 2].tolist()
        down, up = ancestral_levels(sigma, sigma_next)
        x0 = predict_x0_from_sigma(self.config.prediction_type, sample, model_output, sigma)
        return StepOutput(euler_step(sample, x0, sigma, down) + up * draw(model_output.dtype), x0, None)


class EulerDiscreteScheduler(SigmaSchedulerMixin):
    """Euler's method for discrete noise levels.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        prediction_type: "epsilon", "v_prediction" or "sample" (also "original_sample").
        interpolation_type: of noise levels between those of the training, "linear", or "log_linear" to space them
            evenly in their logarithm; the run then ends at the smallest level.
        use_karras_sigmas: space the noise levels as arXiv:2206.00364 does.
        use_exponential_sigmas: space them evenly in their logarithm.
        use_beta_sigmas: space them as quantiles of a beta distribution; needs SciPy.
        sigma_min: smallest level of such a spacing; that of the run if None.
        sigma_max: largest one.
        timestep_spacing: "leading", "trailing" or "linspace".
        timestep_type: what the network sees: "discrete" timesteps, or "continuous" ones, log(sigma) / 4, with
            "v_prediction".
        steps_offset: added to every timestep, with "leading" spacing.
        rescale_betas_zero_snr: rescale the betas to end in pure noise.
        final_sigmas_type: end at "zero" noise, or at "sigma_min", that of the first training timestep.

    Raises:
        ImportError: SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SigmaSchedulerMixin.CHOICES,
        "prediction_type": ("epsilon", "v_prediction", "sample", "original_sample"),
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    }
    PLAN: ClassVar[Any] = EulerPlan

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        self._make_noise_schedule(zero_terminal_snr=rescale_betas_zero_snr)
        self.use_karras_sigmas = use_karras_sigmas
        self._start_full_run()
        self.num_inference_steps = None

    def _levels_at(self, numbers: np.ndarray, levels: np.ndarray) -> np.ndarray:
        if self.config.interpolation_type == "linear":
            return super()._levels_at(numbers, levels)
        return exponential_sigmas(levels[-1], levels[0], len(numbers) + 1)

    def _calls_of(self, numbers: np.ndarray, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._is_continuous:
            numbers = 0.25 * np.log(sigmas[: len(numbers)])
        return numbers, sigmas

    @property
    def _is_continuous(self) -> bool:
        return bool(self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | np.ndarray | Tensor | None = None,
        sigmas: Sequence[float] | np.ndarray | Tensor | None = None,
    ) -> None:
        """Start a run; `timesteps` is then what the network is to see.

        Args:
            num_inference_steps: N, 1..T.
            device: of the timesteps; None is the CPU.
            timesteps: of the caller's own, instead of N: falling numbers in [0, T-1], each once.
            sigmas: noise levels of the caller's own, instead of N: falling numbers, the last one where the run ends.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or not exactly one of N, `timesteps` and `sigmas`.
        """
        self._set_steps(self._choose_steps(num_inference_steps, timesteps, sigmas), device)

    def _make_plan(self, steps: Steps, t_start: int, eta: float, device: torch.device) -> EulerPlan:
        if self._is_continuous and steps.step_ratio is None and steps.sigmas is None:
            raise ValueError('timesteps must be None with timestep_type "continuous": they follow from the levels')
        plan: EulerPlan = super()._make_plan(steps, t_start, eta, device)
        return plan

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the present run.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents before `scale_model_input`.
            s_churn: how much noise is added before each step, over the whole run: arXiv:2206.00364, algorithm 2.
            s_tmin: smallest noise level at which it is added.
            s_tmax: largest one.
            s_noise: its deviation.
            generator: for it.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or more steps than the run has.
        """
        check_pair("model_output", model_output, "sample", sample)
        churn = (
            check_number("s_churn", s_churn, 0),
            check_number("s_tmin", s_tmin, 0),
            s_tmax if s_tmax == math.inf else check_number("s_tmax", s_tmax, 0),
            check_number("s_noise", s_noise, 0),
        )
        self._warn_if_unscaled()
        result = self._take(model_output, timestep, sample, generator, churn=churn)
        return self._answer(EulerDiscreteSchedulerOutput, result, return_dict)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute v, what a network of prediction type "v_prediction" learns, at `timesteps` (B,) of the present run.

        Source: arXiv:2202.00512, appendix D.
        """
        check_pair("sample", sample, "noise", noise)
        sigmas = self.sigmas.to(sample.device, sample.dtype)[self._indices_of(timesteps, len(sample))]
        sigmas = sigmas.view(-1, *(1,) * (sample.ndim - 1))
        return (noise - sigmas * sample) / (sigmas**2 + 1) ** 0.5


class EulerAncestralDiscreteScheduler(SigmaSchedulerMixin):
    """Euler's method with added noise, for discrete noise levels.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        prediction_type: "epsilon", "v_prediction" or "sample".
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.
        rescale_betas_zero_snr: rescale the betas to end in pure noise.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module.
    """

    PLAN: ClassVar[Any] = EulerAncestralPlan

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._make_noise_schedule(zero_terminal_snr=rescale_betas_zero_snr)
        self._start_full_run()
        self.num_inference_steps = None

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the present run.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents before `scale_model_input`.
            generator: for the noise that is added, one, or one a sample.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or more steps than the run has.
        """
        check_pair("model_output", model_output, "sample", sample)
        self._warn_if_unscaled()
        result = self._take(model_output, timestep, sample, generator)
        return self._answer(EulerAncestralDiscreteSchedulerOutput, result, return_dict)
