"""Writing a safetensors file tensor by tensor, so that the memory needed is that of the largest one.

The header, which names the place of every tensor, is written first: all sizes are known before any tensor is read.
Source: huggingface/safetensors, README.md, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from depthdiff.checkpoint.header import ITEM_SIZES
from depthdiff.checkpoint.weights import DTYPES
from depthdiff.checkpoint.write import writing
from depthdiff.config import CheckpointError

NAMES = DTYPES | {
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
"""torch's dtype -> the format's name of it."""

TORCH_DTYPES = {name: dtype for dtype, name in NAMES.items()}
ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        key: its name in the file.
        dtype: in the file, as the format names it, such as "F16"; what `read` returns is cast to it.
        shape: in the file.
        read: returns it.
        done: called when it is written.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    done: Callable[[], None]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return ITEM_SIZES[self.dtype] * torch.Size(self.shape).numel()


def tensor_entry(key: str, tensor: Tensor) -> Entry:
    """Describe a tensor that is in memory.

    Raises:
        ValueError: of a dtype or layout that the format does not have.
    """
    if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_meta:
        kind = f"{tensor.dtype} and {tensor.layout} on {tensor.device}"
        raise ValueError(f"{key!r} must be a dense tensor of numbers to be saved, got {kind}")
    return Entry(key, NAMES[tensor.dtype], tuple(tensor.shape), tensor.detach, lambda: None)


def write_safetensors(
    path: Path, entries: Iterable[Entry], *, follow: bool = False, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file; one that exists is replaced.
        entries: its tensors; they are read one after another.
        follow: see `depthdiff.checkpoint.write.check_target`.
        metadata: texts by name for the file's header.

    Raises:
        CheckpointError: two tensors of one name, or one of another shape than was said.
        OSError: the file cannot be written.
    """
    ordered = sorted(entries, key=lambda entry: (-ITEM_SIZES[entry.dtype], entry.key))
    with writing(path, follow=follow) as file:
        file.write(_header(path, ordered, metadata or {}))
        for entry in ordered:
            tensor = entry.read().to("cpu", TORCH_DTYPES[entry.dtype])
            if tuple(tensor.shape) != entry.shape:
                raise CheckpointError(f"{entry.key!r} is {tuple(tensor.shape)}, expected {entry.shape}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            entry.done()


def _header(path: Path, entries: list[Entry], metadata: Mapping[str, str]) -> bytes:
    values: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(metadata)}
    place = 0
    for entry in entries:
        if entry.key in values:
            raise CheckpointError(f"{path}: two tensors would have the name {entry.key!r}")
        offsets = [place, place + entry.nbytes]
        values[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
