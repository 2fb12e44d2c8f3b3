"""A readers-writer lock for weights: many calls at a time, or one change.

A readers-writer lock. It waits for what ends by itself, and refuses by name what would wait for ever.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Turns:
    """Readers-writer lock: calls of several threads use one pipeline's weights, changes run alone.

    Within one thread nothing waits: a callback may change the adapters of its own call, from the next step on. A copy,
    also a pickled one, is a lock of its own that nobody holds.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._process = os.getpid()
        self._uses: dict[object, tuple[int, bool]] = {}  # -> thread, whether it is a call
        self._changer: int | None = None
        self._waiting = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()

    def __deepcopy__(self, memo: object) -> Turns:
        return Turns()

    @contextmanager
    def use(self, ends_by_itself: bool = True) -> Iterator[None]:
        """Use the weights; waits while another thread changes them.

        Args:
            ends_by_itself: as a call does; False for a run that is in its caller's hands, for which no change waits.
        """
        token, me = object(), self._here()
        try:
            with self._condition:
                inside = self._changer == me or any(thread == me for thread, _ in self._uses.values())
                while not inside and (self._changer is not None or self._waiting):
                    self._condition.wait()
                self._uses[token] = me, ends_by_itself
            yield
        finally:
            with self._condition:
                self._uses.pop(token, None)
                self._condition.notify_all()

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Change the weights; waits until the calls of other threads have ended.

        Args:
            what: is to be done, for the error.

        Raises:
            RuntimeError: another thread has a run that it steps through itself; or this change is made within a call
                while there are calls of others, which may be about to do the same.
        """
        me = self._here()
        outermost = self._changer != me
        try:
            with self._condition:
                self._waiting += 1
                try:
                    while outermost and self._others_work(me):
                        self._refuse_to_wait(me, what)
                        self._condition.wait()
                    self._changer = me
                finally:
                    self._waiting -= 1
                    self._condition.notify_all()
            yield
        finally:
            with self._condition:
                if outermost and self._changer == me:
                    self._changer = None
                    self._condition.notify_all()

    def _here(self) -> int:
        """Return this thread; a process that was forked has none of the others."""
        if self._process != os.getpid():
            vars(self).update(vars(Turns()))
        return threading.get_ident()

    def _others_work(self, me: int) -> bool:
        return self._changer is not None or any(thread != me for thread, _ in self._uses.values())

    def _refuse_to_wait(self, me: int, what: str) -> None:
        """Refuse a change that would wait for what does not end by itself, or for what may wait for it."""
        calls = {thread for thread, is_call in self._uses.values() if is_call} | {self._changer}
        within = any(thread == me for thread, _ in self._uses.values())
        stuck = any(thread != me and thread not in calls for thread, _ in self._uses.values())
        if within or stuck:
            whose = "it was requested from inside a call" if within else "another thread steps through a run"
            raise RuntimeError(
                f"{what} changes weights that calls of other threads use, and cannot wait for them: {whose}; end that "
                "first, or use one pipeline per thread"
            )
