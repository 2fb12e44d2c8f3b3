"""Base of the solvers in terms of sigma = sqrt((1 - ᾱ) / ᾱ): noise levels, their plan, diffusers' contract.

In these terms noisy latents are clean + sigma noise, and a run is an ordinary differential equation in sigma
(arXiv:2206.00364, eq. 1). Letters are as in `depthdiff.schedulers.schedule`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from depthdiff.checks import check_dense, check_tensor, show
from depthdiff.config import MAX_LENGTH, BaseOutput
from depthdiff.schedulers.base import SchedulerMixin, Steps
from depthdiff.schedulers.indexed import IndexedPlan, IndexedSchedulerMixin
from depthdiff.schedulers.schedule import TABLE, check_pair
from depthdiff.schedulers.spacing import SPACINGS, exponential_sigmas, karras_sigmas

SMALLEST_ALPHA_CUMPROD = 2.0**-24
"""What `rescale_betas_zero_snr` leaves of the image, where levels are ratios to it."""


@dataclass
class SigmaSchedulerOutput(BaseOutput):
    """Result of the `step` of a scheduler that goes over noise levels.

    Attributes:
        prev_sample: (B, C, h, w), one step less noisy.
        pred_original_sample: (B, C, h, w), the clean latents as predicted at this step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def predict_x0_from_sigma(prediction_type: str, sample: Tensor, model_output: Tensor, sigma: Tensor | float) -> Tensor:
    """Predict the clean latents from clean + sigma noise. Source: arXiv:2206.00364, table 1, c_skip and c_out."""
    if prediction_type == "epsilon":
        return sample - sigma * model_output
    if prediction_type == "v_prediction":
        return model_output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
    if prediction_type in ("sample", "original_sample"):
        return model_output
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")


def slope(sample: Tensor, pred_original_sample: Tensor, sigma: Tensor | float) -> Tensor:
    """Return d sample / d sigma, which is the noise; 0 at sigma 0: arXiv:2206.00364, eq. 3."""
    return torch.zeros_like(sample) if sigma == 0 else (sample - pred_original_sample) / sigma


def ancestral_levels(sigma: float, sigma_next: float) -> tuple[float, float]:
    """Split a step into one down to a lower level and noise that leads up to `sigma_next`: both deviations.

    Source: crowsonkb/k-diffusion, k_diffusion/sampling.py, `get_ancestral_step` with eta 1; arXiv:2006.11239, eq. 7.
    """
    variance = 0.0 if sigma == 0 else sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2
    return (sigma_next**2 - variance) ** 0.5, variance**0.5


def middle_level(sigma: float, sigma_next: float) -> float:
    """Return the level halfway in the logarithm; 0 where the step ends there."""
    return (sigma * sigma_next) ** 0.5


