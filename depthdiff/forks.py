"""A process that was forked from one whose threads have worked: GNU OpenMP's threads are gone there, and it waits."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch

MAPS = Path("/proc/self/maps")
"""File in which Linux lists the libraries of a process."""


class Workers:
    """Remembers which threads of which process have had torch's worker threads; copies and pickles know of none.

    GNU OpenMP keeps its workers for each thread that asks for them. A fork copies the thread that forks and what it
    believes of its workers, but not these: its next parallel work never ends.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.threads: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, ()

    def enter(self) -> None:
        """Note that this thread begins work.

        Raises:
            ValueError: its workers stayed in the process that this one was forked from.
        """
        if torch.get_num_threads() < 2:
            return
        here = threading.get_ident()
        if self.process != os.getpid():
            if here in self.threads and _is_gnu():
                raise ValueError(
                    f"the pipeline must be called in the process that it was loaded in, got one forked from it after "
                    f"a call with {torch.get_num_threads()} threads, where OpenMP would wait for ever; start processes "
                    'with multiprocessing\'s "spawn", or call torch.set_num_threads(1) in the forked one'
                )
            self.process, self.threads = os.getpid(), set()
        self.threads.add(here)


def _is_gnu() -> bool:
    """Return whether this process has loaded GNU's OpenMP; others survive a fork."""
    return MAPS.is_file() and "libgomp" in MAPS.read_text(encoding="utf-8", errors="replace")
