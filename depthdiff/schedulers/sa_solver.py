"""SA-Solver: stochastic Adams methods, a predictor and a corrector. Source: arXiv:2309.05019.

How much noise a step adds, tau, may change over the run; by default it is 1 in timesteps 200 to 800, and 0 elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Generator, Tensor

from depthdiff.checks import show
from depthdiff.config import register_to_config
from depthdiff.schedulers.base import SchedulerMixin, SchedulerOutput, StepOutput
from depthdiff.schedulers.dpm_solver import ALGORITHMS, VARIANCES
from depthdiff.schedulers.exponential import (
    ExponentialPlan,
    ExponentialSchedulerMixin,
    Rule,
    multistep,
    newest_first,
    pushed,
)
from depthdiff.schedulers.indexed import Draw
from depthdiff.schedulers.schedule import check_past, noisy_at
from depthdiff.schedulers.unipc import correct

STOCHASTIC = (200, 800)
"""Timesteps between which the default tau is 1. Source: scxue/SA-Solver, the settings of its examples."""


class SASolverState(NamedTuple):
    """State of a run.

    Attributes:
        model_outputs: past predictions, oldest first, None where there is none yet.
        timestep_list: their timesteps, likewise.
        lower_order_nums: how many there are.
        last_sample: (B, C, h, w), the corrected latents before the last step.
        last_noise: (B, C, h, w), the noise of that step.
        this_predictor_order: its order.
        this_corrector_order: the order of its correction.
    """

    model_outputs: tuple[Tensor | None, ...]
    timestep_list: tuple[float | None, ...]
    lower_order_nums: int = 0
    last_sample: Tensor | None = None
    last_noise: Tensor | None = None
    this_predictor_order: int = 0
    this_corrector_order: int = 0


def default_tau(timestep: float) -> float:
    """Return the share of the reverse diffusion's noise at a timestep."""
    return 1.0 if STOCHASTIC[0] <= timestep <= STOCHASTIC[1] else 0.0


@dataclass(frozen=True, eq=False)
class SASolverPlan(ExponentialPlan):
    """A run of SA-Solver; see `ExponentialPlan`.

    Attributes:
        tau_func: timestep -> tau.
        alphas_cumprod: (T,), on the CPU.
    """

    tau_func: Callable[[float], float]
    alphas_cumprod: Tensor

    @property
    def data(self) -> bool:
        """See `ExponentialPlan`."""
        return bool(self.config.algorithm_type == "data_prediction")

    def _noisy(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        return noisy_at(clean, noise, self.alphas_cumprod[int(self.numbers[index])])  # as in diffusers, by the timestep

    def init_state(self) -> SASolverState:
        """See `Plan`."""
        nothing = (None,) * max(self.config.predictor_order, self.config.corrector_order - 1)
        return SASolverState(nothing, nothing)

    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: SASolverState, generator: Any, draw: Draw
    ) -> StepOutput:
        """See `IndexedPlan`: arXiv:2309.05019, algorithm 1."""
        c, sigmas, known = self.config, self.sigmas.tolist(), state.lower_order_nums
        prediction, x0 = self.predict(sample, model_output, index)
        rule: Rule = "linear" if self.data else "exact"
        check_past(newest_first(state.model_outputs, 1), sample)
        before = state.timestep_list[-1]
        how: dict[str, Any] = {"data": self.data, "rule": rule}
        if state.last_sample is not None and before is not None:
            past = newest_first(state.model_outputs, state.this_corrector_order - 1)
            last: dict[str, Any] = {"tau": self.tau_func(before), "noise": state.last_noise}
            sample = correct(sample, state.last_sample, prediction, past, sigmas, index, **how, **last)
        outputs, number = pushed(state.model_outputs, prediction), self.number_at(index)
        left = len(sigmas) - 1 - index if c.lower_order_final else math.inf
        predictor = int(min(c.predictor_order, left, known + 1))
        corrector = int(min(c.corrector_order, left + 1, known + 2))
        noise = draw(model_output.dtype)
        past, tau = newest_first(outputs, predictor), self.tau_func(number)
        prev_sample = multistep(sample, past, sigmas, index, **how, tau=tau, noise=noise)
        numbers = (*state.timestep_list[1:], number)
        kept = SASolverState(outputs, numbers, min(known + 1, len(outputs)), sample, noise, predictor, corrector)
        return StepOutput(prev_sample, x0, kept)


class SASolverScheduler(ExponentialSchedulerMixin):
    """Stochastic Adams solver.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        predictor_order: from 1 to 4.
        corrector_order: from 1 to 4.
        prediction_type: "epsilon", "v_prediction" or "sample".
        tau_func: timestep -> tau, the share of the reverse diffusion's noise; see the module for None.
        thresholding: clip each sample's clean latents to a quantile of its own; for models of pixels.
        dynamic_thresholding_ratio: that quantile, in [0, 1].
        sample_max_value: the most that `thresholding` lets pass.
        algorithm_type: "data_prediction" or "noise_prediction".
        lower_order_final: lower the order of the last steps.
        use_karras_sigmas: space the noise levels as arXiv:2206.00364 does.
        use_exponential_sigmas: space them evenly in their logarithm.
        use_beta_sigmas: space them as quantiles of a beta distribution; needs SciPy.
        use_flow_sigmas: must be False.
        flow_shift: for flow matching; not used.
        lambda_min_clipped: smallest half log-SNR that a run may begin with.
        variance_type: "learned" or "learned_range" if the network returns a variance beside, which is not used.
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.

    Raises:
        ImportError: SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module. Runs end at the noise level of the first training timestep.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ExponentialSchedulerMixin.CHOICES,
        "algorithm_type": ("data_prediction", "noise_prediction", *ALGORITHMS, "deis"),
        "variance_type": VARIANCES,
    }
    PLAN: ClassVar[Any] = SASolverPlan
    rounded_timesteps: ClassVar[tuple[str, ...]] = ("use_karras_sigmas",)
    ignore_for_config = ("tau_func",)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        predictor_order: int = 2,
        corrector_order: int = 2,
        prediction_type: str = "epsilon",
        tau_func: Any = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "data_prediction",
        lower_order_final: bool = True,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float | None = 1.0,
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        if tau_func is not None and not callable(tau_func):
            raise TypeError(f"tau_func must be a function of the timestep, or None, got {show(tau_func)}")
        if algorithm_type not in ("data_prediction", "noise_prediction"):
            kind = "data_prediction" if algorithm_type.endswith("++") else "noise_prediction"
            self.register_to_config(algorithm_type=kind)
        self.tau_func: Callable[[float], float] = default_tau if tau_func is None else tau_func
        self._start()

    def _more_of_plan(self, eta: float) -> dict[str, Any]:
        return {"tau_func": self.tau_func, "alphas_cumprod": self.alphas_cumprod.cpu().clone()}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Make clean latents (B, C, h, w) as noisy as training timesteps (B,) say: arXiv:2006.11239, eq. 4."""
        return SchedulerMixin.add_noise(self, original_samples, noise, timesteps)

    def _plan_as_it_is(self) -> Any:
        return dataclasses.replace(super()._plan_as_it_is(), tau_func=self.tau_func)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Correct the last step, and take one step of the run that `set_timesteps` started.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents.
            generator: for the noise that is added, one, or one a sample.
            return_dict: return a record, else a tuple of its field.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: no run was started, an argument out of range, or more steps than the run has.
        """
        result = self._take(model_output, timestep, sample, generator)
        return self._answer(SchedulerOutput, result, return_dict, alone=True)
