"""DPM-Solver and DPM-Solver++ with intermediate points, each of which is a step of the run here.

Source: arXiv:2206.00927 (DPM-Solver) and arXiv:2211.01095 (DPM-Solver++, algorithm 1), and for the third order
LuChengTHU/dpm-solver, dpm_solver_pytorch.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Generator, Tensor

from depthdiff.config import register_to_config
from depthdiff.schedulers.base import SchedulerOutput, StepOutput
from depthdiff.schedulers.dpm_solver import DPMSolverPlan, DPMSolverSchedulerMixin
from depthdiff.schedulers.exponential import exponential_step, newest_first, place, pushed, transfer
from depthdiff.schedulers.indexed import Draw
from depthdiff.schedulers.schedule import check_past


class SinglestepState(NamedTuple):
    """State of a run of the singlestep solver.

    Attributes:
        model_outputs: past predictions, oldest first, None where there is none yet.
        sample: (B, C, h, w), the latents at the beginning of the present group of calls.
    """

    model_outputs: tuple[Tensor | None, ...]
    sample: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DPMSolverSinglestepPlan(DPMSolverPlan):
    """A run of the singlestep solver; see `ExponentialPlan`."""

    def init_state(self) -> SinglestepState:
        """See `Plan`."""
        return SinglestepState((None,) * self.config.solver_order)

    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: SinglestepState, generator: Any, draw: Draw
    ) -> StepOutput:
        """See `IndexedPlan`: arXiv:2211.01095, algorithm 1, whose intermediate points are steps of the run here."""
        prediction, x0 = self.predict(sample, model_output, index)
        check_past(newest_first(state.model_outputs, 1), sample)
        outputs = pushed(state.model_outputs, prediction)
        order = self.orders()[index]
        past = newest_first(outputs, order)
        order = len(past)
        base = sample if order == 1 or state.sample is None else state.sample
        noise = draw(sample.dtype) if self.tau else None
        sigmas = self.sigmas[index - order + 1 : index + 2].tolist()
        prev_sample = self._group_step(base, past[::-1], sigmas, noise)
        return StepOutput(prev_sample, x0, SinglestepState(outputs, base))

    def _group_step(self, base: Tensor, past: Sequence[Tensor], sigmas: Sequence[float], noise: Any) -> Tensor:
        """Step from the beginning of a group of calls to the last of its levels, along the predictions between."""
        begin, end = sigmas[0], sigmas[-1]
        if begin == end:
            return base
        chosen = list(zip(sigmas[:-1], past, strict=True))
        rule = self.rule
        if len(chosen) == 3 and rule == "midpoint":  # the line through the first and the last
            chosen, rule = [chosen[0], chosen[2]], "exact"
        step = transfer(begin, end, len(chosen), data=self.data, tau=self.tau, rule=rule)
        places = [place(sigma, begin, end) for sigma, _ in chosen]
        return exponential_step(base, step, [prediction for _, prediction in chosen], places, noise)

    def orders(self) -> list[int]:
        """Return the order of every step of the whole run."""
        return singlestep_orders(len(self.sigmas) - 1, self.config)


def singlestep_orders(steps: int, config: Mapping[str, Any]) -> list[int]:
    """Divide a run into groups of calls of rising order, of which the last one may be cut.

    Source: arXiv:2206.00927, sec. 3.4 and appendix D.1, as diffusers cuts it.
    """
    order, ends_at_zero = config["solver_order"], config["final_sigmas_type"] == "zero"
    lower = config["lower_order_final"] or steps % order or ends_at_zero
    groups = steps // order - (1 if lower and steps % order == 0 else 0)
    rest = steps - groups * order
    last = {1: [1], 2: [1, 2], 3: [1, 2, 1]}[rest] if rest else []
    if order == 2 and rest == 2:
        last = [1, 1]
    orders = [*range(1, order + 1)] * groups + last
    return [*orders[:-1], 1] if ends_at_zero else orders


class DPMSolverSinglestepScheduler(DPMSolverSchedulerMixin):
    """Singlestep DPM-Solver and DPM-Solver++, whose calls between two steps count as steps.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        solver_order: 1, 2 or 3, which is also the number of calls of a group.
        prediction_type: "epsilon", "v_prediction" or "sample".
        thresholding: clip each sample's clean latents to a quantile of its own; for models of pixels.
        dynamic_thresholding_ratio: that quantile, in [0, 1].
        sample_max_value: the most that `thresholding` lets pass.
        algorithm_type: see `DPMSolverMultistepScheduler`.
        solver_type: "midpoint" or "heun".
        lower_order_final: lower the order of the last calls; they are anyway where N is no multiple of the order, or a
            run ends at zero noise.
        use_karras_sigmas: space the noise levels as arXiv:2206.00364 does.
        use_exponential_sigmas: space them evenly in their logarithm.
        use_beta_sigmas: space them as quantiles of a beta distribution; needs SciPy.
        use_flow_sigmas: must be False, as `use_dynamic_shifting`.
        flow_shift: for flow matching; not used.
        final_sigmas_type: end at "zero" noise, or at "sigma_min", that of the first training timestep.
        lambda_min_clipped: smallest half log-SNR that a run may begin with.
        variance_type: "learned" or "learned_range" if the network returns a variance beside, which is not used.
        use_dynamic_shifting: must be False.
        time_shift_type: for flow matching; not used.

    Raises:
        ImportError: SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module.
    """

    PLAN: ClassVar[Any] = DPMSolverSinglestepPlan
    rounded_timesteps: ClassVar[tuple[str, ...]] = ("use_karras_sigmas",)

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
        lower_order_final: bool = False,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float | None = 1.0,
        final_sigmas_type: str | None = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._start_dpm_solver()

    def get_order_list(self, num_inference_steps: int) -> list[int]:
        """Return the order of every step of a run of N steps."""
        return singlestep_orders(num_inference_steps, self.config)

    @property
    def order_list(self) -> list[int]:
        """The order of every step of the present run."""
        return self.get_order_list(len(self.sigmas) - 1)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the part of a step that follows a call.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents.
            generator: for the noise that stochastic algorithms add, one, or one a sample.
            return_dict: return a record, else a tuple of its field.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: no run was started, an argument out of range, or more steps than the run has.
        """
        result = self._take(model_output, timestep, sample, generator)
        return self._answer(SchedulerOutput, result, return_dict, alone=True)
