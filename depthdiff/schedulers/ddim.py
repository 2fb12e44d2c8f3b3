"""DDIM: deterministic steps along the diffusion, or noisy ones for eta > 0. Source: arXiv:2010.02502."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from depthdiff.checks import check_number
from depthdiff.noise import randn
from depthdiff.schedulers.base import Scheduler
from depthdiff.schedulers.plan import Plan, SchedulerConfig, StepResult, original_from, spaced


@dataclass(frozen=True)
class DDIMConfig(SchedulerConfig):
    """diffusers' fields; `clip_sample` and `thresholding` are for models of pixels, not of latents."""

    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    POSITIVE: ClassVar[tuple[str, ...]] = ("clip_sample_range", "sample_max_value")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio, 0.0, 1.0)

    def betas(self) -> Tensor:
        """Compute the betas, rescaled to end in pure noise where the config says so."""
        return rescale_zero_terminal_snr(super().betas()) if self.rescale_betas_zero_snr else super().betas()


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch a schedule so that its last step leaves no signal. Source: arXiv:2305.08891, algorithm 1."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    alphas_cumprod = ((roots - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def threshold(denoised: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clip each sample to its own `ratio` quantile, and scale to [-1, 1]. Source: arXiv:2205.11487, sec. 2.3."""
    flat = denoised.float().flatten(1)
    limit = torch.quantile(flat.abs(), ratio, dim=1).clamp(1, max_value)[:, None]
    return (flat.clamp(-limit, limit) / limit).view_as(denoised).to(denoised.dtype)


def noise_from(latents: Tensor, denoised: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the noise in latents whose clean part is known; none where ᾱ is 1."""
    if alpha_bar == 1:
        return torch.zeros_like(latents)
    return (latents - alpha_bar**0.5 * denoised) / (1 - alpha_bar) ** 0.5


@dataclass(frozen=True)
class DDIMPlan(Plan):
    """A run of DDIM; see `Plan`."""

    config: DDIMConfig
    alphas_cumprod: Tensor
    stride: int
    eta: float
    use_clipped: bool = False

    def alpha_bar(self, timestep: float) -> Tensor:
        """Return ᾱ of a timestep, which may lie behind the last one."""
        if timestep >= 0:
            check_number("timestep", timestep, 0, len(self.alphas_cumprod) - 1)
            return self.alphas_cumprod[int(timestep)]
        return torch.tensor(1.0, device="cpu") if self.config.set_alpha_to_one else self.alphas_cumprod[0]

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
        state: Any,
        generator: Generator | Sequence[Generator] | None,
    ) -> StepResult:
        """Take a step: arXiv:2010.02502, eq. 12, with the deviation of eq. 16."""
        here, below, config = self.alpha_bar(timestep), self.alpha_bar(timestep - self.stride), self.config
        denoised = original_from(config.prediction_type, latents, noise_pred, here)
        noise = noise_pred
        if config.prediction_type == "v_prediction":
            noise = here**0.5 * noise_pred + (1 - here) ** 0.5 * latents
        elif config.prediction_type == "sample":
            noise = noise_from(latents, denoised, here)
        if config.thresholding:
            denoised = threshold(denoised, config.dynamic_thresholding_ratio, config.sample_max_value)
        elif config.clip_sample:
            denoised = denoised.clamp(-config.clip_sample_range, config.clip_sample_range)
        if self.use_clipped:
            noise = noise_from(latents, denoised, here)
        deviation = torch.tensor(0.0, device="cpu")
        if self.eta > 0 and here < 1:
            deviation = self.eta * ((1 - below) / (1 - here) * (1 - here / below)).clamp(min=0) ** 0.5
        latents = below**0.5 * denoised + (1 - below - deviation**2).clamp(min=0) ** 0.5 * noise
        if self.eta > 0:
            fresh = randn(noise_pred.shape, generator, device=noise_pred.device, dtype=noise_pred.dtype)
            latents = latents + deviation * fresh
        return StepResult(latents, denoised, state)


class DDIMScheduler(Scheduler):
    """Denoising diffusion implicit models; arguments as diffusers' class of this name."""

    config_class = DDIMConfig
    config: DDIMConfig

    def _make_plan(self, num_inference_steps: int, skipped: int, eta: float, device: torch.device) -> DDIMPlan:
        numbers = spaced(self.config, num_inference_steps).round().astype(int)[::-1][skipped:].tolist()
        count, offset = self.config.num_train_timesteps, self.config.steps_offset
        if numbers and numbers[0] >= count:
            raise ValueError(
                f"num_inference_steps must be lower where steps_offset is {offset}, got {num_inference_steps}: they "
                f"lead to timestep {numbers[0]}, the last is {count - 1}"
            )
        stride = count // num_inference_steps
        timesteps = torch.tensor(numbers, dtype=torch.int64, device=device)
        return DDIMPlan(timesteps, 1.0, tuple(numbers), self.config, self.alphas_cumprod, stride, eta)

    def _tuned(self, eta: float, use_clipped_model_output: bool) -> Plan:
        return dataclasses.replace(self._plan, eta=eta, use_clipped=use_clipped_model_output)
