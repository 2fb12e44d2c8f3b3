"""PNDM: linear multistep in pseudo-numerical form, the default of Stable Diffusion 2. Source: arXiv:2202.09778.

The multistep formula needs past predictions. Stable Diffusion makes the first ones by a provisional step that is taken
again (PLMS, `skip_prk_steps`), the paper by three pseudo-Runge-Kutta steps (PRK) of four calls each.

Below strength 1 the reference, and by default this code, cuts the list of timesteps *after* it has put in the repeated
one; the run is then one stride out of step. `fix_start` cuts first: with true predictions it ends at the clean latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.checks import check_flag, check_tensor, show
from depthdiff.config import FrozenDict, register_to_config
from depthdiff.schedulers.base import Plan, SchedulerMixin, SchedulerOutput, StepOutput, Steps
from depthdiff.schedulers.schedule import (
    Levels,
    check_pair,
    check_past,
    noisy_at,
    predict_epsilon,
    predict_x0,
    read_timestep,
)

ADAMS_BASHFORTH: tuple[tuple[int, ...], ...] = (  # newest prediction first; to be divided by the sum of the row
    (1,),
    (3, -1),
    (23, -16, 5),
    (55, -59, 37, -9),
)
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
CALLS = 4
"""Calls of the network in one Runge-Kutta step; also the number of timesteps of the warm-up."""


def pndm_transfer(
    sample: Tensor, model_output: Tensor, alpha_prod_t: Tensor, alpha_prod_t_prev: Tensor, prediction_type: str
) -> Tensor:
    """Move latents from one noise level to another along a predicted noise: arXiv:2202.09778, eq. 9.

    Args:
        sample: (B, C, h, w), at the level of `alpha_prod_t`.
        model_output: (B, C, h, w), the predicted noise, or v.
        alpha_prod_t: 0-d, ᾱ of the level at which the step begins.
        alpha_prod_t_prev: 0-d, ᾱ of the level at which it ends.
        prediction_type: "epsilon" or "v_prediction".

    Raises:
        ValueError: the step begins at pure noise.
    """
    a, b = alpha_prod_t, alpha_prod_t_prev
    if a == b:  # which has no direction where both are 1
        return sample
    if a == 0:
        raise ValueError("beta_end must leave some of the image at the noisiest timestep, got pure noise; lower it")
    epsilon = predict_epsilon(prediction_type, sample, model_output, a)
    return (b / a) ** 0.5 * sample - (b - a) * epsilon / (a * (1 - b) ** 0.5 + (a * (1 - a) * b) ** 0.5)


class PNDMState(NamedTuple):
    """State of a run.

    Attributes:
        counter: of the calls so far.
        ets: past predictions, oldest first, at most four.
        cur_sample: latents from which a step is taken again, or a Runge-Kutta step started.
        cur_model_output: sum of the present Runge-Kutta step's weighted predictions so far.
    """

    counter: int = 0
    ets: tuple[Tensor, ...] = ()
    cur_sample: Tensor | None = None
    cur_model_output: Tensor | float = 0


def plms_step(
    noise_pred: Tensor, timestep: float, latents: Tensor, state: PNDMState, levels: Levels, prediction_type: str
) -> StepOutput:
    """Take a linear multistep step: arXiv:2202.09778, eq. 12."""
    check_past([*state.ets, *(() if state.cur_sample is None else (state.cur_sample,))], latents)
    here, below = timestep, levels.after(timestep)
    if state.counter == 1:  # take the provisional step again, with the mean of both slopes
        here, below = levels.before(timestep), timestep
        ets = state.ets
        slope = (noise_pred + ets[-1]) / 2
        start = latents if state.cur_sample is None else state.cur_sample
    else:
        ets = (*state.ets, noise_pred)[-4:]
        weights = ADAMS_BASHFORTH[len(ets) - 1]
        total = sum((w * past for w, past in zip(weights, reversed(ets), strict=True)), torch.zeros_like(latents))
        slope = total / sum(weights)
        start = latents
    prev_sample = pndm_transfer(start, slope, levels.alpha_prod(here), levels.alpha_prod(below), prediction_type)
    pred_original_sample = predict_x0(prediction_type, latents, noise_pred, levels.alpha_prod(timestep))
    cur_sample = latents if state.counter == 0 else None if state.counter == 1 else state.cur_sample
    state = PNDMState(state.counter + 1, ets, cur_sample, state.cur_model_output)
    return StepOutput(prev_sample, pred_original_sample, state)


def prk_step(
    noise_pred: Tensor,
    timestep: float,
    latents: Tensor,
    state: PNDMState,
    levels: Levels,
    prediction_type: str,
    prk_timesteps: Sequence[int],
) -> StepOutput:
    """Take one of the four parts of a pseudo-Runge-Kutta step: arXiv:2202.09778, eq. 13."""
    check_past([*state.ets, *(() if state.cur_sample is None else (state.cur_sample,))], latents)
    part = state.counter % CALLS
    here, below = prk_timesteps[state.counter - part], timestep
    if part in (0, 2):  # the first and third part end half a step on, where the second and the fourth begin
        below = prk_timesteps[state.counter + 1] if levels.run else timestep - levels.step_ratio // 2
    slope = state.cur_model_output + RUNGE_KUTTA[part] * noise_pred
    ets, cur_sample = state.ets, state.cur_sample
    if part == 0:
        ets, cur_sample = (*ets, noise_pred)[-4:], latents
    start = latents if cur_sample is None else cur_sample
    last = part == CALLS - 1
    along = slope if last else noise_pred
    prev_sample = pndm_transfer(start, along, levels.alpha_prod(here), levels.alpha_prod(below), prediction_type)
    pred_original_sample = predict_x0(prediction_type, latents, noise_pred, levels.alpha_prod(timestep))
    state = PNDMState(state.counter + 1, ets, cur_sample, 0 if last else slope)
    return StepOutput(prev_sample, pred_original_sample, state)


@dataclass(frozen=True, eq=False)
class PNDMPlan(Plan):
    """A run of PNDM; see `Plan`.

    Attributes:
        levels: ᾱ of timesteps, and where steps end.
        prk_timesteps: those of the Runge-Kutta calls, before the cut.
    """

    levels: Levels
    prk_timesteps: tuple[int, ...]

    def init_state(self) -> PNDMState:
        """See `Plan`."""
        return PNDMState()

    def step(
        self,
        noise_pred: Tensor,
        index: int,
        latents: Tensor,
        state: PNDMState,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> StepOutput:
        """See `Plan`; PNDM draws no noise."""
        index = self._check_step(noise_pred, index, latents)
        if not isinstance(state, PNDMState):
            raise TypeError(f"state must be that of the step before, or init_state() for the first, got {show(state)}")
        arguments = noise_pred, self.numbers[index], latents, state, self.levels, self.config.prediction_type
        in_start = state.counter < len(self.prk_timesteps)
        return prk_step(*arguments, self.prk_timesteps) if in_start else plms_step(*arguments)

    def _noisy(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        return noisy_at(clean, noise, self.levels.alpha_prod(self.numbers[index]))


class PNDMScheduler(SchedulerMixin):
    """Pseudo-numerical methods for diffusion models.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        skip_prk_steps: start by a provisional step instead of Runge-Kutta steps.
        set_alpha_to_one: end at ᾱ = 1, else at that of the first training timestep.
        prediction_type: "epsilon" or "v_prediction".
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to every timestep, with "leading" spacing.
        fix_start: start a plan of strength below 1 as the method wants it, not as diffusers does; see the module.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Attributes:
        prk_timesteps: those of the Runge-Kutta calls; None before `set_timesteps`.
        plms_timesteps: those of the multistep calls.
        counter: of the calls in the present run.
        ets: past predictions, oldest first.
        cur_sample: see `PNDMState`.
        cur_model_output: see `PNDMState`.

    Source: arXiv:2202.09778.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SchedulerMixin.CHOICES,
        "prediction_type": ("epsilon", "v_prediction"),
    }
    ignore_for_config = ("fix_start",)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: tuple[float, ...] | None = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        *,
        fix_start: bool = False,
    ) -> None:
        self._make_noise_schedule()
        self.fix_start = fix_start
        if fix_start:  # ours alone: in the config only where it says something
            self.register_to_config(fix_start=True)
        self.final_alpha_cumprod: Any = torch.tensor(1.0, device="cpu") if set_alpha_to_one else self.alphas_cumprod[0]
        self.init_noise_sigma: Any = 1.0
        self.pndm_order = 4
        self._timesteps: np.ndarray = np.arange(num_train_timesteps)[::-1].copy()
        self.timesteps = None
        self.prk_timesteps: np.ndarray | None = None
        self.plms_timesteps: np.ndarray | None = None
        self._set_state(PNDMState())

    def _make_plan(self, steps: Steps, t_start: int, eta: float, device: torch.device) -> PNDMPlan:
        step_ratio = steps.step_ratio
        run: list[int] = steps.timesteps.round().astype(int).tolist()
        if self.fix_start or step_ratio is None:
            run, t_start = run[t_start:], 0
        prk: list[int] = []
        plms = [*run[:2], *run[1:]]  # the second one twice
        if not self.config.skip_prk_steps and len(run) >= CALLS:
            for here, below in itertools.pairwise(run[:CALLS]):
                half = below + ((here - below) if step_ratio is None else step_ratio) // 2
                prk += [here, half, half, below]
            plms = run[CALLS - 1 :]
        numbers = (prk + plms)[t_start:]
        levels = self._levels_of(step_ratio or 0, run if step_ratio is None else ())
        timesteps = torch.tensor(numbers, dtype=torch.int64, device=device)
        return PNDMPlan(timesteps, tuple(numbers), FrozenDict(self.config), levels, tuple(prk))

    def _start_run(self, run: np.ndarray, plan: PNDMPlan) -> None:
        self._timesteps = run.round().astype(int)[::-1].copy()
        self.prk_timesteps = np.array(plan.prk_timesteps, dtype=np.int64)
        self.plms_timesteps = np.array(plan.numbers[len(plan.prk_timesteps) :], dtype=np.int64)
        self._set_state(PNDMState())

    def _set_state(self, state: PNDMState) -> None:
        self.counter, self.cur_sample, self.cur_model_output = state.counter, state.cur_sample, state.cur_model_output
        self.ets = list(state.ets)

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take one step of the run that `set_timesteps` started.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw.
            sample: (B, C, h, w), the latents.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: no run was started, or an argument out of range.
        """
        in_start = self.counter < self._prk_calls() and not self.config.skip_prk_steps
        return (self.step_prk if in_start else self.step_plms)(model_output, timestep, sample, return_dict)

    def step_prk(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take a step of the Runge-Kutta start; arguments and errors as `step`."""
        calls = self._prk_calls()
        if self.num_inference_steps is not None and self.counter >= calls:
            raise ValueError(f"step_prk must be called for {calls} timesteps alone, got one more; call step_plms")
        prk = () if self.prk_timesteps is None else tuple(self.prk_timesteps.tolist())
        return self._take(prk_step, model_output, timestep, sample, return_dict, prk)

    def step_plms(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take a linear multistep step; arguments and errors as `step`."""
        calls = 0 if self.config.skip_prk_steps else self._prk_calls()
        if calls and len(self.ets) < CALLS - 1:
            raise ValueError(
                f"step_plms must come after {calls} calls of step_prk, got {self.counter}; or skip_prk_steps"
            )
        return self._take(plms_step, model_output, timestep, sample, return_dict)

    def _prk_calls(self) -> int:
        return 0 if self.prk_timesteps is None else len(self.prk_timesteps)

    def _take(
        self, step: Any, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool, *more: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take a step of the present run and keep its state."""
        check_pair("model_output", model_output, "sample", sample)
        return_dict = check_flag("return_dict", return_dict)
        state = PNDMState(self.counter, tuple(self.ets), self.cur_sample, self.cur_model_output)
        number, levels = read_timestep(timestep, len(self)), self._levels()
        result = step(model_output, number, sample, state, levels, self.config.prediction_type, *more)
        self._set_state(result.state)
        return SchedulerOutput(result.prev_sample) if return_dict else (result.prev_sample,)

    def _get_prev_sample(self, sample: Tensor, timestep: int, prev_timestep: int, model_output: Tensor) -> Tensor:
        levels = self._levels_of(0, ())
        ends = levels.alpha_prod(timestep), levels.alpha_prod(prev_timestep)
        return pndm_transfer(sample, model_output, *ends, self.config.prediction_type)

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Scale latents (B, C, h, w) to what the network was trained on: as they are."""
        return check_tensor("sample", sample, "(B, C, h, w)")
