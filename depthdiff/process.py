"""Settings of the whole process, which the command may choose; a library leaves them alone."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import TextIO

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of glibc's malloc.h."""


def keep_freed_buffers() -> bool:
    """Let glibc keep freed buffers for reuse instead of returning their pages, which the system would clear again.

    Returns:
        Whether the allocator took it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def allow_tf32() -> None:
    """Multiply float32 matrices in TF32 on CUDA devices: faster, with 10 bits of mantissa."""
    torch.set_float32_matmul_precision("high")


class Stream(io.TextIOBase):
    """Text for a person who may have gone: what cannot be written is left out, and what has no letter is spelt out.

    Args:
        stream: `sys.stdout` or `sys.stderr`; None where the process was started without it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream beneath."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write and flush, as long as somebody reads."""
        if self.stream is not None:
            try:
                self.stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
                self.stream.flush()
            except (OSError, ValueError):  # a broken pipe, a closed terminal, a closed stream
                self._let_go(self.stream)
        return len(text)

    def isatty(self) -> bool:
        """Return whether a person watches."""
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream beneath, by which its width is found."""
        if self.stream is None:
            raise io.UnsupportedOperation("no stream")
        return self.stream.fileno()

    def _let_go(self, stream: TextIO) -> None:
        """Write no more, and let what is still buffered go nowhere when the interpreter ends."""
        self.stream = None
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Keep working within when stdout or stderr is closed, broken, or of a narrow encoding."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(Stream(sys.stdout)))
        stack.enter_context(redirect_stderr(Stream(sys.stderr)))
        yield


@contextmanager
def showing_warnings(name: str) -> Iterator[None]:
    """Within, print the warnings of one logger on stderr, each as a line of the command, and nowhere else."""
    logger, handler = logging.getLogger(name), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("depthdiff: %(message)s"))
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


class Terminated(BaseException):
    """The process was asked to end, by SIGTERM or SIGHUP."""


@contextmanager
def stopping(stop: Callable[[], None] | None) -> Iterator[None]:
    """Within, the first SIGINT calls `stop`, and the next one ends the process as outside; None changes nothing."""
    before = signal.getsignal(signal.SIGINT)
    if stop is None or before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def cleaning_up() -> Iterator[list[int]]:
    """Within, SIGINT raises `KeyboardInterrupt`, SIGTERM and SIGHUP `Terminated`, so that unfinished files are removed.

    In the main thread alone.

    Yields:
        The signals that came: a library in which one raises may turn that into an error of its own.
    """
    came: list[int] = []

    def end(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(signal.Signals(signum).name)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    kept = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    try:
        for number, handler in kept.items():
            if handler is not signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, end)
        yield came
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
