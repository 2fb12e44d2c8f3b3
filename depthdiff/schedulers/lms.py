"""LMS: linear multistep on the diffusion's ordinary differential equation.

Source: arXiv:2206.00364 for the equation, crowsonkb/k-diffusion, k_diffusion/sampling.py, `sample_lms` for the method.

Below strength 1 the reference, and by default this code, weighs the first predictions as if there were older ones.
`fix_start` counts those that there are: with true predictions the run ends at the clean latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from depthdiff.checks import check_number
from depthdiff.config import register_to_config
from depthdiff.schedulers.base import StepOutput
from depthdiff.schedulers.indexed import Draw
from depthdiff.schedulers.schedule import check_pair, check_past
from depthdiff.schedulers.sigmas import (
    SigmaPlan,
    SigmaSchedulerMixin,
    SigmaSchedulerOutput,
    predict_x0_from_sigma,
    slope,
)

ORDER = 4
MAX_ORDER = 20


class LMSDiscreteSchedulerOutput(SigmaSchedulerOutput):
    """Result of `LMSDiscreteScheduler.step`."""


def lms_weights(sigmas: Sequence[float], index: int, order: int) -> list[float]:
    """Integrate the Lagrange polynomials of the last `order` noise levels over the next step.

    Args:
        sigmas: of all steps, and 0.
        index: of the step.
        order: how many predictions to use; their weights come newest first.

    Raises:
        ValueError: two of these levels are equal.

    Returns:
        `order` numbers, whose sum is the change in sigma. The integrands are polynomials of degree `order` - 1, for
        which the Gauss-Legendre rule of half as many points is exact.
    """
    start, end = sigmas[index], sigmas[index + 1]
    middle, half = (start + end) / 2, (end - start) / 2
    roots, shares = np.polynomial.legendre.leggauss((order + 1) // 2)
    nodes = [(middle + half * float(root), half * float(share)) for root, share in zip(roots, shares, strict=True)]
    levels = [sigmas[index - k] for k in range(order)]
    if len(set(levels)) < len(levels):
        raise ValueError(f"noise levels must fall from step to step, got {levels[::-1]}; take fewer steps")
    weights = []
    for here in levels:
        others = [level for level in levels if level != here]
        weights.append(sum(share * math.prod((x - level) / (here - level) for level in others) for x, share in nodes))
    return weights


class LMSState(NamedTuple):
    """State of a run.

    Attributes:
        derivatives: past derivatives d latents / d sigma, oldest first.
    """

    derivatives: tuple[Tensor, ...] = ()


def lms_step(
    sample: Tensor, derivatives: Sequence[Tensor], sigmas: Sequence[float], index: int, order: int, fix_start: bool
) -> Tensor:
    """Take a step along the weighted derivatives d sample / d sigma.

    Args:
        sample: (B, C, h, w), at the level `sigmas[index]`.
        derivatives: at most `order`, oldest first, that of this step last.
        sigmas: of the whole run, and that of its end.
        index: of the step in the whole run.
        order: how many derivatives are used at most.
        fix_start: give weights only to derivatives that there are.
    """
    weights = lms_weights(sigmas, index, len(derivatives) if fix_start else min(index + 1, order))
    pairs = zip(weights, reversed(derivatives), strict=False)  # see the module: there may be fewer derivatives
    return sample + sum((weight * derivative for weight, derivative in pairs), torch.zeros_like(sample))


@dataclass(frozen=True, eq=False)
class LMSPlan(SigmaPlan):
    """A run of LMS; see `SigmaPlan`.

    Attributes:
        fix_start: give weights only to derivatives that there are.
    """

    fix_start: bool
    widens: ClassVar[bool] = False  # as in diffusers

    def init_state(self) -> LMSState:
        """See `Plan`."""
        return LMSState()

    def advance(
        self,
        sample: Tensor,
        model_output: Tensor,
        index: int,
        state: LMSState,
        generator: Any,
        draw: Draw,
        order: int = ORDER,
    ) -> StepOutput:
        """See `IndexedPlan`; LMS draws no noise."""
        check_past(state.derivatives, sample)
        sigmas = self.sigmas.tolist()
        if sigmas[index] == 0:  # a first beta of 0: they are clean already
            return StepOutput(sample, sample, state)
        x0 = predict_x0_from_sigma(self.config.prediction_type, sample, model_output, self.sigmas[index])
        derivatives = (*state.derivatives, slope(sample, x0, self.sigmas[index]))[-order:]
        prev_sample = lms_step(sample, derivatives, sigmas, index, order, self.fix_start)
        return StepOutput(prev_sample, x0, LMSState(derivatives))


class LMSDiscreteScheduler(SigmaSchedulerMixin):
    """Linear multistep method for discrete noise levels.

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
        fix_start: start a run of strength below 1 as the method wants it, not as diffusers does; see the module.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Attributes:
        derivatives: past derivatives d latents / d sigma, oldest first.

    Source: see the module.
    """

    PLAN: ClassVar[Any] = LMSPlan
    ignore_for_config = ("fix_start",)
    derivatives: list[Tensor]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        *,
        fix_start: bool = False,
    ) -> None:
        self._make_noise_schedule()
        self.use_karras_sigmas = use_karras_sigmas
        self.fix_start = fix_start
        if fix_start:  # ours alone: in the config only where it says something
            self.register_to_config(fix_start=True)
        self._start_full_run()

    def _plan_as_it_is(self) -> Any:
        return dataclasses.replace(super()._plan_as_it_is(), fix_start=self.fix_start)

    def _more_of_plan(self, eta: float) -> dict[str, Any]:
        return {"fix_start": self.fix_start}

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        order: int = ORDER,
        return_dict: bool = True,
    ) -> LMSDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the present run.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents before `scale_model_input`.
            order: how many predictions to use at most.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or more steps than the run has.
        """
        order = check_number("order", order, 1, MAX_ORDER, whole=True)
        check_pair("model_output", model_output, "sample", sample)
        self._warn_if_unscaled()
        result = self._take(model_output, timestep, sample, order=order)
        return self._answer(LMSDiscreteSchedulerOutput, result, return_dict)

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """Return the weight of one past derivative.

        Args:
            order: how many derivatives are used.
            t: index of the step.
            current_order: of the derivative, 0 for the newest.
        """
        return lms_weights(self.sigmas.tolist(), t, order)[current_order]
