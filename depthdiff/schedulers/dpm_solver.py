"""DPM-Solver and DPM-Solver++, ordinary and stochastic: multistep, and its inverse.

Source: arXiv:2206.00927 (DPM-Solver) and arXiv:2211.01095 (DPM-Solver++, algorithm 2), and for the third order
LuChengTHU/dpm-solver, dpm_solver_pytorch.py.

That code counts the curvature of the third-order multistep solver by half of its integral, and so does diffusers, and
so does this code: the method is then of second order. `fix_order` counts all of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.config import register_to_config
from depthdiff.schedulers.base import SchedulerOutput, StepOutput
from depthdiff.schedulers.exponential import (
    ExponentialPlan,
    ExponentialSchedulerMixin,
    multistep,
    newest_first,
    pushed,
)
from depthdiff.schedulers.indexed import Draw
from depthdiff.schedulers.schedule import TABLE, check_past, make_timesteps

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
VARIANCES = (None, "learned", "learned_range", "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
FEW_STEPS = 15
"""Below which `lower_order_final` counts."""


class DPMSolverState(NamedTuple):
    """State of a run of the multistep solver.

    Attributes:
        model_outputs: past predictions, oldest first, None where there is none yet.
        lower_order_nums: how many there are.
    """

    model_outputs: tuple[Tensor | None, ...]
    lower_order_nums: int = 0


@dataclass(frozen=True, eq=False)
class DPMSolverPlan(ExponentialPlan):
    """Base of the plans of both solvers; see `ExponentialPlan`."""

    @property
    def data(self) -> bool:
        """See `ExponentialPlan`."""
        return str(self.config.algorithm_type).endswith("++")

    @property
    def tau(self) -> float:
        """Share of the reverse diffusion's noise."""
        return 1.0 if str(self.config.algorithm_type).startswith("sde") else 0.0

    @property
    def rule(self) -> Any:
        """How the slope between two predictions counts."""
        return "midpoint" if self.config.solver_type == "midpoint" else "exact"


@dataclass(frozen=True, eq=False)
class DPMSolverMultistepPlan(DPMSolverPlan):
    """A run of the multistep solver; see `ExponentialPlan`.

    Attributes:
        sigma_min: noise level of the first training timestep, at which an inverted run begins.
        share: of the curvature's integral that counts; see the module.
    """

    sigma_min: float
    share: float

    def init_state(self) -> DPMSolverState:
        """See `Plan`."""
        return DPMSolverState((None,) * self.config.solver_order)

    def order_at(self, index: int, known: int) -> int:
        """Return the order of a step of the whole run that has `known` past predictions: arXiv:2211.01095, sec. 4.2."""
        c, left = self.config, len(self.sigmas) - 1 - index
        few = c.lower_order_final and len(self.sigmas) - 1 < FEW_STEPS
        ends_at_zero = c.get("final_sigmas_type") == "zero"
        most = 1 if left == 1 and (c.euler_at_final or few or ends_at_zero) else 2 if left == 2 and few else 3
        return min(c.solver_order, known + 1, most)

    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: DPMSolverState, generator: Any, draw: Draw
    ) -> StepOutput:
        """See `IndexedPlan`."""
        known = state.lower_order_nums
        prediction, x0 = self.predict(sample, model_output, index)
        check_past(newest_first(state.model_outputs, known), sample)
        outputs = pushed(state.model_outputs, prediction)
        past = newest_first(outputs, self.order_at(index, known))
        noise = draw(sample.dtype) if self.tau else None
        how: dict[str, Any] = {"data": self.data, "tau": self.tau, "rule": self.rule, "share": self.share}
        prev_sample = multistep(sample, past, self.sigmas.tolist(), index, **how, noise=noise)
        return StepOutput(prev_sample, x0, DPMSolverState(outputs, min(known + 1, self.config.solver_order)))

    def inverted(self) -> DPMSolverMultistepPlan:
        """Return the plan that leads from the clean latents, taken for those of the smallest noise level, back.

        The network sees the timestep of each step's cleaner end; only a run of small steps leads back to its noise.

        Raises:
            ValueError: noise is added on the way, or the run does not end at 0 or the first training timestep.

        Source: arXiv:2206.00927, run backwards.
        """
        if self.tau:
            kind = self.config.algorithm_type
            raise ValueError(f"algorithm_type must be dpmsolver or dpmsolver++ for a plan to be inverted, got {kind}")
        last, first = float(self.sigmas[-1]), self.sigma_min
        if last > 1.001 * first:
            raise ValueError(
                f"sigmas must end at 0 or {first:.3g}, where the training begins, to be inverted, got {last:.3g}"
            )
        levels = torch.tensor([first, *self.sigmas[self.t_start : -1].flip(0).tolist()], **TABLE)
        numbers = (0.0, *self.numbers[:0:-1])
        timesteps = torch.tensor(numbers).to(self.timesteps)
        config = type(self.config)({**self.config, "final_sigmas_type": "sigma_min"})
        plan = dataclasses.replace(self, timesteps=timesteps, numbers=numbers, sigmas=levels, t_start=0, config=config)
        return plan


