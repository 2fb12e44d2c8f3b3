"""UniPC: a multistep predictor, and a corrector that uses the next prediction, too. Source: arXiv:2302.04867."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from depthdiff.config import FrozenDict, register_to_config
from depthdiff.schedulers.base import SchedulerOutput, StepOutput
from depthdiff.schedulers.exponential import (
    ExponentialPlan,
    ExponentialSchedulerMixin,
    Rule,
    exponential_step,
    multistep,
    multistep_order,
    newest_first,
    place,
    pushed,
    transfer,
)
from depthdiff.schedulers.indexed import Draw
from depthdiff.schedulers.schedule import check_past


class UniPCState(NamedTuple):
    """State of a run.

    Attributes:
        model_outputs: past predictions, oldest first, None where there is none yet.
        lower_order_nums: how many there are.
        last_sample: (B, C, h, w), the corrected latents before the last step.
        this_order: its order.
    """

    model_outputs: tuple[Tensor | None, ...]
    lower_order_nums: int = 0
    last_sample: Tensor | None = None
    this_order: int = 0


def correct(
    sample: Tensor,
    last_sample: Tensor,
    prediction: Tensor,
    past: Sequence[Tensor],
    sigmas: Sequence[float],
    index: int,
    *,
    data: bool,
    tau: float = 0.0,
    rule: Rule = "exact",
    noise: Tensor | None = None,
) -> Tensor:
    """Take the last step again, with the prediction at its end: an Adams-Moulton method.

    Args:
        sample: (B, C, h, w), at the level `sigmas[index]`, as predicted.
        last_sample: (B, C, h, w), at the level `sigmas[index - 1]`.
        prediction: at the level `sigmas[index]`.
        past: predictions before, newest first, at the levels `sigmas[index - 1]`, `sigmas[index - 2]`, ...
        sigmas: of the whole run.
        index: of the next step.
        data: see `transfer`.
        tau: see `transfer`.
        rule: see `transfer`.
        noise: (B, C, h, w), that of the last step.
    """
    begin, end = sigmas[index - 1], sigmas[index]
    if begin == end:
        return sample
    past = past[: multistep_order(sigmas, index - 1, len(past))]
    step = transfer(begin, end, len(past) + 1, data=data, tau=tau, rule=rule)
    places = [place(sigmas[index - 1 - k], begin, end) for k in range(len(past))]
    return exponential_step(last_sample, step, [*past, prediction], [*places, 1.0], noise)


@dataclass(frozen=True, eq=False)
class UniPCPlan(ExponentialPlan):
    """A run of UniPC; see `ExponentialPlan`."""

    @property
    def data(self) -> bool:
        """See `ExponentialPlan`."""
        return bool(self.config.predict_x0)

    def init_state(self) -> UniPCState:
        """See `Plan`."""
        return UniPCState((None,) * self.config.solver_order)

    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: UniPCState, generator: Any, draw: Draw
    ) -> StepOutput:
        """See `IndexedPlan`: arXiv:2302.04867, algorithms 1 (corrector) and 2 (predictor)."""
        c, sigmas, known = self.config, self.sigmas.tolist(), state.lower_order_nums
        rule: Rule = "linear" if c.solver_type == "bh1" else "midpoint"
        prediction, x0 = self.predict(sample, model_output, index)
        check_past(newest_first(state.model_outputs, 1), sample)
        if state.last_sample is not None and index > 0 and index - 1 not in c.disable_corrector:
            past = newest_first(state.model_outputs, state.this_order)
            sample = correct(sample, state.last_sample, prediction, past, sigmas, index, data=self.data, rule=rule)
        outputs = pushed(state.model_outputs, prediction)
        left = len(sigmas) - 1 - index
        order = min(c.solver_order, known + 1, left if c.lower_order_final else c.solver_order)
        predictions = newest_first(outputs, order)
        prev_sample = multistep(sample, predictions, sigmas, index, data=self.data, rule=rule)
        return StepOutput(prev_sample, x0, UniPCState(outputs, min(known + 1, c.solver_order), sample, order))


class UniPCMultistepScheduler(ExponentialSchedulerMixin):
    """Unified predictor-corrector, multistep.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        solver_order: 1, 2 or 3, of the predictor; the corrector's is one more.
        prediction_type: "epsilon", "v_prediction" or "sample".
        thresholding: clip each sample's clean latents to a quantile of its own; for models of pixels.
        dynamic_thresholding_ratio: that quantile, in [0, 1].
        sample_max_value: the most that `thresholding` lets pass.
        predict_x0: go by the clean latents, else by the noise.
        solver_type: "bh1" or "bh2", how the slope between two predictions counts.
        lower_order_final: lower the order of the last steps.
        disable_corrector: indices of the steps that are not corrected.
        solver_p: must be None; diffusers takes another scheduler as predictor.
        use_karras_sigmas: space the noise levels as arXiv:2206.00364 does.
        use_exponential_sigmas: space them evenly in their logarithm.
        use_beta_sigmas: space them as quantiles of a beta distribution; needs SciPy.
        use_flow_sigmas: must be False, as `use_dynamic_shifting`.
        flow_shift: for flow matching; not used.
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.
        final_sigmas_type: end at "zero" noise, or at "sigma_min", the smallest level of the spacing, or without one
            that of the first training timestep.
        rescale_betas_zero_snr: rescale the betas to end in pure noise.
        use_dynamic_shifting: must be False.
        time_shift_type: for flow matching; not used.
        sigma_min: smallest level of a spacing; that of the training if None.
        sigma_max: largest one.
        shift_terminal: must be None; it is for flow matching.

    Raises:
        ImportError: SciPy is missing.
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: see the module.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ExponentialSchedulerMixin.CHOICES,
        "solver_type": ("bh1", "bh2", "midpoint", "heun", "logrho"),
        "solver_p": (None,),
        "shift_terminal": (None,),
    }
    PLAN: ClassVar[Any] = UniPCPlan
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
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: tuple[int, ...] = (),
        solver_p: Any = None,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float | None = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str | None = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        if solver_type not in ("bh1", "bh2"):
            self.register_to_config(solver_type="bh2")
        self.predict_x0, self.disable_corrector, self.solver_p = predict_x0, list(disable_corrector), solver_p
        self._start(zero_terminal_snr=rescale_betas_zero_snr)

    def _own_config(self) -> Any:
        now = {"disable_corrector": tuple(self.disable_corrector), "predict_x0": self.predict_x0}
        return FrozenDict({**super()._own_config(), **now})

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Correct the last step, and take one step of the run that `set_timesteps` started.

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
