"""LMS: linear multistep on the diffusion's ordinary differential equation, in terms of sigma = sqrt((1 - ᾱ) / ᾱ).

Source: arXiv:2206.00364 for the equation, crowsonkb/k-diffusion, k_diffusion/sampling.py, `sample_lms` for the method.

Below strength 1 the reference, and by default this code, weighs the first predictions as if there were older ones.
`exact` counts those that there are: with true predictions the run ends at the clean latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.checks import check_dense, show
from depthdiff.schedulers.base import Scheduler
from depthdiff.schedulers.plan import TABLE, Plan, SchedulerConfig, StepResult, check_pair, check_past, spaced

ORDER = 4
KARRAS_RHO = 7.0
"""Source: arXiv:2206.00364, sec. 5.1."""


@dataclass(frozen=True)
class LMSDiscreteConfig(SchedulerConfig):
    """diffusers' fields, and `exact` (see the module)."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    exact: bool = field(default=False, kw_only=True)

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SchedulerConfig.CHOICES, "use_beta_sigmas": (False,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_karras_sigmas and self.use_exponential_sigmas:
            raise ValueError("use_karras_sigmas and use_exponential_sigmas exclude each other; choose one")


def lms_weights(sigmas: Sequence[float], index: int, order: int) -> list[float]:
    """Integrate the Lagrange polynomials of the last `order` noise levels over the next step.

    Args:
        sigmas: of all steps, and 0.
        index: of the step.
        order: how many predictions to use, 1..4; their weights come newest first.

    Raises:
        ValueError: two of these levels are equal.

    Returns:
        `order` numbers, whose sum is the change in sigma. The integrands are cubics at most, for which the two-point
        Gauss-Legendre rule is exact.
    """
    start, end = sigmas[index], sigmas[index + 1]
    middle, half = (start + end) / 2, (end - start) / 2
    nodes = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]
    levels = [sigmas[index - k] for k in range(order)]
    if len(set(levels)) < len(levels):
        raise ValueError(f"noise levels must fall from step to step, got {levels[::-1]}; take fewer steps")
    weights = []
    for here in levels:
        others = [level for level in levels if level is not here]
        weights.append(half * sum(math.prod((x - other) / (here - other) for other in others) for x in nodes))
    return weights


@dataclass(frozen=True)
class LMSPlan(Plan):
    """A run of LMS; see `Plan`. Its state is the tuple of past derivatives, newest first.

    Attributes:
        sigmas: (N + 1,), float32, of the whole run, ending in 0.
        skipped: how many of its steps are left out.
    """

    config: LMSDiscreteConfig
    sigmas: Tensor
    skipped: int

    def init_state(self) -> tuple[Tensor, ...]:
        """See `Plan`."""
        return ()

    def check_state(self, state: Any, latents: Tensor) -> None:
        """See `Plan`."""
        if not isinstance(state, tuple) or not all(isinstance(past, Tensor) for past in state):
            raise TypeError(f"state must be that of the step before, or init_state() for the first, got {show(state)}")
        check_past(state, latents)

    def noisy(self, clean: Tensor, noise: Tensor) -> Tensor:
        """See `Plan`."""
        return clean + noise * self.sigmas[self.skipped].to(clean.dtype)

    def scale_model_input(self, latents: Tensor, index: int) -> Tensor:
        """Scale to unit variance: arXiv:2206.00364, table 1, c_in."""
        return latents / (self.sigmas[self.skipped + index] ** 2 + 1) ** 0.5

    def advance(
        self,
        noise_pred: Tensor,
        timestep: float,
        index: int,
        latents: Tensor,
        state: tuple[Tensor, ...],
        generator: Generator | Sequence[Generator] | None,
    ) -> StepResult:
        """Take a step along the weighted derivatives d latents / d sigma."""
        index = index + self.skipped
        if index >= len(self.sigmas) - 1:
            raise ValueError(f"step must be called for {len(self)} timesteps alone; call set_timesteps for another run")
        sigma = self.sigmas[index]
        if sigma == 0:  # a first beta of 0: they are clean already
            return StepResult(latents, latents, state)
        if self.config.prediction_type == "epsilon":
            denoised = latents - sigma * noise_pred
        elif self.config.prediction_type == "v_prediction":
            denoised = noise_pred * (-sigma / (sigma**2 + 1) ** 0.5) + latents / (sigma**2 + 1)
        else:
            denoised = noise_pred
        history = ((latents - denoised) / sigma, *state)[:ORDER]
        order = len(history) if self.config.exact else min(index + 1, ORDER)
        weights = lms_weights(self.sigmas.tolist(), index, order)
        change = sum((w * d for w, d in zip(weights, history, strict=False)), torch.zeros_like(latents))
        return StepResult(latents + change, denoised, history)


