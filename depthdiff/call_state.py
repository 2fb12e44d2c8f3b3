"""What a pipeline knows of its calls: the values of the present one, by thread, and how to stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from depthdiff.inputs import is_guided
from depthdiff.interruption import Interruption

P = ParamSpec("P")
R = TypeVar("R")


class CallState(threading.local):
    """What the pipeline's properties report, per thread: values of the current or latest call.

    Attributes:
        guidance_scale: of the call.
        clip_skip: of the call.
        cross_attention_kwargs: of the call.
        num_timesteps: how many times it runs the UNet.
        nesting: how many calls are under way, each made in a callback of the one before.
        prepared: whether the innermost call has prepared its run.
    """

    guidance_scale: float | tuple[float, ...] = 7.5
    clip_skip: int | None = None
    cross_attention_kwargs: dict[str, Any] | None = None
    num_timesteps: int = 0
    nesting: int = 0
    prepared: bool = False

    def begin(
        self,
        guidance_scale: float | tuple[float, ...],
        clip_skip: int | None,
        cross_attention_kwargs: dict[str, Any] | None,
        num_timesteps: int,
    ) -> None:
        """Take over what the call that begins was given."""
        self.guidance_scale, self.clip_skip = guidance_scale, clip_skip
        self.cross_attention_kwargs, self.num_timesteps = cross_attention_kwargs, num_timesteps

    def present(self) -> tuple[float | tuple[float, ...], int | None, dict[str, Any] | None, int]:
        """Return what `begin` takes over."""
        return self.guidance_scale, self.clip_skip, self.cross_attention_kwargs, self.num_timesteps

    def __reduce__(self) -> tuple[type[CallState], tuple[()]]:
        return CallState, ()


def keeps_the_outer_call(call: Callable[P, R]) -> Callable[P, R]:
    """Let a call that is made in a callback leave the values of the outer call unchanged."""

    @wraps(call)
    def keeping(*args: P.args, **kwargs: P.kwargs) -> R:
        state: CallState = args[0]._call  # type: ignore[attr-defined]
        before, prepared = state.present(), state.prepared
        state.nesting, state.prepared = state.nesting + 1, False
        try:
            return call(*args, **kwargs)
        finally:
            state.nesting, state.prepared = state.nesting - 1, prepared
            if state.nesting:
                state.begin(*before)

    return keeping


def keeps_the_call(prepare: Callable[P, R]) -> Callable[P, R]:
    """Let a run that is prepared in a callback leave the values of the call unchanged."""

    @wraps(prepare)
    def keeping(*args: P.args, **kwargs: P.kwargs) -> R:
        state: CallState = args[0]._call  # type: ignore[attr-defined]
        before, within = state.present(), state.nesting > 0 and state.prepared
        try:
            return prepare(*args, **kwargs)
        finally:
            state.prepared = True
            if within:
                state.begin(*before)

    return keeping


class CallStateMixin:
    """Adds to a pipeline what diffusers' properties report, and `interrupt`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._call, self._interruption = CallState(), Interruption()
        super().__init__(*args, **kwargs)

    @property
    def guidance_scale(self) -> float | tuple[float, ...]:
        """The guidance scale of this thread's current or latest call; callbacks may assign `_guidance_scale`."""
        return self._call.guidance_scale

    @property
    def _guidance_scale(self) -> float | tuple[float, ...]:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float | tuple[float, ...]) -> None:
        self._call.guidance_scale = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance is on."""
        return is_guided(self._guidance_scale)

    @property
    def clip_skip(self) -> int | None:
        """The `clip_skip` of this thread's current or latest call."""
        return self._call.clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """Those of this thread's current or latest call."""
        return self._call.cross_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """The number of UNet calls in this thread's current or latest call."""
        return self._call.num_timesteps

    def interrupt(self) -> None:
        """Let every call and run of this pipeline that is under way, in any thread, end before its next step.

        A call still returns pictures: its latents as far as they have come, decoded.
        """
        self._interruption.ask_all()

    @property
    def _interrupt(self) -> bool:
        """Whether this thread's present or latest call is interrupted; a callback may assign True."""
        return self._interruption.asked

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        if value:
            self._interruption.ask_latest()
