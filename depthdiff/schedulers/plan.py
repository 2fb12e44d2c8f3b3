"""What a scheduler is made of: a frozen config of the noise, and the immutable plan of one run.

A plan knows the noise levels of a run, and its `step` is a pure function of its arguments (and of the generator, where
noise is drawn).

Letters: B batch, C, h, w channels, height and width of the latents, N steps of a run, T training timesteps. ᾱ is the
share of clean signal's variance in noisy latents: noisy = sqrt(ᾱ) clean + sqrt(1 - ᾱ) noise (arXiv:2006.11239, eq. 4).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.checks import brief, check_number, check_tensor
from depthdiff.config import MAX_LENGTH, Config

DEFAULTED = "_use_default_values"
"""The key under which diffusers lists what a config does not say itself."""

MAX_BETA = 0.999
TABLE: Mapping[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Kind of the tables of constants, whatever torch's default device is: their numbers serve latents on any device."""


@dataclass(frozen=True)
class SchedulerConfig(Config):
    """What a checkpoint fixes about the noise; fields, order and defaults are those of diffusers' constructors.

    Attributes:
        given: fields that were given rather than left at their default. Another scheduler made from this config takes
            over only these, so that it keeps its own defaults.
        foreign: keys of other schedulers, kept so that they are there when one of those is made from this config.
    """

    given: frozenset[str] = field(default=frozenset(), kw_only=True, repr=False, compare=False)
    foreign: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False, compare=False)

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "timestep_spacing": ("leading", "trailing", "linspace"),
    }

    def __post_init__(self) -> None:
        for name, choices in self.CHOICES.items():
            value = self[name]
            if isinstance(value, (str, bool)) and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {brief(value)}")
        super().__post_init__()
        count, betas = self.num_train_timesteps, self.trained_betas or (self.beta_start, self.beta_end)
        check_number("num_train_timesteps", count, 1, MAX_LENGTH, whole=True)
        check_number("steps_offset", getattr(self, "steps_offset", 0), 0, count - 1, whole=True)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"beta_start, beta_end and trained_betas must be in [0, 1), got {betas[:3]}")
        if self.trained_betas is not None and len(self.trained_betas) != count:
            raise ValueError(f"trained_betas must hold {count} numbers, got {len(self.trained_betas)}")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """List the published fields, in the order of the constructor."""
        return tuple(one.name for one in dataclasses.fields(cls) if one.name not in ("given", "foreign"))

    def __getitem__(self, key: str) -> Any:
        if key == DEFAULTED:
            return [name for name in self.field_names() if name not in self.given]
        return getattr(self, key) if key in self.field_names() else self.foreign[key]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.field_names(), *self.foreign, DEFAULTED))

    def __len__(self) -> int:
        return len(self.field_names()) + len(self.foreign) + 1

    def alphas_cumprod(self) -> Tensor:
        """Compute ᾱ of every training timestep: (T,), float32, falling."""
        return torch.cumprod(1.0 - self.betas(), dim=0)

    def betas(self) -> Tensor:
        """Compute the variance that each training timestep adds: (T,), float32, on the CPU.

        Source: arXiv:2006.11239, sec. 4 (linear); CompVis/latent-diffusion, ldm/modules/diffusionmodules/util.py,
            `make_beta_schedule` (scaled_linear: linear in the square root); arXiv:2102.09672, eq. 17 (squared cosine).
        """
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, **TABLE)
        if self.beta_schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, count, **TABLE)
        if self.beta_schedule == "scaled_linear":
            return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, count, **TABLE) ** 2
        signal = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = [min(1 - after / before, MAX_BETA) for before, after in itertools.pairwise(signal)]
        return torch.tensor(betas, **TABLE)


@dataclass(frozen=True)
class StepResult:
    """What a plan's step returns.

    Attributes:
        latents: (B, C, h, w), one step less noisy.
        denoised: (B, C, h, w), the clean latents as predicted at this step.
        state: for the next step.
    """

    latents: Tensor
    denoised: Tensor
    state: Any


