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

from depthdiff.checks import (
    check_dense,
    check_device,
    check_flag,
    check_generators,
    check_number,
    check_tensor,
    nearest,
    plain,
    show,
)
from depthdiff.config import CheckpointError, Output
from depthdiff.schedulers.plan import DEFAULTED, Plan, SchedulerConfig, check_pair

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

    Raises:
        TypeError: an unknown setting, or one of a wrong type.
        ValueError: a setting out of range, or one that is not implemented.
    """

    config_class: ClassVar[type[SchedulerConfig]]
    order = 1
    gives_denoised: ClassVar[bool] = True

    def __init__(self, *values: Any, **settings: Any) -> None:
        given = {*self.config_class.field_names()[: len(values)], *settings} - {"foreign"}
        names = self.config_class.field_names()
        if len(values) > len(names):
            raise TypeError(f"{type(self).__name__} takes at most {len(names)} arguments, got {len(values)}")
        for name in settings.keys() - {*names, "foreign"}:
            raise TypeError(f"{type(self).__name__} got an unknown setting {name!r}{nearest(name, names)}")
        both = sorted(set(names[: len(values)]) & settings.keys())
        if both:
            raise TypeError(f"{type(self).__name__} got {both[0]!r} twice")
        settings |= zip(names, values, strict=False)
        self.config: Any = self.config_class(given=frozenset(given), **settings)
        self.betas, self.alphas_cumprod = self.config.betas(), self.config.alphas_cumprod()
        if not self.alphas_cumprod.isfinite().all():
            raise ValueError("beta_end must leave some of the image for betas to be rescaled; lower it")
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
        count, limit = check_number("num_inference_steps", num_inference_steps, whole=True), len(self)
        if not 1 <= count <= limit:
            raise ValueError(f"num_inference_steps must be from 1 to {limit}, got {show(count).removeprefix('int ')}")
        strength, eta = check_number("strength", strength, 0, 1), check_number("eta", eta, 0, 1)
        skipped = count - min(int(count * strength), count)
        return self._make_plan(count, skipped, eta, check_device("device", device))

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
        if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
            raise TypeError(f"config must be a scheduler's config or a dict, got {type(config).__name__}")
        defaulted = config.get(DEFAULTED, ())
        if not isinstance(defaulted, (list, tuple)):
            raise CheckpointError(f"{cls.__name__}: {DEFAULTED} must be a list of names, got {show(defaulted)}")
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
        self._plan = self.plan(num_inference_steps, device="cpu" if device is None else device)
        self.num_inference_steps, self.timesteps = plain(num_inference_steps), self._plan.timesteps
        self._restart()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which of the timesteps the loop begins."""
        end = len(self) if self._plan is None else len(self._plan)
        self._begin = check_number("begin_index", begin_index, 0, end - 1, whole=True)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Bring latents to the scale that the network was trained on."""
        check_tensor("sample", sample, "(B, C, h, w)")
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
            TypeError: an argument of a wrong type.
            ValueError: no run was started, or one out of range.
        """
        if self._plan is None:
            raise ValueError("call set_timesteps before step: no run was started")
        check_pair("model_output", model_output, "sample", sample)
        check_generators("generator", generator)
        use_clipped = check_flag("use_clipped_model_output", use_clipped_model_output)
        eta = check_number("eta", eta, 0, 1)
        return_dict, number = check_flag("return_dict", return_dict), self._number(timestep)
        plan, index = self._tuned(eta, use_clipped), self._find(number)
        plan.check_state(self._state, sample)
        result = plan.advance(model_output, number, index, sample, self._state, generator)
        self._index, self._state = index + 1, result.state
        output = SchedulerOutput(result.latents, result.denoised if self.gives_denoised else None)
        return output if return_dict else output.to_tuple()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Make clean latents (B, C, h, w) as noisy as `timesteps` (B,) say."""
        check_pair("original_samples", original_samples, "noise", noise)
        signal, rest = self._levels(original_samples, timesteps)
        return signal * original_samples + rest * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute v, what a network of prediction type "v_prediction" learns. Source: arXiv:2202.00512, appendix D."""
        check_pair("sample", sample, "noise", noise)
        signal, rest = self._levels(sample, timesteps)
        return signal * noise - rest * sample

    def _levels(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(ᾱ) and sqrt(1 - ᾱ) of timesteps; their range is looked at where that makes no device wait."""
        if not isinstance(timesteps, Tensor):
            raise TypeError(f"timesteps must be a tensor (B,) of whole numbers, got {show(timesteps)}")
        check_dense("timesteps", timesteps)
        if timesteps.dtype not in (torch.int64, torch.int32) or timesteps.numel() not in (1, len(like)):
            raise ValueError(
                f"timesteps must be one whole number, or one for each of {len(like)} samples, got {timesteps.dtype} of "
                f"shape {tuple(timesteps.shape)}"
            )
        if timesteps.device.type == "cpu" and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < len(self):
            raise ValueError(f"timesteps must be from 0 to {len(self) - 1}, got {timesteps.flatten()[:8].tolist()}")
        alpha_bar = self.alphas_cumprod.to(like.device, like.dtype)[timesteps.to(like.device)]
        alpha_bar = alpha_bar.view(-1, *(1,) * (like.ndim - 1))
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def _number(self, timestep: Tensor | float) -> float:
        """Return a timestep as a number."""
        one = timestep.flatten()[0] if isinstance(timestep, Tensor) and timestep.numel() == 1 else timestep
        return check_number("timestep", one, 0, len(self))

    def _restart(self) -> None:
        self._begin, self._index = None, None
        self._state = self._plan.init_state()

    def _tuned(self, eta: float, use_clipped_model_output: bool) -> Plan:
        """Return the plan with what is only known at a step; only DDIM reads either."""
        plan: Plan = self._plan
        return plan

    def _find(self, timestep: Tensor | float | None) -> int:
        """Return the index of the next step; the first one is looked up (the second of two that are the same)."""
        number = None if timestep is None else self._number(timestep)
        if self._index is None:
            self._index = self._begin
        if self._index is None:
            places = [i for i, one in enumerate(self._plan.numbers) if one == number]
            self._index = places[min(1, len(places) - 1)] if places else 0
        return self._index
