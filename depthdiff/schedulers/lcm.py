"""Few-step solvers of distilled networks: LCM, which adds fresh noise after each step, and TCD, which adds some.

Source: arXiv:2310.04378 (latent consistency models, algorithm 3) and arXiv:2402.19159 (trajectory consistency
distillation, algorithm 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.checks import check_number
from depthdiff.config import BaseOutput, register_to_config
from depthdiff.schedulers.base import SchedulerMixin, StepOutput, Steps
from depthdiff.schedulers.indexed import Draw, IndexedPlan, IndexedSchedulerMixin
from depthdiff.schedulers.schedule import (
    check_timesteps,
    clip_x0,
    dynamic_threshold,
    noisy_at,
    predict_epsilon,
    predict_x0,
    read_steps,
)

SIGMA_DATA = 0.5
"""Source: arXiv:2310.04378, appendix."""


@dataclass
class LCMSchedulerOutput(BaseOutput):
    """Result of `LCMScheduler.step`.

    Attributes:
        prev_sample: (B, C, h, w), one step less noisy.
        denoised: (B, C, h, w), the clean latents as predicted at this step.
    """

    prev_sample: Tensor
    denoised: Tensor | None = None


@dataclass
class TCDSchedulerOutput(BaseOutput):
    """Result of `TCDScheduler.step`.

    Attributes:
        prev_sample: (B, C, h, w), one step less noisy.
        pred_noised_sample: (B, C, h, w), the latents before the noise of this step.
    """

    prev_sample: Tensor
    pred_noised_sample: Tensor | None = None


def boundary_scalings(timestep: float, timestep_scaling: float) -> tuple[float, float]:
    """Return c_skip and c_out, by which a consistency function is the identity at 0: arXiv:2310.04378, eq. 9."""
    scaled = timestep * timestep_scaling
    return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5


@dataclass(frozen=True, eq=False)
class DistilledPlan(IndexedPlan):
    """A run over timesteps of a distilled network; see `Plan`. There is no state.

    Attributes:
        whole: the timesteps of the whole run.
        alphas_cumprod: (T,), on the CPU.
        eta: share of fresh noise; only TCD reads it.
    """

    whole: tuple[int, ...]
    alphas_cumprod: Tensor
    eta: float

    def _noisy(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        return noisy_at(clean, noise, self.alphas_cumprod[self.whole[index + self.t_start]])

    def is_last(self, index: int) -> bool:
        """Return whether a step of the whole run is its last one."""
        return index == len(self.whole) - 1


@dataclass(frozen=True, eq=False)
class LCMPlan(DistilledPlan):
    """A run of LCM; see `DistilledPlan`."""

    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: None, generator: Any, draw: Draw
    ) -> StepOutput:
        """See `IndexedPlan`: arXiv:2310.04378, algorithm 3."""
        c, timestep = self.config, self.whole[index]
        alpha_prod_t = self.alphas_cumprod[timestep]
        x0 = clip_x0(predict_x0(c.prediction_type, sample, model_output, alpha_prod_t), c)
        c_skip, c_out = boundary_scalings(timestep, c.timestep_scaling)
        denoised = c_out * x0 + c_skip * sample
        if self.is_last(index):
            return StepOutput(denoised, denoised, None)
        alpha_prod_t_prev = self.alphas_cumprod[self.whole[index + 1]]
        noise = draw(denoised.dtype)
        return StepOutput(alpha_prod_t_prev**0.5 * denoised + (1 - alpha_prod_t_prev) ** 0.5 * noise, denoised, None)


@dataclass(frozen=True, eq=False)
class TCDPlan(DistilledPlan):
    """A run of TCD; see `DistilledPlan`."""

    def advance(
        self,
        sample: Tensor,
        model_output: Tensor,
        index: int,
        state: None,
        generator: Any,
        draw: Draw,
        eta: float | None = None,
    ) -> StepOutput:
        """See `IndexedPlan`: arXiv:2402.19159, algorithm 4, whose gamma is eta. It predicts the less noisy latents."""
        eta = self.eta if eta is None else eta
        last, kind = self.is_last(index), self.config.prediction_type
        end = 0 if last else self.whole[index + 1]
        alpha_prod_t, alpha_prod_end, alpha_prod_s = (
            self.alphas_cumprod[timestep] for timestep in (self.whole[index], end, int((1 - eta) * end))
        )
        x0 = predict_x0(kind, sample, model_output, alpha_prod_t)
        epsilon = predict_epsilon(kind, sample, model_output, alpha_prod_t)
        pred_noised_sample = alpha_prod_s**0.5 * x0 + (1 - alpha_prod_s) ** 0.5 * epsilon
        if eta == 0 or last:
            return StepOutput(pred_noised_sample, pred_noised_sample, None)
        kept = alpha_prod_end / alpha_prod_s
        noisy = kept**0.5 * pred_noised_sample + (1 - kept) ** 0.5 * draw(sample.dtype)
        return StepOutput(noisy, pred_noised_sample, None)


class DistilledSchedulerMixin(IndexedSchedulerMixin):
    """Base of the schedulers of distilled networks, whose runs take their timesteps out of those of the distillation.

    Attributes:
        final_alpha_cumprod: ᾱ at the end, as in other schedulers; not used.
    """

    PLAN: ClassVar[Any]
    POSITIVE: ClassVar[tuple[str, ...]] = ("clip_sample_range", "sample_max_value", "original_inference_steps")
    _compatibles: ClassVar[list[str]] = []
    custom_timesteps: bool

    def _start(self) -> None:
        """Set the attributes of a scheduler without a run."""
        c = self.config
        check_number("dynamic_thresholding_ratio", c.dynamic_thresholding_ratio, 0.0, 1.0)
        check_number("original_inference_steps", c.original_inference_steps, 1, c.num_train_timesteps, whole=True)
        self._make_noise_schedule(zero_terminal_snr=c.rescale_betas_zero_snr)
        self.final_alpha_cumprod = torch.tensor(1.0, device="cpu") if c.set_alpha_to_one else self.alphas_cumprod[0]
        self.init_noise_sigma: Any = 1.0
        run = self.timesteps
        self._start_run(run.numpy(), self._make_plan(Steps(run.numpy(), None), 0, 0.0, torch.device("cpu")))

    def _most_steps(self) -> int:
        return int(self.config.original_inference_steps)

    def _spaced_timesteps(self, count: int) -> np.ndarray:
        return self._out_of_distillation(count, self.config.original_inference_steps, 1.0)

    def _out_of_distillation(self, count: int, original_inference_steps: int, strength: float) -> np.ndarray:
        """Return timesteps evenly out of those of the distillation: arXiv:2310.04378, sec. 4.3."""
        distance = len(self) // original_inference_steps
        originals = np.arange(1, int(original_inference_steps * strength) + 1)[::-1] * distance - 1
        if count > len(originals):
            raise ValueError(
                f"num_inference_steps must be at most {len(originals)}, the steps of the distillation "
                f"(original_inference_steps) at this strength, got {count}; take fewer, or raise that number"
            )
        return originals[np.floor(np.linspace(0, len(originals), num=count, endpoint=False)).astype(int)]

    def _make_plan(self, steps: Steps, t_start: int, eta: float, device: torch.device) -> Any:
        run = self._whole_timesteps(steps)
        return self.PLAN(
            timesteps=torch.tensor(run[t_start:], dtype=torch.int64, device=device),
            numbers=tuple(run[t_start:]),
            config=self._own_config(),
            t_start=t_start,
            whole=tuple(run),
            alphas_cumprod=self.alphas_cumprod.cpu().clone(),
            eta=eta,
        )

    _check_started = SchedulerMixin._check_started

    def _plan_as_it_is(self) -> Any:
        plan, now = super()._plan_as_it_is(), self.timesteps
        whole = plan.whole if now is plan.timesteps else tuple(now.tolist())
        return dataclasses.replace(plan, whole=whole, alphas_cumprod=self.alphas_cumprod.cpu())

    def set_timesteps(  # type: ignore[override]
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[float] | np.ndarray | Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        """Start a run; `timesteps` is then what the network is to see.

        Args:
            num_inference_steps: N.
            device: of the timesteps; None is the CPU.
            original_inference_steps: of the distillation, out of which a run takes its steps; the config's if None.
            timesteps: of the caller's own, instead of N: falling whole numbers in [0, T-1], each once.
            strength: in (0, 1], take the N steps from the last ones of the distillation; with `timesteps`, run the
                last ones.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: one out of range, both or neither of N and `timesteps`, or more steps than there are.
        """
        strength = check_number("strength", strength, 0, 1)
        given = original_inference_steps
        originals = self.config.original_inference_steps if given is None else given
        originals = check_number("original_inference_steps", originals, 1, len(self), whole=True)
        if (num_inference_steps is None) == (timesteps is None):
            both = "both" if timesteps is not None else "neither"
            raise ValueError(f"num_inference_steps or timesteps must be given, one of them, got {both}")
        if timesteps is not None:
            run = check_timesteps(timesteps, len(self))
            run = run[len(run) - int(len(run) * strength) :]
            if not len(run):
                raise ValueError(f"strength must keep one of the timesteps at least, got {strength}; raise it")
        else:
            run = self._run_of(read_steps(num_inference_steps, len(self)), originals, strength, given)
        self._set_steps(Steps(run, None), device)
        self.custom_timesteps = timesteps is not None

    def _run_of(self, count: int, originals: int, strength: float, given: int | None) -> np.ndarray:
        """Return the timesteps of N steps; `given` is the caller's own number of original ones."""
        return self._out_of_distillation(count, originals, strength)

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        return dynamic_threshold(sample, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)

    def previous_timestep(self, timestep: Tensor | int) -> Tensor:
        """Return the timestep at which the step from this one ends, 0-d; -1 after the last."""
        return self._previous_timestep(timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute v, what a network of prediction type "v_prediction" learns: arXiv:2202.00512, appendix D."""
        return self._velocity(sample, noise, timesteps)


class LCMScheduler(DistilledSchedulerMixin):
    """Latent consistency models.

    Args:
        num_train_timesteps: T.
        beta_start: variance that the first training timestep adds.
        beta_end: variance that the last one adds.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: T numbers to use instead.
        original_inference_steps: of the distillation, out of which a run takes its steps.
        clip_sample: clip the predicted clean latents; for models of pixels.
        clip_sample_range: where.
        set_alpha_to_one: not used, as in diffusers.
        steps_offset: not used, as in diffusers.
        prediction_type: "epsilon", "v_prediction" or "sample".
        thresholding: clip each sample to a quantile of its own; for models of pixels.
        dynamic_thresholding_ratio: that quantile, in [0, 1].
        sample_max_value: the most that `thresholding` lets pass.
        timestep_spacing: not used, as in diffusers.
        timestep_scaling: of timesteps in c_skip and c_out.
        rescale_betas_zero_snr: rescale the betas to end in pure noise.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: arXiv:2310.04378.
    """

    PLAN: ClassVar[Any] = LCMPlan

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: tuple[float, ...] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._start()

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the run that `set_timesteps` started.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents.
            generator: for the noise that is added, one, or one a sample.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: no run was started, an argument out of range, or more steps than the run has.
        """
        return self._answer(LCMSchedulerOutput, self._take(model_output, timestep, sample, generator), return_dict)


class TCDScheduler(DistilledSchedulerMixin):
    """Trajectory consistency distillation.

    Args:
        num_train_timesteps: T, as all the others in `LCMScheduler`.
        beta_start: see there.
        beta_end: see there.
        beta_schedule: see there.
        trained_betas: see there.
        original_inference_steps: see there.
        clip_sample: not used, as in diffusers.
        clip_sample_range: not used, as in diffusers.
        set_alpha_to_one: not used, as in diffusers.
        steps_offset: not used, as in diffusers.
        prediction_type: see there.
        thresholding: not used, as in diffusers.
        dynamic_thresholding_ratio: not used, as in diffusers.
        sample_max_value: not used, as in diffusers.
        timestep_spacing: not used, as in diffusers.
        timestep_scaling: not used, as in diffusers.
        rescale_betas_zero_snr: see there.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one.
        ValueError: one out of range, or not implemented.

    Source: arXiv:2402.19159.
    """

    PLAN: ClassVar[Any] = TCDPlan

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: tuple[float, ...] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._start()

    def _run_of(self, count: int, originals: int, strength: float, given: int | None) -> np.ndarray:
        """Return the timesteps of N steps, as diffusers out of all of the training where the caller gives a number."""
        return self._out_of_distillation(count, originals if given is None else len(self), strength)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the run that `set_timesteps` started.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw; it counts at the first step only.
            sample: (B, C, h, w), the latents.
            eta: in [0, 1], the paper's gamma: 0 adds no noise, 1 is LCM but for its scalings.
            generator: for the noise that is added, one, or one a sample.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            IndexError: the first timestep is not one of this run.
            TypeError: an argument of a wrong type.
            ValueError: no run was started, an argument out of range, or more steps than the run has.
        """
        eta = check_number("eta", eta, 0, 1)
        result = self._take(model_output, timestep, sample, generator, eta=eta)
        return self._answer(TCDSchedulerOutput, result, return_dict)
