"""Base of the solvers in terms of sigma = sqrt((1 - ᾱ) / ᾱ): noise levels, their plan, diffusers' contract.

In these terms noisy latents are clean + sigma noise, and a run is an ordinary differential equation in sigma
(arXiv:2206.00364, eq. 1). Letters are as in `depthdiff.schedulers.schedule`.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from depthdiff.checks import check_dense, check_number, check_tensor, show
from depthdiff.config import MAX_LENGTH
from depthdiff.schedulers.base import Plan, SchedulerMixin
from depthdiff.schedulers.schedule import TABLE, check_pair, read_timestep

LOGARITHMIC = ("use_karras_sigmas", "use_exponential_sigmas")
"""Settings that space noise levels, and let timesteps follow from them."""

KARRAS_RHO = 7.0
"""Source: arXiv:2206.00364, sec. 5.1."""


def karras_sigmas(sigma_max: float, sigma_min: float, count: int) -> np.ndarray:
    """Space noise levels evenly in their rho-th root: (count,), falling. Source: arXiv:2206.00364, eq. 5."""
    roots = np.linspace(sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO), count)
    return roots**KARRAS_RHO


def exponential_sigmas(sigma_max: float, sigma_min: float, count: int) -> np.ndarray:
    """Space noise levels evenly in their logarithm: (count,), falling."""
    levels: np.ndarray = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))
    return levels


def predict_x0_from_sigma(prediction_type: str, sample: Tensor, model_output: Tensor, sigma: Tensor) -> Tensor:
    """Predict the clean latents from clean + sigma noise. Source: arXiv:2206.00364, table 1, c_skip and c_out."""
    if prediction_type == "epsilon":
        return sample - sigma * model_output
    if prediction_type == "v_prediction":
        return model_output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
    if prediction_type == "sample":
        return model_output
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")


@dataclass(frozen=True, eq=False)
class SigmaPlan(Plan):
    """A run over noise levels; see `Plan`.

    Attributes:
        sigmas: (N + 1,), float32, of the whole run, ending in 0.
        t_start: how many of its steps are left out.
    """

    sigmas: Tensor
    t_start: int

    @property
    def init_noise_sigma(self) -> float:
        """See `Plan`."""
        return float(initial_sigma(self.sigmas, self.config.timestep_spacing))

    def scale_model_input(self, latents: Tensor, index: int) -> Tensor:
        """Scale to unit variance: arXiv:2206.00364, table 1, c_in."""
        return latents / (self.sigmas[self.t_start + index] ** 2 + 1) ** 0.5

    def _noisy(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        return clean + noise * self.sigmas[self.t_start + index].to(clean.dtype)


def initial_sigma(sigmas: Tensor, timestep_spacing: str) -> Tensor:
    """Return the deviation of the first latents; with "leading" spacing they are not pure noise."""
    largest = sigmas.max()
    return largest if timestep_spacing in ("linspace", "trailing") else (largest**2 + 1) ** 0.5


class SigmaSchedulerMixin(SchedulerMixin):
    """Base of the schedulers whose runs go over noise levels.

    A constructor ends with `_start_full_run`.

    Attributes:
        sigmas: (N + 1,), float32, the noise levels of the present run, ending in 0.
        is_scale_input_called: whether `scale_model_input` was called in the present run.
    """

    fractional_timesteps: ClassVar[bool] = True
    sigmas: Tensor

    def _start_full_run(self) -> None:
        """Start with a run over all timesteps of the training."""
        if all(self.config.get(name) for name in LOGARITHMIC):
            raise ValueError(f"{' and '.join(LOGARITHMIC)} exclude each other; choose one")
        self.set_timesteps(len(self))

    def _most_steps(self) -> int:
        """Return how many steps a run may have: with "linspace" spacing levels between those of the training count."""
        return MAX_LENGTH if self.config.timestep_spacing == "linspace" else len(self)

    def _train_sigmas(self) -> np.ndarray:
        """Compute the noise level of every training timestep: (T,), rising."""
        alphas_cumprod = self.alphas_cumprod.cpu()
        levels: np.ndarray = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()
        if not np.isfinite(levels).all() or (levels[0] == 0 and self._by_logarithm):
            kind = "some noise at the first timestep" if levels[0] == 0 else "some of the image at the last timestep"
            raise ValueError(f"beta_start, beta_end and trained_betas must leave {kind}; choose others")
        return levels

    @property
    def _by_logarithm(self) -> bool:
        """Return whether the sigmas are spaced directly and the timesteps follow from them."""
        return any(self.config.get(name) for name in LOGARITHMIC)

    def _make_sigmas(self, run: np.ndarray, step_ratio: int | None) -> tuple[np.ndarray, Tensor]:
        """Return the timesteps of a run as float32, and its noise levels, ending in 0."""
        if step_ratio is None and self._by_logarithm:
            raise ValueError(
                "timesteps must be None with use_karras_sigmas or use_exponential_sigmas, which choose them"
            )
        levels, numbers = self._train_sigmas(), run.astype(np.float32)
        sigmas = np.interp(numbers, np.arange(len(levels)), levels)
        if self.config.get("use_karras_sigmas"):
            sigmas = self._convert_to_karras(sigmas)
        elif self.config.get("use_exponential_sigmas"):
            sigmas = self._convert_to_exponential(sigmas, len(sigmas))
        if self._by_logarithm:
            numbers = self._sigma_to_t(sigmas, np.log(levels)).astype(np.float32)
        return numbers, torch.tensor(np.append(sigmas, 0.0), **TABLE)

    def _convert_to_karras(self, in_sigmas: np.ndarray | Tensor) -> np.ndarray:
        return karras_sigmas(float(in_sigmas[0]), float(in_sigmas[-1]), len(in_sigmas))

    def _convert_to_exponential(self, in_sigmas: np.ndarray | Tensor, num_inference_steps: int) -> np.ndarray:
        return exponential_sigmas(float(in_sigmas[0]), float(in_sigmas[-1]), num_inference_steps)

    def _sigma_to_t(self, sigma: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
        """Return the fractional timesteps of noise levels, linear in their logarithm."""
        return np.asarray(np.interp(np.log(np.maximum(sigma, 1e-10)), log_sigmas, np.arange(len(log_sigmas))))

    def _start_run(self, run: np.ndarray, plan: Any) -> None:
        self.sigmas = plan.sigmas
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.is_scale_input_called = False
        self._start_state()

    @abstractmethod
    def _start_state(self) -> None:
        """Set what the method remembers to what it is before the first step."""

    # diffusers' contract

    @property
    def init_noise_sigma(self) -> Tensor:
        """Deviation of the noise from which a run without an image starts, 0-d."""
        return initial_sigma(self.sigmas, self.config.timestep_spacing)

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where `set_begin_index` gave it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the timestep at which the loop begins."""
        self._begin_index = check_number("begin_index", begin_index, 0, len(self.timesteps) - 1, whole=True)

    def index_for_timestep(self, timestep: Tensor | float, schedule_timesteps: Tensor | None = None) -> int:
        """Return the index of a timestep of the run; of the second one where it is there twice.

        Raises:
            IndexError: it is not there.
        """
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        number = read_timestep(timestep, math.inf, whole=False)
        places = [i for i, one in enumerate(timesteps.tolist()) if one == number]
        if not places:
            raise IndexError(f"timestep must be one of `timesteps`, got {number}; take them from there, unrounded")
        return places[min(1, len(places) - 1)]

    def _init_step_index(self, timestep: Tensor | float) -> None:
        self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _find_step(self, timestep: Tensor | float) -> int:
        """Return the index of the next step; that of the first one is looked up."""
        if self._step_index is None:
            self._init_step_index(timestep)
        index: Any = self._step_index
        return index

    def _check_left(self, index: int) -> None:
        """Refuse a step after the last."""
        if index >= len(self.sigmas) - 1:
            raise ValueError(
                f"step must be called for {len(self.sigmas) - 1} timesteps alone; call set_timesteps for another run"
            )

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:  # type: ignore[override]
        """Scale latents to unit variance: arXiv:2206.00364, table 1, c_in."""
        check_tensor("sample", sample, "(B, C, h, w)")
        sigma = self.sigmas[self._find_step(timestep)].cpu()
        self.is_scale_input_called = True
        return sample / (sigma**2 + 1) ** 0.5

    def _warn_if_unscaled(self) -> None:
        if not self.is_scale_input_called:
            warnings.warn("call scale_model_input before step, or the network sees unscaled latents", stacklevel=3)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Make clean latents (B, C, h, w) as noisy as `timesteps` (B,) of the present run say.

        After `set_begin_index` the noise is that of the next step, whatever the timesteps.
        """
        check_pair("original_samples", original_samples, "noise", noise)
        if not isinstance(timesteps, Tensor):
            raise TypeError(f"timesteps must be a tensor (B,), got {show(timesteps)}")
        check_dense("timesteps", timesteps)
        wanted = timesteps.flatten().tolist()
        if len(wanted) not in (1, len(original_samples)):
            raise ValueError(
                f"timesteps must be one, or one for each of {len(original_samples)} samples, got {len(wanted)}"
            )
        places = self._places(wanted)
        sigmas = self.sigmas.to(original_samples.device, original_samples.dtype)[places]
        return original_samples + noise * sigmas.view(-1, *(1,) * (original_samples.ndim - 1))

    def _places(self, wanted: Sequence[float]) -> list[int]:
        if self._begin_index is not None:
            return [self._begin_index if self._step_index is None else self._step_index] * len(wanted)
        numbers = self.timesteps.tolist()
        unknown = [one for one in wanted if one not in numbers]
        if unknown:
            raise ValueError(
                f"timesteps must be out of those of this run ({numbers[0]:g} to {numbers[-1]:g}), got {unknown[:3]}"
            )
        return [self.index_for_timestep(one) for one in wanted]
