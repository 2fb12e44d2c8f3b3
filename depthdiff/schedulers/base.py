"""Base of all schedulers: the plan of a run, and diffusers' stateful contract.

A `Plan` knows all of one run before it starts and remembers nothing: its `step` is a pure function of its arguments
(and of the generator, where noise is drawn). A scheduler makes plans. For loops written for diffusers it also keeps one
run in its attributes; every step rereads them, so that what is assigned to them counts.

Letters are as in `depthdiff.schedulers.schedule`.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.arguments import NO_WEIGHTS, SETTINGS, sort_out
from depthdiff.checkpoint.hub import HUB_ARGUMENTS
from depthdiff.checkpoint.loading import ConfigMixin
from depthdiff.checks import check_dense, check_device, check_number, check_tensor, show
from depthdiff.config import MAX_LENGTH, BaseOutput, FrozenDict, constructor_fields
from depthdiff.schedulers.schedule import (
    Levels,
    check_pair,
    check_sigmas,
    check_timesteps,
    make_betas,
    make_timesteps,
    read_steps,
    read_timestep,
    rescale_zero_terminal_snr,
)

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class SchedulerOutput(BaseOutput):
    """Result of a scheduler's `step`.

    Attributes:
        prev_sample: (B, C, h, w), one step less noisy.
    """

    prev_sample: Tensor


class StepOutput(NamedTuple):
    """Result of a plan's `step`.

    Attributes:
        prev_sample: (B, C, h, w), one step less noisy.
        pred_original_sample: (B, C, h, w), the clean latents as predicted at this step.
        state: for the next step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor
    state: Any


class Steps(NamedTuple):
    """The steps of a whole run.

    Attributes:
        timesteps: (N,), falling.
        step_ratio: distance between timesteps, or None if each step ends at the next one.
        sigmas: (N + 1,), the caller's own noise levels, from which timesteps follow; else None.
    """

    timesteps: np.ndarray
    step_ratio: int | None
    sigmas: Any = None


