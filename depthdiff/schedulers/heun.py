"""Second-order methods that call the network twice a step: Heun's, and the midpoint method without and with noise.

Every step but the last, which ends at clean latents, has two calls: a first one at the step's beginning, and a second
one further on, from whose slope the step is taken again. Source: arXiv:2206.00364, algorithm 1 (Heun) and sec. 3.3
(midpoint, KDPM2); crowsonkb/k-diffusion, k_diffusion/sampling.py, `sample_heun`, `sample_dpm_2` and
`sample_dpm_2_ancestral`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.config import register_to_config
from depthdiff.schedulers.base import StepOutput
from depthdiff.schedulers.euler import euler_step
from depthdiff.schedulers.indexed import Draw
from depthdiff.schedulers.sigmas import (
    SigmaPlan,
    SigmaSchedulerMixin,
    SigmaSchedulerOutput,
    ancestral_levels,
    middle_level,
    predict_x0_from_sigma,
    slope,
)


class HeunDiscreteSchedulerOutput(SigmaSchedulerOutput):
    """Result of `HeunDiscreteScheduler.step`."""


class KDPM2DiscreteSchedulerOutput(SigmaSchedulerOutput):
    """Result of `KDPM2DiscreteScheduler.step`."""


class KDPM2AncestralDiscreteSchedulerOutput(SigmaSchedulerOutput):
    """Result of `KDPM2AncestralDiscreteScheduler.step`."""


class HeunState(NamedTuple):
    """State of a run of Heun's method between the two calls of a step; all None before the first one.

    Attributes:
        prev_derivative: (B, C, h, w), the slope at the step's beginning.
        dt: by how much the noise level changes in the step.
        sample: (B, C, h, w), the latents at its beginning.
    """

    prev_derivative: Tensor | None = None
    dt: float | None = None
    sample: Tensor | None = None


class MidpointState(NamedTuple):
    """State of a run of the midpoint method between the two calls of a step; None before the first one.

    Attributes:
        sample: (B, C, h, w), the latents at the step's beginning.
    """

    sample: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TwoCallPlan(SigmaPlan):
    """A run of a method with two calls a step; see `SigmaPlan`.

    Call 2k begins at `sigmas[2k]`, and with call 2k + 1 its step ends at `sigmas[2k + 1]`.
    """

    def ends_of(self, index: int) -> tuple[float, float]:
        """Return the noise levels between which the step of a call leads."""
        first = index - index % 2
        sigma, sigma_next = self.sigmas[first : first + 2].tolist()
        return sigma, sigma_next

    def is_last(self, index: int) -> bool:
        """Return whether a call is that of the last step, which has no second one."""
        return index == len(self.sigmas) - 2


@dataclass(frozen=True, eq=False)
class HeunPlan(TwoCallPlan):
    """A run of Heun's method; see `TwoCallPlan`."""

    def init_state(self) -> HeunState:
        """See `Plan`."""
        return HeunState()

    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: HeunState, generator: Any, draw: Draw
    ) -> StepOutput:
        """See `IndexedPlan`: arXiv:2206.00364, algorithm 1, lines 4 to 8."""
        (sigma, sigma_next), c = self.ends_of(index), self.config
        begun, dt, start = state
        here = sigma if dt is None else sigma_next
        x0 = predict_x0_from_sigma(c.prediction_type, sample, model_output, here)
        if c.clip_sample:
            x0 = x0.clamp(-c.clip_sample_range, c.clip_sample_range)
        derivative = slope(sample, x0, here)
        if begun is None or dt is None or start is None:
            dt = sigma_next - sigma
            return StepOutput(sample + dt * derivative, x0, HeunState(derivative, dt, sample))
        return StepOutput(start + dt / 2 * (begun + derivative), x0, HeunState())


@dataclass(frozen=True, eq=False)
class KDPM2Plan(TwoCallPlan):
    """A run of the midpoint method; see `TwoCallPlan`."""

    def init_state(self) -> MidpointState:
        """See `Plan`."""
        return MidpointState()

    def levels_of(self, index: int) -> tuple[float, float, float, float]:
        """Return a step's beginning, middle and end, and the deviation of the noise added there."""
        sigma, sigma_next = self.ends_of(index)
        return sigma, middle_level(sigma, sigma_next), sigma_next, 0.0

    def sigma_at(self, index: int) -> float:
        """See `SigmaPlan`."""
        return self.levels_of(index)[index % 2]

    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: MidpointState, generator: Any, draw: Draw
    ) -> StepOutput:
        """See `IndexedPlan`."""
        sigma, middle, end, up = self.levels_of(index)
        here = sigma if state.sample is None else middle
        x0 = predict_x0_from_sigma(self.config.prediction_type, sample, model_output, here)
        if state.sample is None and not self.is_last(index):
            return StepOutput(euler_step(sample, x0, sigma, middle), x0, MidpointState(sample))
        start = sample if state.sample is None else state.sample
        prev_sample = start + (end - sigma) * slope(sample, x0, here)
        if up > 0:
            prev_sample = prev_sample + up * draw(model_output.dtype)
        return StepOutput(prev_sample, x0, MidpointState())


