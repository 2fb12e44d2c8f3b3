"""Pages of memory that are mapped from a file, given back once they are read, so that they no longer count."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

PAGEMAP = Path("/proc/self/pagemap")
PRESENT, SWAPPED, OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
"""Bits of a page's entry. Source: Linux, Documentation/admin-guide/mm/pagemap.rst."""


def whole_pages(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the number of the pages that lie within a contiguous tensor."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    return first, max(0, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first)


def advise(tensor: Tensor, advice: str) -> None:
    """Give the system one of `madvise`'s pieces of advice, by its name in `mmap`, on a tensor's whole pages.

    Where the system knows no such advice nothing happens.
    """
    number: int | None = getattr(mmap, advice, None)
    call: Any = getattr(ctypes.CDLL(None), "madvise", None) if number is not None else None
    first, count = whole_pages(tensor)
    if call is not None and count > 0:
        call(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE), number)


def give_back(tensor: Tensor) -> None:
    """Tell the system that a file's pages, mapped as this tensor, are read and not needed again.

    They would count as this process's memory until the file is closed. Only whole pages within the tensor are given
    back; who reads it again has them read again from the file.
    """
    advise(tensor, "MADV_DONTNEED")


def give_back_unwritten(tensor: Tensor) -> bool:
    """Do what `give_back` does if a tensor is mapped and nothing was written to it; tell whether that is so.

    A page of a file that was written to is a page of the process's own, whose contents would be lost. Where the system
    does not tell (it is not Linux, or does not allow it), nothing is given back.
    """
    if tensor.device.type != "cpu":
        return False
    first, count = whole_pages(tensor)
    if count == 0:
        return False
    try:
        with PAGEMAP.open("rb", buffering=0) as file:
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * count), np.uint64)
    except OSError:
        return False
    if len(entries) < count or (entries & SWAPPED).any() or ((entries & PRESENT > 0) & (entries & OF_FILE == 0)).any():
        return False
    give_back(tensor)
    return True