@dataclass(frozen=True, eq=False)
class SigmaPlan(IndexedPlan):
    """A run over noise levels; see `Plan`.

    Attributes:
        sigmas: float32, of the whole run; `sigmas[i]` is that of its call i, and the last one that of its end.
    """

    sigmas: Tensor

    @property
    def init_noise_sigma(self) -> float:
        """See `Plan`."""
        return float(initial_sigma(self.sigmas, self.config.timestep_spacing))

    def sigma(self, index: int) -> float:
        """Return the noise level that the network sees at a step of this plan."""
        return self.sigma_at(index + self.t_start)

    def sigma_at(self, index: int) -> float:
        """Return the noise level that the network sees at an index of the whole run."""
        return float(self.sigmas[index])

    def scale_model_input(self, latents: Tensor, index: int) -> Tensor:
        """Scale to unit variance: arXiv:2206.00364, table 1, c_in."""
        return latents / (torch.tensor(self.sigma(index), **TABLE) ** 2 + 1) ** 0.5

    def _noisy(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        return clean + noise * torch.tensor(self.sigma(index), dtype=clean.dtype)


def initial_sigma(sigmas: Tensor, timestep_spacing: str) -> Tensor:
    """Return the deviation of the first latents; with "leading" spacing they are not pure noise."""
    largest = sigmas.max()
    return largest if timestep_spacing in ("linspace", "trailing") else (largest**2 + 1) ** 0.5


def _check_ends(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min and sigma_max must rise from above 0, got {sigma_min:g} and {sigma_max:g}")


class SigmaSchedulerMixin(IndexedSchedulerMixin):
    """Base of the schedulers whose runs go over noise levels.

    A constructor ends with `_start_full_run`.

    Attributes:
        sigmas: float32, the noise levels of the present run, and that of its end.
        is_scale_input_called: whether `scale_model_input` was called in the present run.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SchedulerMixin.CHOICES,
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    PLAN: ClassVar[Any] = SigmaPlan
    CALLS: ClassVar[int] = 1
    """Calls of the network for each step but the last."""
    SPACED_IN: ClassVar[Any] = np.float32
    """Dtype of the timesteps at whose levels a run is."""
    rounded_timesteps: ClassVar[tuple[str, ...]] = ()
    """Spacings whose timesteps are rounded."""
    fractional_timesteps: ClassVar[bool] = True
    timestep_dtype: ClassVar[torch.dtype] = torch.float32
    sigmas: Tensor

    def _start_full_run(self) -> None:
        """Start with a run over all timesteps of the training."""
        self._check_spacing()
        self.set_timesteps(len(self))

    def _check_spacing(self) -> None:
        """Refuse two spacings at once, one whose package is missing, and one between levels that do not rise."""
        chosen = [name for name in SPACINGS if self._own(name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; choose one")
        if chosen:
            SPACINGS[chosen[0]](1.0, 0.1, 2)
        low, high = self._own("sigma_min"), self._own("sigma_max")
        if chosen and None not in (low, high):
            _check_ends(low, high)

    def _make_noise_schedule(self, *, zero_terminal_snr: bool = False) -> None:
        super()._make_noise_schedule(zero_terminal_snr=zero_terminal_snr)
        if zero_terminal_snr:
            self.alphas_cumprod[-1] = SMALLEST_ALPHA_CUMPROD

    def _most_steps(self) -> int:
        """Return how many steps a run may have: with "linspace" spacing levels between those of the training count."""
        return MAX_LENGTH if self.config.timestep_spacing == "linspace" else len(self)

    def _train_sigmas(self) -> np.ndarray:
        """Compute the noise level of every training timestep: (T,), rising."""
        alphas_cumprod = self.alphas_cumprod.cpu()
        levels: np.ndarray = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()
        if not np.isfinite(levels).all() or (levels[0] == 0 and self._spacing):
            kind = "some noise at the first timestep" if levels[0] == 0 else "some of the image at the last timestep"
            raise ValueError(f"beta_start, beta_end and trained_betas must leave {kind}; choose others")
        return levels

    @property
    def _spacing(self) -> str | None:
        """The setting that spaces the noise levels, so that timesteps follow from them."""
        return next((name for name in SPACINGS if self._own(name)), None)

    def _space(self, ends: np.ndarray, count: int) -> np.ndarray:
        """Space noise levels between the first and the last of `ends`, or the config's own."""
        sigma_max, sigma_min = self.config.get("sigma_max"), self.config.get("sigma_min")
        high = float(ends[0]) if sigma_max is None else sigma_max
        low = float(ends[-1]) if sigma_min is None else sigma_min
        if count > 1:
            _check_ends(low, high)
        return SPACINGS[str(self._spacing)](high, low, count)

    def _timesteps_of(self, sigmas: np.ndarray) -> np.ndarray:
        """Return the fractional timesteps of noise levels."""
        return self._sigma_to_t(sigmas, np.log(np.maximum(self._train_sigmas(), 1e-10)))

    def _make_sigmas(self, steps: Steps) -> tuple[np.ndarray, np.ndarray]:
        """Return the timesteps of a run, and its noise levels with that of its end."""
        if steps.sigmas is not None:
            return self._timesteps_of(steps.sigmas[:-1]), steps.sigmas
        spacing, levels, numbers = self._spacing, self._train_sigmas(), steps.timesteps.astype(self.SPACED_IN)
        if steps.step_ratio is None and spacing:
            raise ValueError(f"timesteps must be None with {spacing}, which chooses them")
        sigmas = self._levels_at(numbers, levels)
        if spacing:
            sigmas = self._space(self._ends(sigmas, levels), len(numbers))
            numbers = self._timesteps_of(sigmas)
            if spacing in self.rounded_timesteps:
                numbers = numbers.round()
        return numbers, np.append(sigmas, self._last_sigma(sigmas, levels))

    def _ends(self, sigmas: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Return the levels between whose first and last a spacing spaces: those of the run, or of the training."""
        return sigmas

    def _levels_at(self, numbers: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Return the noise levels of timesteps, linear between those of the training."""
        return np.interp(numbers, np.arange(len(levels)), levels)

    def _last_sigma(self, sigmas: np.ndarray, levels: np.ndarray) -> float:
        """Return the noise level at which a run ends."""
        return float(levels[0]) if self._own("final_sigmas_type", "zero") == "sigma_min" else 0.0

    def _convert_to_karras(self, in_sigmas: np.ndarray | Tensor, num_inference_steps: int | None = None) -> np.ndarray:
        return karras_sigmas(float(in_sigmas[0]), float(in_sigmas[-1]), num_inference_steps or len(in_sigmas))

    def _convert_to_exponential(self, in_sigmas: np.ndarray | Tensor, num_inference_steps: int) -> np.ndarray:
        return exponential_sigmas(float(in_sigmas[0]), float(in_sigmas[-1]), num_inference_steps)

    def _sigma_to_t(self, sigma: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
        """Return the fractional timesteps of noise levels, linear in their logarithm above the last one reached."""
        wanted = np.log(np.maximum(sigma, 1e-10))
        reached = wanted[..., None] >= log_sigmas
        last = len(log_sigmas) - 1 - np.argmax(reached[..., ::-1], axis=-1)
        below = np.where(reached.any(axis=-1), last, 0).clip(max=len(log_sigmas) - 2)
        low, high = log_sigmas[below], log_sigmas[below + 1]
        share = np.clip((low - wanted) / (low - high), 0, 1)
        return np.asarray((1 - share) * below + share * (below + 1))

    def _make_plan(self, steps: Steps, t_start: int, eta: float, device: torch.device) -> Any:
        return self._plan_of(*self._calls_of(*self._make_sigmas(steps)), t_start * self.CALLS, eta, device)

    def _plan_of(self, numbers: np.ndarray, sigmas: np.ndarray, t_start: int, eta: float, device: torch.device) -> Any:
        """Plan a run over timesteps and levels whose first `t_start` calls are left out."""
        timesteps = torch.tensor(numbers[t_start:].copy()).to(self.timestep_dtype)
        return self.PLAN(
            timesteps=timesteps.to(device),
            numbers=tuple(timesteps.tolist()),
            config=self._own_config(),
            t_start=t_start,
            sigmas=torch.tensor(sigmas, **TABLE),
            **self._more_of_plan(eta),
        )

    def _calls_of(self, numbers: np.ndarray, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return timesteps and noise levels of every call of the network, and the level of the end."""
        return numbers, sigmas

    def _more_of_plan(self, eta: float) -> dict[str, Any]:
        """Return what else the plan of this method holds."""
        return {}

    def _start_run(self, run: np.ndarray, plan: Any) -> None:
        super()._start_run(run, plan)
        self.sigmas = plan.sigmas
        self.is_scale_input_called = False

    def _plan_as_it_is(self) -> Any:
        return dataclasses.replace(self._plan, config=self._own_config(), sigmas=self.sigmas.cpu())

    # diffusers' contract

    @property
    def init_noise_sigma(self) -> Any:
        """Deviation of the noise from which a run without an image starts, 0-d."""
        return initial_sigma(self.sigmas, self.config.timestep_spacing)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:  # type: ignore[override]
        """Scale latents to unit variance: arXiv:2206.00364, table 1, c_in."""
        check_tensor("sample", sample, "(B, C, h, w)")
        sigma = torch.tensor(self._sigma_of(self._find_step(timestep)), **TABLE)
        self.is_scale_input_called = True
        return sample / (sigma**2 + 1) ** 0.5

    def _sigma_of(self, index: int) -> float:
        """Return the noise level that the network sees at a step of the present run."""
        sigma: float = self._plan_as_it_is().sigma_at(min(index, len(self.sigmas) - 1))
        return sigma

    def _warn_if_unscaled(self) -> None:
        if not self.is_scale_input_called:
            warnings.warn("call scale_model_input before step, or the network sees unscaled latents", stacklevel=3)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Make clean latents (B, C, h, w) as noisy as `timesteps` (B,) of the present run say.

        After `set_begin_index` the noise is that of the next step, whatever the timesteps.
        """
        check_pair("original_samples", original_samples, "noise", noise)
        sigmas = self.sigmas.to(original_samples.device, original_samples.dtype)
        indices = self._indices_of(timesteps, len(original_samples))
        sigmas = sigmas[indices]
        if self._begin_index is not None:  # also within a step, whose level the table of the ends does not have
            sigmas = torch.full_like(sigmas, self._plan_as_it_is().sigma_at(indices[0]))
        return self._mix(original_samples, noise, sigmas.view(-1, *(1,) * (original_samples.ndim - 1)))

    def _mix(self, original_samples: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return original_samples + noise * sigmas

    def _indices_of(self, timesteps: Tensor, batch: int) -> list[int]:
        """Return the index of each of the timesteps of a batch."""
        if not isinstance(timesteps, Tensor):
            raise TypeError(f"timesteps must be a tensor (B,), got {show(timesteps)}")
        check_dense("timesteps", timesteps)
        wanted = timesteps.flatten().tolist()
        if len(wanted) not in (1, batch):
            raise ValueError(f"timesteps must be one, or one for each of {batch} samples, got {len(wanted)}")
        return self._places(wanted)

    def _places(self, wanted: Sequence[float]) -> list[int]:
        if self._begin_index is not None:
            return [self._begin_index if self._step_index is None else self._step_index] * len(wanted)
        numbers = self.timesteps.tolist()
        unknown = [one for one in wanted if one not in numbers]
        if unknown:
            raise ValueError(
                f"timesteps must be among those of this run ({len(numbers)}, {numbers[0]:g} to {numbers[-1]:g}), got "
                f"{unknown[:3]}"
            )
        return [self.index_for_timestep(one) for one in wanted]
