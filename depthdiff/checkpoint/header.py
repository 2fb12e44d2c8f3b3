"""What a weight file says of itself, checked against what it is, before anything of it is mapped or believed.

A safetensors file is eight bytes with the length of its header, the header (JSON: name -> dtype, shape, place), and the
tensors' bytes. Source: huggingface/safetensors, README.md, "Format". Beside what the library checks, the length of the
whole file is compared with what the header promises, so that an interrupted download is known for what it is.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthdiff.checkpoint.hub import parse_json
from depthdiff.config import CheckpointError

ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 1),
}
"""Bytes of a number, by the format's name of its type."""

FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 2**21
"""Bytes; the header of all four networks of Stable Diffusion 2 together has 0.3 million."""

MAX_RANK = 64
ZIP = b"PK\x03\x04"
"""What archives begin with, those of torch among them."""

START = 512


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: as the format names it, such as "F16".
        shape: of the tensor.
        begin: of its bytes, counted from the end of the header.
        end: likewise.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def what_is(start: bytes, size: int) -> str | None:
    """Name what lies in the place of weights, and what to do about it; None where nothing known is recognised.

    Args:
        start: the first bytes of the file, up to 512.
        size: of the file.
    """
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        return "is empty; download it again"
    if text.startswith(b"version https://git-lfs"):
        wanted = re.search(rb"\nsize (\d{1,15})\s", text)
        of = f" of {int(wanted[1]):,} bytes" if wanted else ""
        return f"is a Git-LFS pointer, a note of where the file{of} is; run `git lfs pull` in that folder"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<svg", b"<!--")):
        return "is a web page saved under this name, maybe an error's; download the file itself (/resolve/, not /blob/)"
    if text.startswith(
        (b'{"error', b'{"message', b"entry not found", b"access to model", b"invalid username", b"not found")
    ):
        return "is an error message of a server saved under this name; log in where that is needed and download again"
    if not start.strip(b"\0"):
        return "begins with nothing but zeros; the download has left a hole, download it again"
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"7z\xbc\xaf", "7z"), (b"Rar!", "rar"), (b"\xfd7zXZ", "xz")):
        if start.startswith(magic):
            return f"is a {kind} archive; unpack it"
    return "is a GGUF file, which this package does not read" if start.startswith(b"GGUF") else None


def is_pickle(start: bytes) -> bool:
    """Tell a pickle from safetensors, whose length of the header may begin with the bytes that a pickle begins with.

    Args:
        start: the first bytes of the file, 9 or more.
    """
    return start.startswith((ZIP, b"\x80")) and start[8:9] != b"{"


def read_start(path: Path) -> tuple[bytes, int]:
    """Read the first bytes of a file, and its size.

    Raises:
        CheckpointError: it cannot be read, or is recognised as no weights at all.
    """
    try:
        with path.open("rb") as file:
            start, size = file.read(START), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    found = what_is(start, size)
    if found is not None:
        raise CheckpointError(f"{path} {found}")
    return start, size


def read_header(path: Path, most: int = MAX_HEADER) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read what a safetensors file holds without reading a tensor.

    Args:
        path: of the file.
        most: bytes that the header may have.

    Returns:
        Name -> tensor, and the file's metadata.

    Raises:
        CheckpointError: no safetensors file, a damaged one, or one that is cut off.
    """
    start, size = read_start(path)
    if is_pickle(start):
        raise CheckpointError(f"{path} is a pickle under the name of a safetensors file; name it .bin")
    if size < 10:
        raise CheckpointError(f"{path} has {size} bytes, which is no safetensors file; download it again")
    [length] = struct.unpack("<Q", start[:8])
    if not start[8:9] == b"{" or length < 2:
        raise CheckpointError(f"{path} is no safetensors file: it does not begin with a header; download it again")
    if length > most:
        raise CheckpointError(f"{path} claims a header of {length:,} bytes, at most {most:,} are read; is it damaged?")
    if length > size - 8:
        raise CheckpointError(f"{path} has {size:,} bytes, and its header alone {length:,}; download it again")
    with path.open("rb") as file:
        file.seek(8)
        content = file.read(length)
    values = parse_json(content, path, "header")
    metadata = values.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ of its header must map texts to texts; the file is damaged")
    entries = {name: _entry(path, name, value) for name, value in values.items()}
    _check_places(path, entries, size - 8 - length)
    return entries, metadata


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    """Check what the header says of one tensor."""
    where = f"{path}: header of {name[:80]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must hold dtype, shape and data_offsets alone; the file is damaged")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{where}: unknown dtype {str(dtype)[:20]!r}; the file is damaged or of a newer format")
    for numbers, least, most in ((shape, 0, MAX_RANK), (offsets, 2, 2)):
        good = isinstance(numbers, list) and least <= len(numbers) <= most
        if not good or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise CheckpointError(f"{where}: shape and data_offsets must be whole numbers from 0; the file is damaged")
    begin, end = offsets
    needed = math.prod(shape) * ITEM_SIZES[dtype]
    if end - begin != needed:
        kind = f"{dtype} of shape {tuple(shape[:8])}"
        raise CheckpointError(
            f"{where}: {kind} needs {needed:,} bytes, its place has {end - begin:,}; the file is damaged"
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def _check_places(path: Path, entries: dict[str, TensorEntry], size: int) -> None:
    """Refuse tensors that overlap, leave gaps, or reach beyond the file's `size` bytes of data, or do not fill them."""
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            fault = "overlaps the tensor before it" if entry.begin < place else "leaves a gap before it"
            raise CheckpointError(f"{path}: {name[:80]!r} {fault}; the file is damaged")
        place = entry.end
    if place > size:
        raise CheckpointError(
            f"{path} is cut off: its header promises {place:,} bytes of weights, there are {size:,}; "
            "was the download interrupted? Delete the file and download it again"
        )
    if place < size:
        raise CheckpointError(f"{path} has {size - place:,} bytes more than its header promises; the file is damaged")