@dataclass(frozen=True)
class Plan(ABC):
    """All that is known of a run before it starts.

    Attributes:
        timesteps: (steps,), what the network sees, in the order of the calls, repeated ones included.
        init_noise_sigma: deviation of the noise from which a run without an image starts.
        numbers: `timesteps` as numbers.
        config: of the scheduler.
    """

    timesteps: Tensor
    init_noise_sigma: float
    numbers: tuple[float, ...]
    config: SchedulerConfig

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def calls(self) -> tuple[Tensor, ...]:
        """`timesteps`, one tensor a call."""
        return self.timesteps.unbind()

    def init_state(self) -> Any:
        """Return what the first step's `state` is."""
        return None

    def scale_model_input(self, latents: Tensor, index: int) -> Tensor:
        """Bring latents to the scale that the network was trained on."""
        return latents

    def step(
        self,
        noise_pred: Tensor,
        index: int,
        latents: Tensor,
        state: Any,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> StepResult:
        """Take one step.

        Args:
            noise_pred: (B, C, h, w), what the network returned.
            index: of the step, from 0.
            latents: (B, C, h, w), what the network saw, before its scaling.
            state: of the step before; `init_state()` for the first.
            generator: for noise that is added on the way.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: no such step, or tensors of different shapes.
        """
        index = check_number("index", index, 0, len(self) - 1, whole=True)
        check_pair("noise_pred", noise_pred, "latents", latents)
        self.check_state(state, latents)
        return self.advance(noise_pred, self.numbers[index], index, latents, state, generator)

    def check_state(self, state: Any, latents: Tensor) -> None:
        """Refuse a state that is none of this plan's, or of latents of another shape; a plan may have none at all."""
        return

    def add_noise(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Make clean latents as noisy as the first step expects; a plan without steps leaves them clean.

        Raises:
            TypeError: no tensors of numbers.
            ValueError: tensors of different shapes.
        """
        check_pair("clean", clean, "noise", noise)
        return self.noisy(clean, noise) if self.numbers else clean

    @abstractmethod
    def noisy(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Do the work of `add_noise` for a plan that has steps."""

    @abstractmethod
    def advance(
        self,
        noise_pred: Tensor,
        timestep: float,
        index: int,
        latents: Tensor,
        state: Any,
        generator: Generator | Sequence[Generator] | None,
    ) -> StepResult:
        """Take the step of `index`, whose timestep is `timestep`."""


def check_pair(name: str, x: object, other_name: str, other: object) -> None:
    """Refuse what are no two float tensors of one shape."""
    first, second = (check_tensor(*one, "(B, C, h, w)") for one in ((name, x), (other_name, other)))
    if first.shape != second.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )


def check_past(past: Sequence[Tensor], latents: Tensor) -> None:
    """Refuse latents of another shape than the predictions that a multistep method remembers."""
    if past and past[0].shape != latents.shape:
        raise ValueError(
            f"latents must keep their shape {tuple(past[0].shape)} in a run of a multistep method, got "
            f"{tuple(latents.shape)}; DDIM remembers nothing and takes others"
        )


def spaced(config: Any, num_inference_steps: int) -> np.ndarray:
    """Choose N of the T training timesteps, rising; whole numbers but for LMS. Source: arXiv:2305.08891, table 2."""
    count, spacing = config.num_train_timesteps, config.timestep_spacing
    if spacing == "linspace":
        return np.linspace(0, count - 1, num_inference_steps)
    if spacing == "leading":
        stride = count // num_inference_steps
        return np.arange(num_inference_steps) * stride + config.steps_offset
    return np.round(np.arange(count, 0, -count / num_inference_steps))[::-1] - 1


def original_from(prediction_type: str, x: Tensor, out: Tensor, alpha_bar: Tensor) -> Tensor:
    """Predict the clean latents from noisy ones `x`, what the network returned and ᾱ.

    Raises:
        ValueError: the noise is to tell what is left of the image where nothing is.
    """
    if prediction_type == "epsilon":
        if alpha_bar == 0:
            raise ValueError(
                "prediction_type must be 'v_prediction' or 'sample' where a step starts from pure noise, got "
                "'epsilon'; or leave out rescale_betas_zero_snr, or lower beta_end"
            )
        return (x - (1 - alpha_bar) ** 0.5 * out) / alpha_bar**0.5
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * out
    return out
