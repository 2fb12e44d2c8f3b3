"""DPM-Solver++ (SDE) as k-diffusion has it: two calls a step, with the increments of one Brownian motion as noise.

Source: arXiv:2211.01095, sec. 4.4, for the equation; crowsonkb/k-diffusion, k_diffusion/sampling.py,
`sample_dpmpp_sde`, for the method. The Brownian motion is torchsde's (arXiv:2001.01328), whose increments fit each
other however a run is divided into steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.checks import check_generators, check_number
from depthdiff.config import FrozenDict, register_to_config
from depthdiff.schedulers.base import StepOutput
from depthdiff.schedulers.euler import euler_step
from depthdiff.schedulers.heun import TwoCallPlan, TwoCallSchedulerMixin
from depthdiff.schedulers.indexed import Draw
from depthdiff.schedulers.schedule import TABLE
from depthdiff.schedulers.sigmas import SigmaSchedulerOutput, ancestral_levels, middle_level, predict_x0_from_sigma
from depthdiff.schedulers.spacing import need

DIGITS = 6
"""To which torchsde rounds noise levels."""

NoiseSampler = Callable[[float, float], Tensor]
"""Returns unit-normal noise for a step from one noise level to another."""


class DPMSolverSDESchedulerOutput(SigmaSchedulerOutput):
    """Result of `DPMSolverSDEScheduler.step`."""


class DPMSolverSDEState(NamedTuple):
    """State of a run.

    Attributes:
        sample: (B, C, h, w), the latents at the step's beginning, between its two calls.
        mid_point_sigma: the noise level of its second call, likewise.
        noise_sampler: the Brownian motion of the run; None before the first step.
    """

    sample: Tensor | None = None
    mid_point_sigma: float | None = None
    noise_sampler: NoiseSampler | None = None


class BrownianNoise:
    """A Brownian motion over noise levels, which is a function of its seeds: copied, it goes on alike.

    Args:
        like: (B, C, h, w), of the dtype and on the device of the noise.
        low: smallest level.
        high: largest one.
        seeds: one for the whole batch, or one a sample.
    """

    def __init__(self, like: Tensor, low: float, high: float, seeds: int | Sequence[int]) -> None:
        interval = need("torchsde", "DPMSolverSDEScheduler").BrownianInterval
        if not isinstance(seeds, int) and len(seeds) != len(like):
            raise ValueError(
                f"generator or noise_sampler_seed must be one, or one for each of {len(like)} samples, got {len(seeds)}"
            )
        self._like, self._low, self._high, self._seeds = like.new_zeros(1).expand(like.shape), low, high, seeds
        size, entropies = (like.shape, [seeds]) if isinstance(seeds, int) else (like.shape[1:], seeds)
        kind = {"size": size, "dtype": like.dtype, "device": like.device}
        how = {"tol": 10.0**-DIGITS, "pool_size": 24, "halfway_tree": True}
        self._trees = [interval(t0=low, t1=high, entropy=entropy, **kind, **how) for entropy in entropies]

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Return the unit-normal noise (B, C, h, w) of a step from one level to another."""
        begin, end = min(sigma, round(self._high, DIGITS)), max(sigma_next, round(self._low, DIGITS))
        change = torch.stack([tree(end, begin) for tree in self._trees]).view(self._like.shape)
        return -change / (sigma - sigma_next) ** 0.5

    def __reduce__(self) -> tuple[Any, ...]:
        return BrownianNoise, (self._like, self._low, self._high, self._seeds)


def brownian_times(sigma: float, sigma_next: float) -> tuple[float, float, float]:
    """Return a step's beginning, middle and end as the Brownian motion meets them: rounded as k-diffusion's logarithms.

    A rounding error of 1e-7 in a time moves the path by some 3e-4.
    """
    begin, end = (torch.tensor(level, **TABLE).log() for level in (sigma, sigma_next))
    return float(begin.exp()), float((begin + (end - begin) * 0.5).exp()), float(end.exp())


def draw_seeds(generator: Generator | Sequence[Generator] | None) -> int | list[int]:
    """Draw the seed of a Brownian motion from a generator, or one a sample from several."""
    check_generators("generator", generator)
    each = list(generator) if isinstance(generator, Sequence) else [generator]
    seeds = [
        int(torch.randint(0, 2**63 - 1, [], generator=one, device="cpu" if one is None else one.device)) for one in each
    ]
    return seeds[0] if len(seeds) == 1 else seeds


