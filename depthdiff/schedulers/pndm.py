"""PNDM: linear multistep in pseudo-numerical form, the default of Stable Diffusion 2. Source: arXiv:2202.09778.

The multistep formula needs past predictions. Stable Diffusion makes the first ones by a provisional step that is taken
again (PLMS, `skip_prk_steps`), the paper by three pseudo-Runge-Kutta steps of four calls each.

Below strength 1 the reference, and by default this code, cuts the list of timesteps *after* it has put in the repeated
one; the run is then one stride out of step. `exact` cuts first: with true predictions it ends at the clean latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.checks import show
from depthdiff.schedulers.base import Scheduler
from depthdiff.schedulers.plan import Plan, SchedulerConfig, StepResult, check_past, original_from, spaced

ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (  # newest prediction first; every row sums to 1
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
CALLS = 4
"""Of the network, in one Runge-Kutta step; also the number of steps over which that start extends."""


@dataclass(frozen=True)
class PNDMConfig(SchedulerConfig):
    """diffusers' fields, and `exact` (see the module)."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    exact: bool = field(default=False, kw_only=True)

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SchedulerConfig.CHOICES,
        "prediction_type": ("epsilon", "v_prediction"),
    }


@dataclass(frozen=True)
class PNDMState:
    """What a run remembers.

    Attributes:
        count: of the calls so far.
        history: past predictions, newest first, at most four.
        anchor: latents from which a step is taken again, or a Runge-Kutta step started.
        slope: sum of the present Runge-Kutta step's weighted predictions so far.
    """

    count: int = 0
    history: tuple[Tensor, ...] = ()
    anchor: Tensor | None = None
    slope: Tensor | None = None


@dataclass(frozen=True)
class PNDMPlan(Plan):
    """A run of PNDM; see `Plan`.

    Attributes:
        runge_kutta: the timesteps of the Runge-Kutta calls, before the cut.
    """

    config: PNDMConfig
    alphas_cumprod: Tensor
    stride: int
    runge_kutta: tuple[int, ...]

    def init_state(self) -> PNDMState:
        """See `Plan`."""
        return PNDMState()

    def alpha_bar(self, timestep: float) -> Tensor:
        """Return ᾱ of a timestep, which may lie behind the last one."""
        if timestep >= 0:
            return self.alphas_cumprod[min(int(timestep), len(self.alphas_cumprod) - 1)]
        return torch.tensor(1.0, device="cpu") if self.config.set_alpha_to_one else self.alphas_cumprod[0]

    def check_state(self, state: Any, latents: Tensor) -> None:
        """See `Plan`."""
        if not isinstance(state, PNDMState):
            raise TypeError(f"state must be that of the step before, or init_state() for the first, got {show(state)}")
        check_past([*state.history, *(() if state.anchor is None else (state.anchor,))], latents)

    def noisy(self, clean: Tensor, noise: Tensor) -> Tensor:
        """See `Plan`."""
        alpha_bar = self.alpha_bar(self.numbers[0]).to(clean.dtype)
        return alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise

    def advance(
        self,
        noise_pred: Tensor,
        timestep: float,
        index: int,
        latents: Tensor,
        state: PNDMState,
        generator: Generator | Sequence[Generator] | None,
    ) -> StepResult:
        """Take a step, of the Runge-Kutta start or of the multistep method."""
        if state.count < len(self.runge_kutta):
            return self.advance_runge_kutta(noise_pred, timestep, latents, state)
        here, below = timestep, timestep - self.stride
        if state.count == 1:  # take the provisional step again, with the mean of both slopes
            here, below = timestep + self.stride, timestep
            history = state.history
            slope = (noise_pred + history[0]) / 2
            start = latents if state.anchor is None else state.anchor
        else:
            history = (noise_pred, *state.history)[:4]
            weights = ADAMS_BASHFORTH[len(history) - 1]
            slope = sum((w * past for w, past in zip(weights, history, strict=True)), torch.zeros_like(noise_pred))
            start = latents
        result = self.transfer(start, slope, here, below)
        anchor = latents if state.count == 0 else None
        denoised = self.denoised(latents, noise_pred, timestep)
        return StepResult(result, denoised, PNDMState(state.count + 1, history, anchor))

    def advance_runge_kutta(self, noise_pred: Tensor, timestep: float, latents: Tensor, state: PNDMState) -> StepResult:
        """Take one of the four parts of a pseudo-Runge-Kutta step: arXiv:2202.09778, eq. 13."""
        part = state.count % CALLS
        below = timestep - (0 if part % 2 else self.stride // 2)
        here = self.runge_kutta[state.count - part]
        weighted = RUNGE_KUTTA[part] * noise_pred
        slope = weighted if state.slope is None else state.slope + weighted
        history, anchor = state.history, state.anchor
        if part == 0:
            history, anchor = (noise_pred, *history)[:4], latents
        last = part == CALLS - 1
        start = latents if anchor is None else anchor
        result = self.transfer(start, slope if last else noise_pred, here, below)
        denoised = self.denoised(latents, noise_pred, timestep)
        return StepResult(result, denoised, PNDMState(state.count + 1, history, anchor, None if last else slope))

    def transfer(self, latents: Tensor, slope: Tensor, here: float, below: float) -> Tensor:
        """Move latents from one noise level to another along a predicted noise: arXiv:2202.09778, eq. 9."""
        a, b = self.alpha_bar(here), self.alpha_bar(below)
        if a == b:  # which has no direction where both are 1
            return latents
        if a == 0:
            raise ValueError(f"beta_end must leave some of the image at timestep {here:g}, got pure noise; lower it")
        if self.config.prediction_type == "v_prediction":
            slope = a**0.5 * slope + (1 - a) ** 0.5 * latents
        divisor = a * (1 - b) ** 0.5 + (a * (1 - a) * b) ** 0.5
        return (b / a) ** 0.5 * latents - (b - a) * slope / divisor

    def denoised(self, latents: Tensor, noise_pred: Tensor, timestep: float) -> Tensor:
        """Predict the clean latents."""
        return original_from(self.config.prediction_type, latents, noise_pred, self.alpha_bar(timestep))


class PNDMScheduler(Scheduler):
    """Pseudo-numerical methods for diffusion models; arguments as diffusers' class of this name, and `exact`."""

    config_class = PNDMConfig
    config: PNDMConfig
    gives_denoised = False

    def _make_plan(self, num_inference_steps: int, skipped: int, eta: float, device: torch.device) -> PNDMPlan:
        config, stride = self.config, self.config.num_train_timesteps // num_inference_steps
        base = spaced(config, num_inference_steps).round().astype(int)  # rising
        if config.exact:
            base, skipped = base[: len(base) - skipped], 0
        runge_kutta: list[int] = []
        if config.skip_prk_steps or len(base) < CALLS:
            numbers = np.concatenate([base[:-1], base[-2:-1], base[-1:]])[::-1].tolist()
        else:
            halves = base[-CALLS:].repeat(2) + np.tile([0, stride // 2], CALLS)
            runge_kutta = halves[:-1].repeat(2)[1:-1][::-1].tolist()
            numbers = runge_kutta + base[: 1 - CALLS][::-1].tolist()
        numbers = numbers[skipped:]
        timesteps = torch.tensor(numbers, dtype=torch.int64, device=device)
        return PNDMPlan(timesteps, 1.0, tuple(numbers), config, self.alphas_cumprod, stride, tuple(runge_kutta))
