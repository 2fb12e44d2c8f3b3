"""Huge pages for large maps."""

from __future__ import annotations

from torch import Tensor

from depthdiff.checkpoint.weights import advise

HUGEPAGE_MIN_BYTES = 2**25
"""Size from which glibc always maps memory from the system: `DEFAULT_MMAP_THRESHOLD_MAX` in malloc.c."""


def advise_hugepage(tensor: Tensor) -> Tensor:
    """Ask the system for 2 MiB pages for a tensor that was not written to yet, and return it: fewer page faults."""
    if tensor.device.type == "cpu" and tensor.nbytes >= HUGEPAGE_MIN_BYTES:
        advise(tensor, "MADV_HUGEPAGE")
    return tensor


def empty_map(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return an empty map (B, C, H, W) of the batch, dtype and device of `x`, channels last, in huge pages."""
    return advise_hugepage(x.new_empty(len(x), height, width, channels)).movedim(3, 1)