class DPMSolverSchedulerMixin(ExponentialSchedulerMixin):
    """Base of the schedulers of both solvers."""

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ExponentialSchedulerMixin.CHOICES,
        "algorithm_type": (*ALGORITHMS, "deis"),
        "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
        "variance_type": VARIANCES,
    }

    def _start_dpm_solver(self) -> None:
        """Translate the settings of other solvers, and set the attributes of a scheduler without a run."""
        c = self.config
        if c.algorithm_type == "deis":
            self.register_to_config(algorithm_type="dpmsolver++")
        if c.solver_type not in ("midpoint", "heun"):
            self.register_to_config(solver_type="midpoint")
        if not str(c.algorithm_type).endswith(("++", "deis")) and self._own("final_sigmas_type") == "zero":
            raise ValueError(
                f'final_sigmas_type must be "sigma_min" with algorithm_type {c.algorithm_type!r}, got "zero", where '
                'predicted noise says nothing; or choose "dpmsolver++"'
            )
        self._start(zero_terminal_snr=bool(self._own("rescale_betas_zero_snr")))


class DPMSolverMultistepScheduler(DPMSolverSchedulerMixin):
    """Multistep DPM-Solver and DPM-Solver++.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        solver_order: 1, 2 or 3.
        prediction_type: "epsilon", "v_prediction" or "sample".
        thresholding: clip each sample's clean latents to a quantile of its own; for models of pixels.
        dynamic_thresholding_ratio: that quantile, in [0, 1].
        sample_max_value: the most that `thresholding` lets pass.
        algorithm_type: "dpmsolver" goes by the noise, "dpmsolver++" by the clean latents; "sde-dpmsolver" and
            "sde-dpmsolver++" add noise on the way.
        solver_type: "midpoint" or "heun", of the second order.
        lower_order_final: lower the order at the end of runs of fewer than 15 steps.
        euler_at_final: take the last step by the first order.
        use_karras_sigmas: space the noise levels as arXiv:2206.00364 does.
        use_exponential_sigmas: space them evenly in their logarithm.
        use_beta_sigmas: space them as quantiles of a beta distribution; needs SciPy.
        use_lu_lambdas: space them evenly in their logarithm, with rounded timesteps.
        use_flow_sigmas: must be False, as `use_dynamic_shifting`.
        flow_shift: for flow matching; not used.
        final_sigmas_type: end at "zero" noise, or at "sigma_min", that of the first training timestep.
        lambda_min_clipped: smallest half log-SNR that a run may begin with.
        variance_type: "learned" or "learned_range" if the network returns a variance beside, which is not used.
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.
        rescale_betas_zero_snr: rescale the betas to end in pure noise.
        use_dynamic_shifting: must be False.
        time_shift_type: for flow matching; not used.
        fix_order: reach the third order with `solver_order` 3; see the module.

    Raises:
        ImportError: SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module.
    """

    PLAN: ClassVar[Any] = DPMSolverMultistepPlan
    ignore_for_config: ClassVar[Sequence[str]] = ("fix_order",)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_lu_lambdas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float | None = 1.0,
        final_sigmas_type: str | None = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        *,
        fix_order: bool = False,
    ) -> None:
        self.fix_order = fix_order
        if fix_order:  # ours alone: in the config only where it says something
            self.register_to_config(fix_order=True)
        self._start_dpm_solver()

    @property
    def rounded_timesteps(self) -> tuple[str, ...]:  # type: ignore[override]
        """Spacings whose timesteps are rounded."""
        return () if self.config.beta_schedule == "squaredcos_cap_v2" else ("use_karras_sigmas", "use_lu_lambdas")

    def _plan_as_it_is(self) -> Any:
        return dataclasses.replace(super()._plan_as_it_is(), share=1.0 if self.fix_order else 0.5)

    def _more_of_plan(self, eta: float) -> dict[str, Any]:
        return {"sigma_min": float(self._train_sigmas()[0]), "share": 1.0 if self.fix_order else 0.5}

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take one step of the run that `set_timesteps` started.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents.
            generator: for the noise that stochastic algorithms add, one, or one a sample.
            variance_noise: (B, C, h, w), that noise itself, instead of a generator.
            return_dict: return a record, else a tuple of its field.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: no run was started, an argument out of range, or more steps than the run has.
        """
        result = self._take(model_output, timestep, sample, generator, variance_noise)
        return self._answer(SchedulerOutput, result, return_dict, alone=True)


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """Multistep DPM-Solver run backwards, from clean latents to noise.

    Args:
        num_train_timesteps: T, as all the others in `DPMSolverMultistepScheduler`.
        beta_start: see there.
        beta_end: see there.
        beta_schedule: see there.
        trained_betas: see there.
        solver_order: see there.
        prediction_type: see there.
        thresholding: see there.
        dynamic_thresholding_ratio: see there.
        sample_max_value: see there.
        algorithm_type: "dpmsolver" or "dpmsolver++".
        solver_type: see there.
        lower_order_final: see there.
        euler_at_final: see there.
        use_karras_sigmas: see there.
        use_exponential_sigmas: see there.
        use_beta_sigmas: see there.
        use_flow_sigmas: must be False.
        flow_shift: not used.
        lambda_min_clipped: see there.
        variance_type: see there.
        timestep_spacing: see there.
        steps_offset: see there.

    Raises:
        ImportError: SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Attributes:
        noisiest_timestep: the last one of a run's training timesteps.

    Source: arXiv:2206.00927, run backwards.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DPMSolverMultistepScheduler.CHOICES,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "deis"),
    }
    ignore_for_config: ClassVar[Sequence[str]] = ()

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
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
        self.fix_order = False
        self._start_dpm_solver()

    def _start_run(self, run: np.ndarray, plan: Any) -> None:
        super()._start_run(run, plan)
        self.noisiest_timestep = self._last_timestep() - 1

    def _spaced_timesteps(self, count: int) -> np.ndarray:
        if self.config.timestep_spacing == "trailing":
            return super()._spaced_timesteps(count)
        last, offset = self._last_timestep(), self.config.steps_offset
        spaced = make_timesteps(count + 1, last, self.config.timestep_spacing, 0)[1:].round()
        return spaced + (offset if self.config.timestep_spacing == "leading" else 0)

    def _calls_of(self, numbers: np.ndarray, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noisiest = self._train_sigmas()[self._last_timestep() - 1]
        last = sigmas[0] if self._spacing else noisiest
        return numbers[::-1], np.append(sigmas[:-1][::-1], last)
