"""LMS: linear multistep on the diffusion's ordinary differential equation.

Source: arXiv:2206.00364 for the equation, crowsonkb/k-diffusion, k_diffusion/sampling.py, `sample_lms` for the method.

Below strength 1 the reference, and by default this code, weighs the first predictions as if there were older ones.
`fix_start` counts those that there are: with true predictions the run ends at the clean latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.checks import check_flag, check_number, show
from depthdiff.config import BaseOutput, FrozenDict, register_to_config
from depthdiff.schedulers.base import SchedulerMixin, StepOutput
from depthdiff.schedulers.schedule import check_pair, check_past
from depthdiff.schedulers.sigmas import SigmaPlan, SigmaSchedulerMixin, predict_x0_from_sigma

ORDER = 4
MAX_ORDER = 20


@dataclass
class LMSDiscreteSchedulerOutput(BaseOutput):
    """Result of `LMSDiscreteScheduler.step`.

    Attributes:
        prev_sample: (B, C, h, w), one step less noisy.
        pred_original_sample: (B, C, h, w), the clean latents as predicted at this step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


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


def lms_step(
    sample: Tensor,
    model_output: Tensor,
    sigmas: Tensor,
    index: int,
    derivatives: tuple[Tensor, ...],
    prediction_type: str,
    *,
    order: int = ORDER,
    fix_start: bool = False,
) -> StepOutput:
    """Take a step along the weighted derivatives d sample / d sigma.

    Args:
        sample: (B, C, h, w), at the level `sigmas[index]`.
        model_output: (B, C, h, w), what the network returned.
        sigmas: (N + 1,), of the whole run, ending in 0.
        index: of the step in the whole run.
        derivatives: past ones, oldest first.
        prediction_type: "epsilon", "v_prediction" or "sample".
        order: how many derivatives are used at most.
        fix_start: give weights only to derivatives that there are.

    Returns:
        A record whose state is the derivatives, with that of this step.
    """
    check_past(derivatives, sample)
    sigma = sigmas[index]
    if sigma == 0:  # a first beta of 0: they are clean already
        return StepOutput(sample, sample, derivatives)
    pred_original_sample = predict_x0_from_sigma(prediction_type, sample, model_output, sigma)
    derivatives = (*derivatives, (sample - pred_original_sample) / sigma)[-order:]
    weights = lms_weights(sigmas.tolist(), index, len(derivatives) if fix_start else min(index + 1, order))
    pairs = zip(weights, reversed(derivatives), strict=False)  # see the module: there may be fewer derivatives
    change = sum((weight * derivative for weight, derivative in pairs), torch.zeros_like(sample))
    return StepOutput(sample + change, pred_original_sample, derivatives)


@dataclass(frozen=True, eq=False)
class LMSPlan(SigmaPlan):
    """A run of LMS; see `SigmaPlan`. Its state is the tuple of past derivatives, oldest first.

    Attributes:
        fix_start: give weights only to derivatives that there are.
    """

    fix_start: bool

    def init_state(self) -> tuple[Tensor, ...]:
        """See `Plan`."""
        return ()

    def step(
        self,
        noise_pred: Tensor,
        index: int,
        latents: Tensor,
        state: tuple[Tensor, ...],
        generator: Generator | Sequence[Generator] | None = None,
    ) -> StepOutput:
        """See `Plan`; LMS draws no noise."""
        index = self._check_step(noise_pred, index, latents) + self.t_start
        if not isinstance(state, tuple) or not all(isinstance(past, Tensor) for past in state):
            raise TypeError(f"state must be that of the step before, or init_state() for the first, got {show(state)}")
        kind = self.config.prediction_type
        return lms_step(latents, noise_pred, self.sigmas, index, state, kind, fix_start=self.fix_start)


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
        use_beta_sigmas: must be False.
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

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SchedulerMixin.CHOICES, "use_beta_sigmas": (False,)}
    ignore_for_config = ("fix_start",)

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

    def _make_plan(
        self, run: np.ndarray, step_ratio: int | None, t_start: int, eta: float, device: torch.device
    ) -> LMSPlan:
        numbers, sigmas = self._make_sigmas(run, step_ratio)
        timesteps = torch.tensor(numbers[t_start:].copy(), dtype=torch.float32, device=device)
        config = FrozenDict(self.config)
        return LMSPlan(timesteps, tuple(numbers[t_start:].tolist()), config, sigmas, t_start, self.fix_start)

    def _start_state(self) -> None:
        self.derivatives: list[Tensor] = []

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
        check_pair("model_output", model_output, "sample", sample)
        order, return_dict = (
            check_number("order", order, 1, MAX_ORDER, whole=True),
            check_flag("return_dict", return_dict),
        )
        self._warn_if_unscaled()
        index, sigmas = self._find_step(timestep), self.sigmas.cpu()
        self._check_left(index)
        past, kind = tuple(self.derivatives), self.config.prediction_type
        result = lms_step(sample, model_output, sigmas, index, past, kind, order=order, fix_start=self.fix_start)
        self._step_index, self.derivatives = index + 1, list(result.state)
        if not return_dict:
            return result.prev_sample, result.pred_original_sample
        return LMSDiscreteSchedulerOutput(result.prev_sample, result.pred_original_sample)

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """Return the weight of one past derivative.

        Args:
            order: how many derivatives are used.
            t: index of the step.
            current_order: of the derivative, 0 for the newest.
        """
        return lms_weights(self.sigmas.tolist(), t, order)[current_order]