@dataclass(frozen=True, eq=False)
class DPMSolverSDEPlan(TwoCallPlan):
    """A run of DPM-Solver++ (SDE); see `TwoCallPlan`."""

    def init_state(self) -> DPMSolverSDEState:
        """See `Plan`."""
        return DPMSolverSDEState()

    def sigma_at(self, index: int) -> float:
        """See `SigmaPlan`."""
        sigma, sigma_next = self.ends_of(index)
        return middle_level(sigma, sigma_next) if index % 2 else sigma

    def advance(
        self,
        sample: Tensor,
        model_output: Tensor,
        index: int,
        state: DPMSolverSDEState,
        generator: Generator | Sequence[Generator] | None,
        draw: Draw,
        s_noise: float = 1.0,
    ) -> StepOutput:
        """See `IndexedPlan`; `s_noise` is the deviation of the noise."""
        sigma, sigma_next = self.ends_of(index)
        middle, first = middle_level(sigma, sigma_next), state.sample is None
        x0 = predict_x0_from_sigma(self.config.prediction_type, sample, model_output, sigma if first else middle)
        if sigma_next == 0:
            return StepOutput(euler_step(sample, x0, sigma, sigma_next), x0, state)
        noise = state.noise_sampler
        if noise is None:
            chosen, levels = self.config.noise_sampler_seed, self.sigmas[self.sigmas > 0]
            chosen = draw_seeds(generator) if chosen is None else chosen
            noise = BrownianNoise(sample, float(levels.min()), float(levels.max()), chosen)
        halfway, start = first and not self.is_last(index), sample if state.sample is None else state.sample
        down, up = ancestral_levels(sigma, middle if halfway else sigma_next)
        begin, *ends = brownian_times(sigma, sigma_next)
        prev_sample = euler_step(start, x0, sigma, down) + s_noise * up * noise(begin, ends[0 if halfway else 1])
        between = DPMSolverSDEState(sample, middle, noise) if halfway else DPMSolverSDEState(noise_sampler=noise)
        return StepOutput(prev_sample, x0, between)


class DPMSolverSDEScheduler(TwoCallSchedulerMixin):
    """DPM-Solver++ for the stochastic equation, with two calls of the network a step; needs torchsde.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        prediction_type: "epsilon", "v_prediction" or "sample".
        use_karras_sigmas: space the noise levels as arXiv:2206.00364 does.
        use_exponential_sigmas: space them evenly in their logarithm.
        use_beta_sigmas: space them as quantiles of a beta distribution; needs SciPy.
        noise_sampler_seed: of the noise, whatever the generator, or several, one a sample; None draws it from the
            generator.
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.

    Raises:
        ImportError: torchsde or SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module.
    """

    PLAN: ClassVar[Any] = DPMSolverSDEPlan
    SPACED_IN: ClassVar[Any] = np.float64

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
        noise_sampler_seed: int | tuple[int, ...] | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        need("torchsde", "DPMSolverSDEScheduler")
        self._make_noise_schedule()
        self.use_karras_sigmas, self.noise_sampler_seed = use_karras_sigmas, noise_sampler_seed
        self._start_full_run()

    def _own_config(self) -> FrozenDict:
        return FrozenDict({**super()._own_config(), "noise_sampler_seed": self.noise_sampler_seed})

    def _second_timesteps(self, numbers: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        return self._timesteps_of((sigmas[:-1] * sigmas[1:]) ** 0.5)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> DPMSolverSDESchedulerOutput | tuple[Tensor, Tensor]:
        """Take the part of a step that follows a call.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents before `scale_model_input`.
            return_dict: return a record, else the tuple of its fields.
            s_noise: deviation of the noise.
            generator: for its seed, one, or one a sample, where `noise_sampler_seed` is None.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or more calls than the run has.
        """
        s_noise = check_number("s_noise", s_noise, 0)
        result = self._take(model_output, timestep, sample, generator, s_noise=s_noise)
        return self._answer(DPMSolverSDESchedulerOutput, result, return_dict)
