"""What only the owner of a process may choose and set, as the command does; a library leaves it alone."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of glibc's malloc.h."""


def keep_freed_buffers() -> bool:
    """Let the C library keep freed buffers for the next ones in place of returning them page by page.

    The pages of a large buffer are otherwise cleared anew each time that one is made. Of effect with glibc alone.

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


def best_device() -> str:
    """Name the fastest device that torch has here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