@dataclass(frozen=True, eq=False)
class KDPM2AncestralPlan(KDPM2Plan):
    """A run of the midpoint method with added noise; see `TwoCallPlan`."""

    def levels_of(self, index: int) -> tuple[float, float, float, float]:
        """See `KDPM2Plan`."""
        sigma, sigma_next = self.ends_of(index)
        down, up = ancestral_levels(sigma, sigma_next)
        return sigma, middle_level(sigma, down), down, up


class TwoCallSchedulerMixin(SigmaSchedulerMixin):
    """Base of the schedulers with two calls of the network a step, but one for the last."""

    order = 2
    CALLS: ClassVar[int] = 2
    sample: Tensor | None

    def _calls_of(self, numbers: np.ndarray, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(numbers)
        second = self._second_timesteps(numbers, sigmas)[: count - 1]
        calls = np.stack([numbers[:-1], second], axis=1).reshape(-1)
        return np.append(calls, numbers[-1]), np.repeat(sigmas, 2)[1:-1]

    def _second_timesteps(self, numbers: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        """Return the timestep of each step's second call, for Heun's method that of its end."""
        return numbers[1:]

    def set_timesteps(  # type: ignore[override]
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | np.ndarray | Tensor | None = None,
    ) -> None:
        """Start a run; `timesteps` is then what the network is to see.

        Args:
            num_inference_steps: N, 1..T.
            device: of the timesteps; None is the CPU.
            num_train_timesteps: T again, or None.
            timesteps: of the caller's own, instead of N: falling numbers in [0, T-1], each once.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or both or neither of N and `timesteps`.
        """
        if num_train_timesteps not in (None, len(self)):
            raise ValueError(f"num_train_timesteps must be {len(self)}, as in the config, got {num_train_timesteps}")
        self._set_steps(self._choose_steps(num_inference_steps, timesteps), device)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first one of a step."""
        return self.sample is None

    def _sigma_of(self, index: int) -> float:
        plan = self._plan_as_it_is()
        first = index - index % 2
        sigma: float = plan.sigma_at(first + (0 if self.state_in_first_order else 1))
        return sigma


class HeunDiscreteScheduler(TwoCallSchedulerMixin):
    """Heun's method for discrete noise levels.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2" or "exp".
        trained_betas: T numbers to use instead.
        prediction_type: "epsilon", "v_prediction" or "sample".
        use_karras_sigmas: space the noise levels as arXiv:2206.00364 does.
        use_exponential_sigmas: space them evenly in their logarithm.
        use_beta_sigmas: space them as quantiles of a beta distribution; needs SciPy.
        clip_sample: clip the predicted clean latents; for models of pixels.
        clip_sample_range: where.
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.

    Raises:
        ImportError: SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SigmaSchedulerMixin.CHOICES,
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "exp"),
    }
    POSITIVE: ClassVar[tuple[str, ...]] = ("clip_sample_range",)
    PLAN: ClassVar[Any] = HeunPlan

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        clip_sample: bool | None = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._make_noise_schedule()
        self.use_karras_sigmas = use_karras_sigmas
        self._start_full_run()

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the part of a step that follows a call.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents before `scale_model_input`.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or more calls than the run has.
        """
        result = self._take(model_output, timestep, sample)
        return self._answer(HeunDiscreteSchedulerOutput, result, return_dict)


class KDPM2DiscreteScheduler(TwoCallSchedulerMixin):
    """Midpoint method for discrete noise levels, DPM-Solver-2 in terms of sigma.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        use_karras_sigmas: space the noise levels as arXiv:2206.00364 does.
        use_exponential_sigmas: space them evenly in their logarithm.
        use_beta_sigmas: space them as quantiles of a beta distribution; needs SciPy.
        prediction_type: "epsilon", "v_prediction" or "sample".
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.

    Raises:
        ImportError: SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module.
    """

    PLAN: ClassVar[Any] = KDPM2Plan
    rounded_timesteps: ClassVar[tuple[str, ...]] = ("use_karras_sigmas",)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._make_noise_schedule()
        self._start_full_run()

    def _second_timesteps(self, numbers: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        middles = [self._middle(*pair) for pair in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)]
        return self._timesteps_of(np.array(middles))

    def _middle(self, sigma: float, sigma_next: float) -> float:
        """Return the noise level of a step's second call."""
        return middle_level(sigma, sigma_next)

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> KDPM2DiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the part of a step that follows a call; arguments and errors as `HeunDiscreteScheduler.step`."""
        result = self._take(model_output, timestep, sample)
        return self._answer(KDPM2DiscreteSchedulerOutput, result, return_dict)


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """Midpoint method with added noise; arguments and errors as `KDPM2DiscreteScheduler`."""

    PLAN: ClassVar[Any] = KDPM2AncestralPlan

    def _middle(self, sigma: float, sigma_next: float) -> float:
        return middle_level(sigma, ancestral_levels(sigma, sigma_next)[0])

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> KDPM2AncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the part of a step that follows a call; `generator` is for the noise that is added.

        Other arguments and errors as `HeunDiscreteScheduler.step`.
        """
        result = self._take(model_output, timestep, sample, generator)
        return self._answer(KDPM2AncestralDiscreteSchedulerOutput, result, return_dict)
