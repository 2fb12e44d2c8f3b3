"""Stop runs from outside: from another thread, a signal handler, or a callback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Stop:
    """Whether a run is asked to stop.

    Attributes:
        asked: before its next step.
    """

    asked: bool = False


class Interruption:
    """The runs that are under way, each of which can be asked to stop. A copy has none of them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come while its own thread holds it
        self._under_way: list[tuple[int, Stop]] = []
        self._here = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Interruption, ()

    def __deepcopy__(self, memo: object) -> Interruption:
        return Interruption()

    @contextmanager
    def under_way(self, stop: Stop) -> Iterator[Stop]:
        """Let a run be asked to stop within; one that is under way already stays asked."""
        entry = threading.get_ident(), stop
        self._here.latest = stop
        with self._lock:
            if all(other is not stop for _, other in self._under_way):
                stop.asked = False
            self._under_way.append(entry)
        try:
            yield stop
        finally:
            with self._lock:
                self._under_way.remove(entry)
                left = [other for thread, other in self._under_way if thread == entry[0]]
            if left and entry[0] == threading.get_ident():
                self._here.latest = left[-1]

    def ask_all(self) -> None:
        """Ask all that is under way to stop."""
        with self._lock:
            for _, stop in self._under_way:
                stop.asked = True

    def ask_latest(self) -> None:
        """Ask the latest run of this thread to stop; all where it has none."""
        with self._lock:
            mine = [stop for thread, stop in self._under_way if thread == threading.get_ident()]
        if mine:
            mine[-1].asked = True
        else:
            self.ask_all()

    @property
    def asked(self) -> bool:
        """Whether this thread's present or latest run was asked to stop."""
        latest = getattr(self._here, "latest", None)
        return latest is not None and latest.asked
