"""Base of the solvers that go by the index of a step: one pure function, `Plan.advance`, behind plan and contract."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from depthdiff.checks import check_flag, check_generators, check_number, show
from depthdiff.config import FrozenDict, constructor_fields
from depthdiff.noise import randn
from depthdiff.schedulers.base import Plan, SchedulerMixin, StepOutput
from depthdiff.schedulers.schedule import check_pair, read_timestep, widen

Draw = Callable[[torch.dtype], Tensor]
"""Draws unit-normal noise of a dtype, in the latents' shape."""


def drawing(like: Tensor, generator: Generator | Sequence[Generator] | None, given: Tensor | None = None) -> Draw:
    """Return a function that draws noise from a generator, or returns the noise that is given."""
    if given is not None:
        check_pair("variance_noise", given, "sample", like)
        return lambda dtype: given.to(like.device, dtype)
    check_generators("generator", generator)
    return lambda dtype: randn(like.shape, generator, device=like.device, dtype=dtype)


@dataclass(frozen=True, eq=False)
class IndexedPlan(Plan):
    """A run whose steps follow from their index; see `Plan`.

    Attributes:
        t_start: how many calls of the whole run are left out.
    """

    t_start: int
    widens: ClassVar[bool] = True

    @abstractmethod
    def advance(
        self, sample: Tensor, model_output: Tensor, index: int, state: Any, generator: Any, draw: Draw
    ) -> StepOutput:
        """Take the step at an index of the whole run; a pure function but for what is drawn.

        Args:
            sample: (B, C, h, w), float32 or float64, before `scale_model_input`.
            model_output: (B, C, h, w), likewise, what the network returned.
            index: of the call, from 0.
            state: of the call before; `init_state()` for the first.
            generator: of the caller's, for what draws no unit-normal noise.
            draw: draws noise.
        """

    def number_at(self, index: int) -> float:
        """Return the timestep at an index of the whole run."""
        return self.numbers[index - self.t_start]

    def step(
        self,
        noise_pred: Tensor,
        index: int,
        latents: Tensor,
        state: Any = None,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> StepOutput:
        """See `Plan`."""
        index = self._check_step(noise_pred, index, latents) + self.t_start
        if type(state) is not type(self.init_state()):
            raise TypeError(f"state must be that of the step before, or init_state() for the first, got {show(state)}")
        draw = drawing(latents, generator)
        return self.take(latents, noise_pred, index, state, generator, draw)

    def take(
        self, sample: Tensor, model_output: Tensor, index: int, state: Any, generator: Any, draw: Draw, **options: Any
    ) -> StepOutput:
        """Take a step as `advance` does, for half precision in float32 unless the method has its own."""
        kind = model_output.dtype
        if self.widens:
            sample, model_output = widen(sample), widen(model_output)
        result = self.advance(sample, model_output, index, state, generator, draw, **options)
        return result._replace(prev_sample=result.prev_sample.to(kind))

    def _check_step(self, noise_pred: Tensor, index: int, latents: Tensor) -> int:
        """See `Plan`; where the network also learnt a variance, it returns twice the channels."""
        if str(self.config.get("variance_type")).startswith("learned"):
            noise_pred = noise_pred[:, : latents.shape[1]]
        return super()._check_step(noise_pred, index, latents)


class IndexedSchedulerMixin(SchedulerMixin):
    """Base of the schedulers whose published `step` counts.

    The state of a run is that of its plan, whose fields are the published attributes.

    Attributes:
        step_index: of the next step; None before the first.
        begin_index: of the first step, where `set_begin_index` gave it.
    """

    _plan: Any

    def _start_run(self, run: np.ndarray, plan: Any) -> None:
        self._plan = plan
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._keep(plan.init_state())

    def _keep(self, state: Any) -> None:
        """Set the published attributes of a run's state."""
        for name, value in state._asdict().items() if state is not None else ():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    def _state(self) -> Any:
        """Read the state of the run from the published attributes, as they are."""
        start = self._plan.init_state()
        if start is None:
            return None
        values = (getattr(self, name) for name in start._fields)
        return type(start)(*(tuple(value) if isinstance(value, list) else value for value in values))

    def _plan_as_it_is(self) -> Any:
        """Return the plan of the run by the published attributes, as they are."""
        return dataclasses.replace(self._plan, config=self._own_config())

    def _take(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        noise: Tensor | None = None,
        **options: Any,
    ) -> StepOutput:
        """Take a step of the present run and keep its state."""
        self._check_started()
        learnt = str(self._own("variance_type")).startswith("learned")
        check_pair("model_output", model_output[:, : sample.shape[1]] if learnt else model_output, "sample", sample)
        index, draw = self._find_step(timestep), drawing(sample, generator, noise)
        self._check_left(index)
        plan, state = self._plan_as_it_is(), self._state()
        result: StepOutput = plan.take(sample, model_output, index, state, generator, draw, **options)
        self._keep(result.state)
        self._step_index = index + 1
        return result

    def _check_started(self) -> None:
        """Do nothing: the constructor starts a run."""
        return

    def _own(self, name: str, default: Any = None) -> Any:
        """Return a setting of this class; the config may also hold those of other classes."""
        return self.config[name] if name in constructor_fields(type(self)) else default

    def _own_config(self) -> FrozenDict:
        """Return the settings of this class."""
        return FrozenDict({name: self.config[name] for name in constructor_fields(type(self)) if name in self.config})

    def _answer(self, kind: Any, result: StepOutput, return_dict: bool, *, alone: bool = False) -> Any:
        """Return a step's result as the published `step` does; `alone` without the clean latents."""
        fields = result[:1] if alone else result[:2]
        return kind(*fields) if check_flag("return_dict", return_dict) else fields

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
        number = read_timestep(timestep, math.inf, first=-math.inf, whole=False)
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

    def _calls(self) -> int:
        """Return how many calls the present run has."""
        return len(self.timesteps)

    def _check_left(self, index: int) -> None:
        """Refuse a step after the last."""
        if index >= self._calls():
            raise ValueError(
                f"step must be called for {self._calls()} timesteps alone; call set_timesteps for another run"
            )