class LMSDiscreteScheduler(Scheduler):
    """Linear multistep method; arguments as diffusers' class of this name, and `exact`."""

    config_class = LMSDiscreteConfig
    config: LMSDiscreteConfig

    def __init__(self, *values: Any, **settings: Any) -> None:
        super().__init__(*values, **settings)
        self._plan = self._make_plan(self.config.num_train_timesteps, 0, 0.0, torch.device("cpu"))
        self.timesteps = self._plan.timesteps
        self._restart()

    @property
    def sigmas(self) -> Tensor:
        """(N + 1,), float32, the noise levels of the run, ending in 0."""
        sigmas: Tensor = self._plan.sigmas
        return sigmas

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Make clean latents (B, C, h, w) as noisy as `timesteps` (B,) of the present run say."""
        check_pair("original_samples", original_samples, "noise", noise)
        if not isinstance(timesteps, Tensor):
            raise TypeError(f"timesteps must be a tensor (B,), got {show(timesteps)}")
        check_dense("timesteps", timesteps)
        begin = self._index if self._begin is not None and self._index is not None else self._begin
        numbers = list(self._plan.numbers)
        wanted = timesteps.flatten().tolist()
        unknown = [] if begin is not None else [t for t in wanted if t not in numbers]
        if unknown or len(wanted) not in (1, len(original_samples)):
            raise ValueError(
                f"timesteps must be one, or one for each of {len(original_samples)} samples, out of those of this run "
                f"({numbers[0]:g} to {numbers[-1]:g}), got {unknown[:3] or len(wanted)}"
            )
        places = [numbers.index(t) if begin is None else begin for t in wanted]
        sigmas = self.sigmas.to(original_samples.device, original_samples.dtype)[places]
        return original_samples + noise * sigmas.view(-1, *(1,) * (original_samples.ndim - 1))

    @property
    def _by_logarithm(self) -> bool:
        """Whether steps are spaced by the logarithm of their noise levels."""
        return bool(self.config.use_karras_sigmas or self.config.use_exponential_sigmas)

    def _make_plan(self, num_inference_steps: int, skipped: int, eta: float, device: torch.device) -> LMSPlan:
        config = self.config
        alphas_cumprod = self.alphas_cumprod.numpy()
        with np.errstate(divide="ignore"):
            levels = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        if not np.isfinite(levels).all() or (levels[0] == 0 and self._by_logarithm):
            kind = "some noise at the first timestep" if levels[0] == 0 else "some of the image at the last timestep"
            raise ValueError(f"beta_start, beta_end and trained_betas must leave {kind}; choose others")
        numbers = spaced(config, num_inference_steps)[::-1].astype(np.float32)
        sigmas = np.interp(numbers, np.arange(len(levels)), levels)
        if config.use_karras_sigmas:  # arXiv:2206.00364, eq. 5
            roots = np.linspace(sigmas[0] ** (1 / KARRAS_RHO), sigmas[-1] ** (1 / KARRAS_RHO), num_inference_steps)
            sigmas = roots**KARRAS_RHO
        elif config.use_exponential_sigmas:
            sigmas = np.exp(np.linspace(math.log(sigmas[0]), math.log(sigmas[-1]), num_inference_steps))
        if self._by_logarithm:
            numbers = np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(levels), np.arange(len(levels)))
        largest = float(sigmas.max())
        start = largest if config.timestep_spacing in ("linspace", "trailing") else (largest**2 + 1) ** 0.5
        timesteps = torch.tensor(numbers[skipped:].copy(), dtype=torch.float32, device=device)
        ending = torch.tensor(np.append(sigmas, 0.0), **TABLE)
        return LMSPlan(timesteps, start, tuple(timesteps.tolist()), config, ending, skipped)