@dataclass(frozen=True, eq=False)
class Plan(ABC):
    """All that is known of a run before it starts.

    Attributes:
        timesteps: (steps,), what the network sees, in the order of its calls, repeated ones included.
        numbers: `timesteps` as numbers.
        config: of the scheduler, as it was when the plan was made.
    """

    timesteps: Tensor
    numbers: tuple[float, ...]
    config: FrozenDict

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def init_noise_sigma(self) -> float:
        """Deviation of the noise from which a run without an image starts."""
        return 1.0

    def init_state(self) -> Any:
        """Return the `state` of the first step."""
        return None

    def scale_model_input(self, latents: Tensor, index: int) -> Tensor:
        """Scale latents (B, C, h, w) to what the network was trained on."""
        return latents

    @abstractmethod
    def step(
        self,
        noise_pred: Tensor,
        index: int,
        latents: Tensor,
        state: Any,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> StepOutput:
        """Take one step.

        Args:
            noise_pred: (B, C, h, w), what the network returned.
            index: of the step, from 0.
            latents: (B, C, h, w), the noisy latents before `scale_model_input`.
            state: of the step before; `init_state()` for the first.
            generator: for noise that is added on the way.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: no such step, or tensors of different shapes.
        """

    def add_noise(self, clean: Tensor, noise: Tensor, index: int = 0) -> Tensor:
        """Make clean latents as noisy as a step expects them.

        Args:
            clean: (B, C, h, w).
            noise: (B, C, h, w), unit normal.
            index: of the step, from 0; after the last one, at `len(plan)`, latents are clean.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: no such step, or tensors of different shapes.
        """
        check_pair("clean", clean, "noise", noise)
        index = check_number("index", index, 0, len(self), whole=True)
        return clean if index == len(self) else self._noisy(clean, noise, index)

    @abstractmethod
    def _noisy(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """Do the work of `add_noise` for a step that exists."""

    def inverted(self) -> Plan:
        """Return the plan that leads from the clean latents back to the noise of the first step.

        Raises:
            NotImplementedError: the method has no inverse.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot be inverted; plans of DDIMScheduler and DPMSolverMultistepScheduler can"
        )

    def _check_step(self, noise_pred: Tensor, index: int, latents: Tensor) -> int:
        """Check the arguments that all methods share, and return the index as Python's own."""
        index = check_number("index", index, 0, len(self) - 1, whole=True)
        check_pair("noise_pred", noise_pred, "latents", latents)
        return index


class SchedulerMixin(ConfigMixin, ABC):
    """Base of the schedulers: noise schedule, plans, and diffusers' stateful contract.

    A subclass has a constructor with the published arguments, which calls `_make_noise_schedule`; `_make_plan`;
    `_start_run`, where a run has state; and the published `step`, which reads the attributes as they are.

    Attributes:
        betas: (T,), float32, the variance that each training timestep adds.
        alphas: (T,), float32, 1 - betas.
        alphas_cumprod: (T,), float32, the signal's share of the variance at each timestep.
        timesteps: (steps,), what the network is to see, in the order of its calls.
        num_inference_steps: N of the present run.
        custom_timesteps: whether the present run has timesteps of the caller's own, where each step leads to the next.
        order: calls of the network for each step.
    """

    config_name = "scheduler_config.json"
    has_compatibles = True
    order = 1
    _compatibles: ClassVar[list[str]] = [
        *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
        *("HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
        *("DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
        *("DEISMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSDEScheduler", "EDMEulerScheduler"),
    ]
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "timestep_spacing": ("leading", "trailing", "linspace"),
    }
    final_alpha_cumprod: Any
    """ᾱ after the last step, in the methods that go by timesteps."""
    fractional_timesteps: ClassVar[bool] = False
    """True if timesteps may be fractional, between those of the training."""

    def _make_noise_schedule(self, *, zero_terminal_snr: bool = False) -> None:
        """Compute the tables of the config, and set the attributes of a scheduler without a run."""
        c = self.config
        self.betas = make_betas(c.num_train_timesteps, c.beta_start, c.beta_end, c.beta_schedule, c.trained_betas)
        if zero_terminal_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        check_number("steps_offset", c.get("steps_offset", 0), 0, c.num_train_timesteps - 1, whole=True)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        if not self.alphas_cumprod.isfinite().all():
            raise ValueError("beta_end must leave some of the image for betas to be rescaled; lower it")
        self.timesteps: Any = torch.arange(c.num_train_timesteps - 1, -1, -1, device="cpu")
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False

    # Plans

    def plan(
        self,
        num_inference_steps: int | None = None,
        strength: float = 1.0,
        *,
        timesteps: Sequence[float] | np.ndarray | Tensor | None = None,
        sigmas: Sequence[float] | np.ndarray | Tensor | None = None,
        eta: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> Any:
        """Plan a run.

        Args:
            num_inference_steps: N, of a whole run, 1..T.
            strength: in [0, 1], the share of the steps, the last ones, that is run.
            timesteps: of the caller's own, instead of N: falling numbers in [0, T-1], each once.
            sigmas: noise levels of the caller's own, instead of N: falling numbers, the last one where the run ends;
                for schedulers that go over noise levels.
            eta: in [0, 1], noise added on the way; only DDIM and TCD read it.
            device: of the plan's timesteps.

        Returns:
            A `Plan`.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or not exactly one of N, `timesteps` and `sigmas`.
        """
        steps = self._choose_steps(num_inference_steps, timesteps, sigmas)
        strength, eta = check_number("strength", strength, 0, 1), check_number("eta", eta, 0, 1)
        count = len(steps.timesteps) if num_inference_steps is None else read_steps(num_inference_steps, MAX_LENGTH)
        t_start = count - int(count * strength)  # of N, as the pipeline's; "trailing" may have fewer timesteps
        return self._make_plan(steps, t_start, eta, check_device("device", device))

    def _choose_steps(self, num_inference_steps: Any, timesteps: Any, sigmas: Any = None) -> Steps:
        """Return the steps of a whole run."""
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            found = ("neither", "one", "both", "three")[len(names)]
            choice = (
                "num_inference_steps or timesteps" if sigmas is None else "num_inference_steps, timesteps or sigmas"
            )
            raise ValueError(f"{choice} must be given, one of them, got {found}")
        if sigmas is not None:
            if not hasattr(self, "sigmas"):
                raise ValueError(f"sigmas must be None: {type(self).__name__} goes by timesteps; pass timesteps")
            levels = check_sigmas(sigmas)
            return Steps(np.zeros(len(levels) - 1), None, levels)
        if timesteps is not None:
            return Steps(check_timesteps(timesteps, len(self), whole=not self.fractional_timesteps), None)
        count = read_steps(num_inference_steps, self._most_steps())
        return Steps(self._spaced_timesteps(count), len(self) // count)

    def _spaced_timesteps(self, count: int) -> np.ndarray:
        """Return the falling timesteps of a run of `count` steps."""
        return make_timesteps(count, len(self), self.config.timestep_spacing, self.config.get("steps_offset", 0))

    def _whole_timesteps(self, steps: Steps) -> list[int]:
        """Return the falling timesteps of a run as whole numbers, which are all of the training."""
        numbers: list[int] = steps.timesteps.round().astype(int).tolist()
        if numbers[0] >= len(self):
            raise ValueError(
                f"steps_offset {self.config.steps_offset} with {len(numbers)} steps reaches timestep {numbers[0]}, "
                f"beyond the last, {len(self) - 1}; use fewer steps"
            )
        return numbers

    def _most_steps(self) -> int:
        """Return how many steps a run may have."""
        return len(self)

    @abstractmethod
    def _make_plan(self, steps: Steps, t_start: int, eta: float, device: torch.device) -> Plan:
        """Plan a run whose first `t_start` steps are left out."""

    # Files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a scheduler from a folder or Hub id.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id.
            subfolder: of the folder or repository.
            return_unused_kwargs: also return the `kwargs` that the constructor does not take.
            **kwargs: settings that replace those of the file, and `load_config`'s arguments for the Hub; with a
                warning, settings of other schedulers and an argument of diffusers in `depthdiff.arguments.NO_WEIGHTS`.

        Raises:
            CheckpointError: the file is missing or damaged, or asks for what is not implemented.
            TypeError: an unknown argument; not with `return_unused_kwargs`.
        """
        if not return_unused_kwargs:
            known = (*HUB_ARGUMENTS, *constructor_fields(cls))
            kwargs = sort_out(cls.from_pretrained, NO_WEIGHTS | SETTINGS, kwargs, known)
        loaded: Any = cls.load_config(pretrained_model_name_or_path, True, subfolder=subfolder, **kwargs)
        config, rest = loaded
        return cls.from_config(config, return_unused_kwargs, **rest)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **unused: Any) -> None:
        """Write `scheduler_config.json` into a folder; see `save_config`."""
        self.save_config(save_directory, push_to_hub, **unused)

    @property
    def compatibles(self) -> list[type]:
        """The schedulers of this package that `from_config` can make from this one's config."""
        return self._get_compatibles()

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        package = import_module("depthdiff.schedulers")  # which imports a solver's file when asked for its class
        names = dict.fromkeys((cls.__name__, *cls._compatibles))
        return [getattr(package, name) for name in names if name in package.FILES]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Deprecated name of `load_config`."""
        warnings.warn("get_config_dict is deprecated; call load_config", FutureWarning, stacklevel=2)
        return cls.load_config(*args, **kwargs)

    # diffusers' contract

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | np.ndarray | Tensor | None = None,
    ) -> None:
        """Start a run; `timesteps` is then what the network is to see.

        Args:
            num_inference_steps: N, 1..T.
            device: of the timesteps; None is the CPU.
            timesteps: of the caller's own, instead of N: falling numbers in [0, T-1], each once.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or both or neither of N and `timesteps`.
        """
        self._set_steps(self._choose_steps(num_inference_steps, timesteps), device)

    def _set_steps(self, steps: Steps, device: torch.device | str | None) -> None:
        """Start a run over steps."""
        plan = self._make_plan(steps, 0, 0.0, check_device("device", "cpu" if device is None else device))
        self.num_inference_steps, self.custom_timesteps = len(steps.timesteps), steps.step_ratio is None
        self.timesteps = plan.timesteps
        self._start_run(steps.timesteps, plan)

    def _start_run(self, run: np.ndarray, plan: Any) -> None:
        """Set the attributes of a new run; methods without state need none."""
        return

    def _check_started(self) -> None:
        """Raise if no run was started."""
        if self.num_inference_steps is None:
            raise ValueError("no run was started, num_inference_steps is None: call set_timesteps before step")

    def _levels(self) -> Levels:
        """Return the noise levels of the present run from the attributes as they are.

        Raises:
            ValueError: no run was started.
        """
        self._check_started()
        step_ratio = len(self) // read_steps(self.num_inference_steps, len(self))
        return self._levels_of(step_ratio, self.timesteps.tolist() if self.custom_timesteps else ())

    def _levels_of(self, step_ratio: int, run: Sequence[float]) -> Levels:
        """Return noise levels whose steps are `step_ratio` long, or end at the next timestep of `run`."""
        end = torch.as_tensor(self.final_alpha_cumprod, device="cpu")
        return Levels(self.alphas_cumprod.cpu().clone(), end.clone(), step_ratio, tuple(run))

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return the latents (B, C, h, w) unchanged: this method needs no scaling."""
        return check_tensor("sample", sample, "(B, C, h, w)")

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Make clean latents (B, C, h, w) as noisy as `timesteps` (B,) say: arXiv:2006.11239, eq. 4."""
        check_pair("original_samples", original_samples, "noise", noise)
        signal, rest = self._signal_and_noise(original_samples, timesteps)
        return signal * original_samples + rest * noise

    def _previous_timestep(self, timestep: Tensor | int) -> Tensor:
        """Return the timestep at which the step from this one ends, 0-d; -1 after the last."""
        number = int(read_timestep(timestep, len(self) - 1))
        if self.num_inference_steps is None:
            return torch.tensor(number - 1)
        return torch.tensor(max((t for t in self.timesteps.tolist() if t < number), default=-1))

    def _velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute v, what a network of prediction type "v_prediction" learns: arXiv:2202.00512, appendix D."""
        check_pair("sample", sample, "noise", noise)
        signal, rest = self._signal_and_noise(sample, timesteps)
        return signal * noise - rest * sample

    def _signal_and_noise(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(ᾱ) and sqrt(1 - ᾱ) of timesteps."""
        if not isinstance(timesteps, Tensor):
            raise TypeError(f"timesteps must be a tensor (B,) of whole numbers, got {show(timesteps)}")
        check_dense("timesteps", timesteps)
        if timesteps.dtype not in (torch.int64, torch.int32) or timesteps.numel() not in (1, len(like)):
            raise ValueError(
                f"timesteps must be one whole number, or one for each of {len(like)} samples, got {timesteps.dtype} of "
                f"shape {tuple(timesteps.shape)}"
            )
        if not 0 <= int(timesteps.min()) <= int(timesteps.max()) < len(self):
            raise ValueError(f"timesteps must be from 0 to {len(self) - 1}, got {timesteps.flatten()[:8].tolist()}")
        alpha_prod = self.alphas_cumprod.to(like.device, like.dtype)[timesteps.to(like.device)]
        alpha_prod = alpha_prod.view(-1, *(1,) * (like.ndim - 1))
        return alpha_prod**0.5, (1 - alpha_prod) ** 0.5
