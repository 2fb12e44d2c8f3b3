"""What every scheduler shares: it makes plans of runs, and offers diffusers' stateful contract on top of them.

The contract keeps, for loops written for diffusers, a plan, the index of the next step and the plan's state; the plans
themselves remember nothing.

Letters: B batch, C, h, w channels, height and width of the latents, N steps of a run, T training timesteps.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor

from depthdiff.config import CheckpointError, Output
from depthdiff.schedulers.plan import DEFAULTED, Plan, SchedulerConfig

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "scheduler_config.json"


@dataclass
class SchedulerOutput(Output):
    """What `Scheduler.step` returns.

    Attributes:
        prev_sample: (B, C, h, w), one step less noisy.
        pred_original_sample: (B, C, h, w), the predicted clean latents, where the scheduler of diffusers gives them.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Scheduler(ABC):
    """Base of the schedulers: configuration, plans, and diffusers' stateful contract.

    Args:
        *values: the config's fields in their order, as for diffusers.
        **settings: the config's fields by name.
    """

    config_class: ClassVar[type[SchedulerConfig]]
    order = 1
    gives_denoised: ClassVar[bool] = True

    def __init__(self, *values: Any, **settings: Any) -> None:
        given = {*self.config_class.field_names()[: len(values)], *settings} - {"foreign"}
        names = self.config_class.field_names()
        if len(values) > len(names):
            raise TypeError(f"{type(self).__name__} takes at most {len(names)} arguments, got {len(values)}")
        both = sorted(set(names[: len(values)]) & settings.keys())
        if both:
            raise TypeError(f"{type(self).__name__} got {both[0]!r} twice")
        settings |= zip(names, values, strict=False)
        self.config: Any = self.config_class(given=frozenset(given), **settings)
        self.betas, self.alphas_cumprod = self.config.betas(), self.config.alphas_cumprod()
        self.timesteps = torch.arange(self.config.num_train_timesteps - 1, -1, -1, device="cpu")
        self.num_inference_steps: int | None = None
        self._plan: Any = None
        self._begin: int | None = None
        self._index: int | None = None
        self._state: Any = None

    # Plans

    def plan(
        self, num_inference_steps: int, strength: float = 1.0, *, eta: float = 0.0, device: torch.device | str = "cpu"
    ) -> Plan:
        """Plan a run.

        Args:
            num_inference_steps: N, of a whole run, 1..T.
            strength: in [0, 1], the share of the steps, the last ones, that is run.
            eta: in [0, 1], noise added on the way; only DDIM reads it.
            device: of the timesteps.

        Raises:
            TypeError: `num_inference_steps` is no int, or `strength` no number.
            ValueError: out of range.
        """
        limit = self.config.num_train_timesteps
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
            raise TypeError(f"num_inference_steps must be an int, got {num_inference_steps!r}")
        if not 1 <= num_inference_steps <= limit:
            raise ValueError(f"num_inference_steps must be from 1 to {limit}, got {num_inference_steps}")
        if isinstance(strength, bool) or not isinstance(strength, (int, float)):
            raise TypeError(f"strength must be a number, got {strength!r}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        skipped = num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
        return self._make_plan(num_inference_steps, skipped, eta, torch.device(device))

    @abstractmethod
    def _make_plan(self, num_inference_steps: int, skipped: int, eta: float, device: torch.device) -> Plan:
        """Plan a run whose first `skipped` steps are left out."""

    # Configuration

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Make a scheduler from the config of this or another one, or from a parsed `scheduler_config.json`.

        What the other config left at its defaults is not taken over, and keys of other schedulers are kept for later.

        Raises:
            CheckpointError: a value that this package does not implement.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a scheduler's config or a dict, got {type(config).__name__}")
        defaulted = config.get(DEFAULTED, ())
        values = {key: value for key, value in config.items() if key not in defaulted and not key.startswith("_")}
        values |= overrides
        own = {name: values.pop(name) for name in cls.config_class.field_names() if name in values}
        try:
            return cls(**own, foreign=values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{cls.__name__}: {error}") from error

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **where: Any
    ) -> Self:
        """Make a scheduler from a folder or Hub id; `where` is as in `depthdiff.checkpoint.hub.fetch`.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        from depthdiff.checkpoint.hub import fetch_config  # deferred: the checkpoint package knows all components

        return cls.from_config(fetch_config(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **where))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `scheduler_config.json`, which diffusers loads, into a folder; made where it does not exist."""
        from depthdiff.checkpoint.files import DIFFUSERS_VERSION  # deferred, as above
        from depthdiff.checkpoint.transaction import check_folder
        from depthdiff.checkpoint.write import write_text

        folder = check_folder("save_directory", save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in self.config.items() if key != DEFAULTED}
        if not values.get("exact", True):
            del values["exact"]  # ours alone: written only where it says something
        head = {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
        write_text(folder / CONFIG_NAME, json.dumps(head | values, indent=2, sort_keys=True) + "\n")

    # diffusers' contract

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def init_noise_sigma(self) -> float:
        """Deviation of the noise from which a run without an image starts."""
        return 1.0 if self._plan is None else float(self._plan.init_noise_sigma)

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """ᾱ behind the last step, where the config says how clean that is."""
        to_one = self.config.get("set_alpha_to_one", True)
        return torch.tensor(1.0, device="cpu") if to_one else self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Start a run of N steps; `timesteps` is then what the network is to see."""
        self._plan = self.plan(num_inference_steps, device=device or "cpu")
        self.num_inference_steps, self.timesteps = num_inference_steps, self._plan.timesteps
        self._restart()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which of the timesteps the loop begins."""
        self._begin = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Bring latents to the scale that the network was trained on."""
        return sample if self._plan is None else self._plan.scale_model_input(sample, self._find(timestep))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Any, ...]:
        """Take one step of the run that `set_timesteps` started.

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: what it saw.
            sample: (B, C, h, w), the latents.
            eta: noise to add, for DDIM.
            use_clipped_model_output: recompute the noise from the clipped clean latents, for DDIM.
            generator: for that noise.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            ValueError: no run was started.
        """
        if self._plan is None:
            raise ValueError("call set_timesteps before step: no run was started")
        plan, index = self._tuned(eta, use_clipped_model_output), self._find(timestep)
        number = timestep.item() if isinstance(timestep, Tensor) else timestep
        result = plan.advance(model_output, number, index, sample, self._state, generator)
        self._index, self._state = index + 1, result.state
        output = SchedulerOutput(result.latents, result.denoised if self.gives_denoised else None)
        return output if return_dict else output.to_tuple()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Make clean latents (B, C, h, w) as noisy as `timesteps` (B,) say."""
        signal, rest = self._levels(original_samples, timesteps)
        return signal * original_samples + rest * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute v, what a network of prediction type "v_prediction" learns. Source: arXiv:2202.00512, appendix D."""
        signal, rest = self._levels(sample, timesteps)
        return signal * noise - rest * sample

    def _levels(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod.to(like.device, like.dtype)[timesteps.to(like.device)]
        alpha_bar = alpha_bar.view(-1, *(1,) * (like.ndim - 1))
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def _restart(self) -> None:
        self._begin, self._index = None, None
        self._state = self._plan.init_state()

    def _tuned(self, eta: float, use_clipped_model_output: bool) -> Plan:
        """Return the plan with what is only known at a step; only DDIM reads either."""
        plan: Plan = self._plan
        return plan

    def _find(self, timestep: Tensor | float | None) -> int:
        """Return the index of the next step; the first one is looked up (the second of two that are the same)."""
        if self._index is None:
            self._index = self._begin
        if self._index is None:
            number = timestep.item() if isinstance(timestep, Tensor) else timestep
            places = [i for i, one in enumerate(self._plan.numbers) if one == number]
            self._index = places[min(1, len(places) - 1)] if places else 0
        return self._index
