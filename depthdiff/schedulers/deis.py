"""DEIS in log-rho: the exponential integrator through the last predictions of the noise. Source: arXiv:2204.13902.

rho is sigma here, so a polynomial in log(rho) is one in lambda, and the second order is that of DPM-Solver ("heun").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from depthdiff.config import register_to_config
from depthdiff.schedulers.base import SchedulerOutput, StepOutput
from depthdiff.schedulers.dpm_solver import ALGORITHMS, FEW_STEPS, DPMSolverState
from depthdiff.schedulers.exponential import (
    ExponentialPlan,
    ExponentialSchedulerMixin,
    multistep,
    newest_first,
    pushed,
)
from depthdiff.schedulers.indexed import Draw
from depthdiff.schedulers.schedule import check_past


@dataclass(frozen=True, eq=False)
class DEISPlan(ExponentialPlan):
    """A run of DEIS; see `ExponentialPlan`."""

    @property
    def data(self) -> bool:
        """See `ExponentialPlan`."""
        return False

    def init_state(self) -> DPMSolverState:
        """See `Plan`."""
        return DPMSolverState((None,) * self.config.solver_order)

    def order_at(self, index: int, known: int) -> int:
        """Return the order of a step of the whole run that has `known` past predictions."""
        c, left = self.config, len(self.sigmas) - 1 - index
        most = left if c.lower_order_final and len(self.sigmas) - 1 < FEW_STEPS else c.solver_order
        return min(c.solver_order, known + 1, most)

    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: DPMSolverState, generator: Any, draw: Draw
    ) -> StepOutput:
        """See `IndexedPlan`: arXiv:2204.13902, eq. 14 and 15, with the integrals in closed form."""
        known = state.lower_order_nums
        epsilon, x0 = self.predict(sample, model_output, index)
        check_past(newest_first(state.model_outputs, known), sample)
        outputs = pushed(state.model_outputs, epsilon)
        past = newest_first(outputs, self.order_at(index, known))
        prev_sample = multistep(sample, past, self.sigmas.tolist(), index, data=False)
        return StepOutput(prev_sample, x0, DPMSolverState(outputs, min(known + 1, self.config.solver_order)))


class DEISMultistepScheduler(ExponentialSchedulerMixin):
    """Diffusion exponential integrator sampler, multistep.

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
        algorithm_type: "deis".
        solver_type: "logrho".
        lower_order_final: lower the order at the end of runs of fewer than 15 steps.
        use_karras_sigmas: space the noise levels as arXiv:2206.00364 does.
        use_exponential_sigmas: space them evenly in their logarithm.
        use_beta_sigmas: space them as quantiles of a beta distribution; needs SciPy.
        use_flow_sigmas: must be False, as `use_dynamic_shifting`.
        flow_shift: for flow matching; not used.
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.
        use_dynamic_shifting: must be False.
        time_shift_type: for flow matching; not used.

    Raises:
        ImportError: SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module. Runs end at the noise level of the first training timestep.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ExponentialSchedulerMixin.CHOICES,
        "algorithm_type": ("deis", *ALGORITHMS),
        "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
    }
    PLAN: ClassVar[Any] = DEISPlan
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
        algorithm_type: str = "deis",
        solver_type: str = "logrho",
        lower_order_final: bool = True,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float | None = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self.register_to_config(algorithm_type="deis", solver_type="logrho")
        self._start()

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take one step of the run that `set_timesteps` started.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents.
            return_dict: return a record, else a tuple of its field.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: no run was started, or more steps than the run has.
        """
        return self._answer(SchedulerOutput, self._take(model_output, timestep, sample), return_dict, alone=True)
