"""Who may use weights, and who may change them: many calls at a time, or one change.

A readers-writer lock. It waits for what ends by itself, and refuses by name what would wait for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Turns:
    """Lets calls of several threads use the weights of one pipeline, and changes of the weights come between them.

    Within one thread nothing waits: a callback may change the adapters of its own call, from the next step on. A copy,
    also a pickled one, is a lock of its own that nobody holds.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._uses: dict[object, tuple[int, bool]] = {}
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
            ends_by_itself: False for a run that is in its caller's hands, for which no change waits.
        """
        token, me = object(), threading.get_ident()
        with self._condition:
            mine = [ends for thread, ends in self._uses.values() if thread == me]
            while not mine and self._changer != me and (self._changer is not None or self._waiting):
                self._condition.wait()
            self._uses[token] = me, ends_by_itself or any(mine)  # a run within a call ends with it
        try:
            yield
        finally:
            with self._condition:
                del self._uses[token]
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
        me = threading.get_ident()
        with self._condition:
            outermost = self._changer != me
            self._waiting += 1
            try:
                while outermost and (self._changer is not None or self._others(me)):
                    within = any(thread == me for thread, _ in self._uses.values())
                    if within or not all(ends for _, ends in self._others(me)):
                        whose = "it is asked for within one" if within else "another thread steps through a run"
                        raise RuntimeError(
                            f"{what} changes weights that calls of other threads use, and cannot wait for them: "
                            f"{whose}; end that first, or use one pipeline a thread"
                        )
                    self._condition.wait()
                self._changer = me
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            if outermost:
                with self._condition:
                    self._changer = None
                    self._condition.notify_all()

    def _others(self, me: int) -> list[tuple[int, bool]]:
        return [use for use in self._uses.values() if use[0] != me]
