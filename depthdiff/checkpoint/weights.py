"""From a folder to a network's tensors: which files, what they hold, and the tensors themselves under our names.

Safetensors are taken where there are any, pickles where there is nothing else. Weights that keep their dtype are the
file's own pages of memory; those that are cast are cast one by one, each giving its pages back before the next is read.

A pickle is a program. What it would call is listed first, so that an error can name it, and because torch's restricted
unpickler (`weights_only=True`), which then runs it, allows calls such as `bytearray`, with which a file can demand any
amount of memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from depthdiff.checkpoint.hub import read_json
from depthdiff.checkpoint.ldm import Table, split_part
from depthdiff.config import CheckpointError

SAFETENSORS, PICKLE = ".safetensors", ".bin"
PICKLE_STEMS = {"model": "pytorch_model"}
"""transformers calls pickles differently; diffusers does not."""

SHARD = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}", re.ASCII)
FLOAT_NAMES = ("F64", "F32", "F16", "BF16")
DTYPE_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.bool: "BOOL", torch.complex64: "C64"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
    **{torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ"},
}
"""torch's dtype -> its name in safetensors."""

MAX_HEADER = 2**21
"""Bytes of a safetensors header; that of all four networks of Stable Diffusion 2 together has 0.3 million."""

MAX_AXES = 64
"""Of a tensor of torch."""

MAX_PROGRAM = 2**21
"""Bytes of a pickle without its tensors; that of Stable Diffusion 2's UNet has 0.1 million."""

AGAIN = "was the download interrupted? Download it again"

ZIP = b"PK\x03\x04"
HARMLESS = (
    *("collections.OrderedDict", "torch.Size", "torch.nn.parameter.Parameter"),
    *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter")),
)
"""What pickles of weights call, beside names of types."""

DAMAGE = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, ValueError, TypeError, LookupError,
          AttributeError, ArithmeticError, AssertionError, MemoryError, RuntimeError)  # fmt: skip
"""What torch and Python raise on a damaged pickle."""

MISTAKEN: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"<!doctype", b"<html", b"<head", b"<?xml", b"<svg", b"<!--"),
        "is a web page saved under this name, maybe an error's; download the file itself (/resolve/, not /blob/)",
    ),
    (
        (b'{"error', b'{"message', b"entry not found", b"access to model", b"invalid username", b"not found"),
        "is an error message of a server saved under this name; log in where that is needed and download again",
    ),
    ((b"\x1f\x8b",), "is a gzip archive; unpack it"),
    ((b"7z\xbc\xaf", b"rar!", b"\xfd7zxz"), "is an archive; unpack it"),
    ((b"gguf",), "is a GGUF file, which this package does not read"),
)
"""How files begin, in small letters, that are often found under the name of weights -> what they are."""


def suffixes(use_safetensors: bool | None) -> tuple[str, ...]:
    """Return the forms to look for, in order: both if None, else one."""
    return {None: (SAFETENSORS, PICKLE), True: (SAFETENSORS,), False: (PICKLE,)}[use_safetensors]


def check_variant(variant: object) -> None:
    """Refuse what cannot be part of a file's name."""
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        raise ValueError(f'variant must be part of a file\'s name, such as "fp16", got {variant!r}')


def weight_files(stem: str, variant: str | None, suffix: str = SAFETENSORS) -> tuple[str, str, str]:
    """Name the weight file, its index where it is sharded, and the pattern of its shards."""
    stem = PICKLE_STEMS.get(stem, stem) if suffix == PICKLE else stem
    dotted = "" if variant is None else f".{variant}"
    return f"{stem}{dotted}{suffix}", f"{stem}{suffix}.index{dotted}.json", f"{stem}{dotted}-?????-of-?????{suffix}"


def has_weights(folder: Path, stem: str, variant: str | None, suffix: str) -> bool:
    """Return whether a folder holds weights in one form, in one file or sharded."""
    return any((folder / name).is_file() for name in weight_files(stem, variant, suffix)[:2])


def _find_weights(folder: Path, stem: str, variant: str | None, use_safetensors: bool | None) -> list[Path]:
    """List the weight files of a component: one, or the shards that an index names."""
    for suffix in suffixes(use_safetensors):
        single, index, _ = weight_files(stem, variant, suffix)
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder, index, suffix)
    wanted = [weight_files(stem, variant, suffix)[0] for suffix in suffixes(use_safetensors)]
    for name in wanted:
        if (folder / name).is_symlink():
            raise CheckpointError(f"{folder / name} is a symbolic link that leads to no file; download the file again")
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (SAFETENSORS, PICKLE, ".ckpt", ".msgpack", ".h5"))
    remedy = f"there is {', '.join(others)}" if others else "there are no weights at all"
    if use_safetensors is not None and has_weights(folder, stem, variant, PICKLE if use_safetensors else SAFETENSORS):
        remedy += f"; leave out use_safetensors={use_safetensors}"
    elif variant is not None and others:
        remedy += "; leave out variant or name another"
    elif any(f"{stem}." in name for name in others):
        remedy += '; name one as variant, such as variant="fp16"'
    raise CheckpointError(f"{folder} has no {' or '.join(wanted)}: {remedy}")


def _shards(folder: Path, index: str, suffix: str) -> list[Path]:
    weight_map = read_json(folder / index).get("weight_map")
    values = list(weight_map.values()) if isinstance(weight_map, dict) else []
    good = [isinstance(name, str) and name.endswith(suffix) and SHARD.fullmatch(name) is not None for name in values]
    if not values or not all(good):
        raise CheckpointError(
            f"{folder / index} must hold a weight_map of names of {suffix} files in the same folder; is it damaged?"
        )
    names = sorted(set(values))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} shards, first: {missing[0]}")
    return [folder / name for name in names]


def read_start(path: Path) -> bytes:
    """Read the first bytes of a file of weights, or name what it is instead."""
    try:
        with path.open("rb") as file:
            start, size = file.read(512), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        wanted = re.search(rb"\nsize (\d{1,15})\s", start)
        of = f" of {int(wanted[1]):,} bytes" if wanted else ""
        raise CheckpointError(f"{path} is a Git-LFS pointer, a note of where the file{of} is; run `git lfs pull` there")
    if not start.strip(b"\0"):
        raise CheckpointError(f"{path} begins with nothing but zeros; the download has left a hole, download it again")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginnings, kind in MISTAKEN:
        if text.startswith(beginnings):
            raise CheckpointError(f"{path} {kind}")
    return start


def is_pickle(start: bytes) -> bool:
    """Return whether a file is a pickle; the length of a safetensors header may begin with the same bytes."""
    return start.startswith((ZIP, b"\x80")) and start[8:9] != b"{"


def _open_safetensors(path: Path, most: int) -> safe_open:
    """Let the safetensors library open and check a file, whose header has no more than `most` bytes."""
    start = read_start(path)
    if is_pickle(start):
        raise CheckpointError(f"{path} is a pickle under the name of a safetensors file; name it .bin")
    if start[8:9] != b"{":
        raise CheckpointError(f"{path} is not a safetensors file: it does not begin with a header; download it again")
    length = int.from_bytes(start[:8], "little")
    if length > most:
        raise CheckpointError(f"{path} claims a header of {length:,} bytes, at most {most:,} are read; is it damaged?")
    size = path.stat().st_size
    if length > size - 8:
        raise CheckpointError(f"{path} is cut off: it has {size:,} bytes, its header alone {length:,}; {AGAIN}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = f"{path}, of {size:,} bytes, is damaged, cut off or of a newer format: {_first_line(error)}"
        raise CheckpointError(f"{reason}; {AGAIN}") from error


@dataclass(frozen=True)
class Source:
    """One tensor in a file; `dtype` is its name in safetensors, `mapped` whether it comes as the file's own pages."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    mapped: bool
    get: Callable[[], Tensor]


def read_header(path: Path, most: int = MAX_HEADER) -> tuple[dict[str, Source], dict[str, str]]:
    """List the tensors of a safetensors file, of which nothing but the header is read, and its metadata.

    Raises:
        CheckpointError: not a safetensors file, a damaged one, one with a header of more than `most` bytes, or a tensor
            that torch does not hold.
    """
    file = _open_safetensors(path, most)

    def source(key: str) -> Source:
        one = file.get_slice(key)
        dtype, shape = one.get_dtype(), tuple(one.get_shape())
        if dtype not in DTYPE_NAMES.values() or len(shape) > MAX_AXES:
            raise CheckpointError(f"{path}: {key[:80]!r} is {dtype} of {len(shape)} axes, which torch does not hold")
        return Source(path, dtype, shape, True, lambda: file.get_tensor(key))

    return {key: source(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def open_safetensors(path: Path) -> dict[str, Source]:
    """List the tensors of a safetensors file; errors as in `read_header`."""
    return read_header(path)[0]


def open_pickle(path: Path) -> dict[str, Source]:
    """List the tensors of a pickle, mapped into memory where its format (torch 1.6 or newer) allows it."""
    content, mapped = _load_pickle(path, mapped=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} must hold tensors by name, got {type(content).__name__}")
    sources = {}
    for key, tensor in content.items():
        if not _is_weight(tensor):
            raise CheckpointError(
                f"{path}: {key[:80]!r} is not a tensor but {type(tensor).__name__}; is it a file of weights?"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {key[:80]!r} claims more numbers than the file holds; it is damaged")
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        sources[key] = Source(path, dtype, tuple(tensor.shape), mapped, tensor.contiguous)
    return sources


def read_tensors_anyhow(path: Path, most: int) -> Any:
    """Read what a pickle of at most `most` tensors holds, in whatever form, into memory of its own."""
    content, _ = _load_pickle(path, mapped=False)
    tensors, rest, seen = [], [content], set()
    while rest:
        value = rest.pop()
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:  # one may hold itself
            seen.add(id(value))
            rest += value.values() if isinstance(value, dict) else value
        if len(tensors) > most or len(rest) > 100 * most or len(seen) > 100 * most:
            raise CheckpointError(f"{path} has more than {most:,} tensors or values; is it an adapter?")
    claimed = sum(tensor.nbytes for tensor in tensors)
    if claimed > path.stat().st_size or not all(map(_is_weight, tensors)):
        raise CheckpointError(f"{path} claims tensors of {claimed:,} bytes, more than it holds; it is damaged")
    return content


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _load_pickle(path: Path, mapped: bool) -> tuple[Any, bool]:
    """Return what a pickle holds, and whether its tensors can be mapped."""
    start = read_start(path)
    if start[8:10] == b'{"':
        raise CheckpointError(f"{path} is a safetensors file under the name of a pickle; name it .safetensors")
    zipped, content = start.startswith(ZIP), None
    try:
        names = dict.fromkeys(_names_in_zip(path) if zipped else _names_in_stream(path))
        strange = [name for name in names if not _is_harmless(name)]
        if not strange:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and mapped)
    except DAMAGE as error:
        reason = f"{path} cannot be read as a pickle of tensors: {_first_line(error)}"
        raise CheckpointError(f"{reason}; download it again, or take safetensors") from error
    if strange:
        raise CheckpointError(
            f"{path} holds more than tensors: it would use {', '.join(strange[:3])}. Nothing of it was run. "
            "Do not open it with other programs; get the weights as safetensors from a source that you trust"
        )
    return content, zipped


def _is_harmless(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    is_type = module == "torch" and (leaf.endswith("Storage") or isinstance(vars(torch).get(leaf), torch.dtype))
    return is_type or name in HARMLESS


def _names_in_zip(path: Path) -> Iterator[str]:
    """List what the program in an archive of torch refers to; its parts must be stored as they are, once."""
    with zipfile.ZipFile(path) as archive:
        parts, size = archive.infolist(), path.stat().st_size
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
            raise ValueError("its parts are compressed or larger than the file")
        programs = [part for part in parts if part.filename.endswith("/data.pkl")]
        if len(programs) != 1 or programs[0].file_size > MAX_PROGRAM:
            raise ValueError(f"it holds {len(programs)} programs, expected one of at most {MAX_PROGRAM:,} bytes")
        yield from _names(archive.read(programs[0]))


def _names_in_stream(path: Path) -> Iterator[str]:
    """List what the programs of torch's older format refer to: five pickles, then the bytes of the tensors."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(5):
            yield from _names(content)


def _names(program: Any) -> Iterator[str]:
    """List the names, `module.name`, that a pickle refers to, without running it."""
    texts: list[str] = []  # the last two that were put on the stack
    for count, (operation, argument, _) in enumerate(pickletools.genops(program)):
        if count > MAX_PROGRAM:
            raise ValueError(f"its program is longer than {MAX_PROGRAM:,} operations")
        if operation.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif operation.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif operation.name.startswith("EXT"):
            yield f"extension.{argument}"
        elif "UNICODE" in operation.name or "STRING" in operation.name:
            texts = [*texts[-1:], str(argument)]


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:200] or type(error).__name__


def open_folder(
    cls: type[Any], folder: Path, variant: str | None = None, use_safetensors: bool | None = None
) -> tuple[str, dict[str, Source]]:
    """List the tensors of a network in its folder.

    Returns:
        The name of the file or folder, for errors, and published key -> tensor.

    Raises:
        CheckpointError: there are no weights, or a file is missing, damaged or holds more than tensors.
    """
    sources: dict[str, Source] = {}
    paths = _find_weights(folder, cls.weights_name, variant, use_safetensors)
    for path in paths:
        for key, source in (open_pickle if path.suffix == PICKLE else open_safetensors)(path).items():
            if key in sources:
                raise CheckpointError(f"{key!r} is in {sources[key].path.name} and in {path.name}; remove one file")
            sources[key] = source
    return str(paths[0] if len(paths) == 1 else folder), sources


def read_tensors(
    name: str,
    sources: dict[str, Source],
    table: Table,
    wanted: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None = None,
    copy: bool = False,
) -> dict[str, Tensor]:
    """Read tensors under our names.

    Args:
        name: of the file, for errors.
        sources: key -> tensor; those that were read are taken out.
        table: of its layout.
        wanted: our key -> shape.
        dtype: to cast to; None leaves the file's own.
        copy: into memory of the process's own, rather than map them.

    Raises:
        CheckpointError: the keys, shapes or dtypes are not the network's.
    """
    pairs = table.assign(name, table.cut({key: source.shape for key, source in sources.items()}), wanted)
    check_floats(pairs.values(), sources)
    order = {key: place for place, key in enumerate(sources)}  # of the files
    origins = sorted(((*split_part(key), ours) for ours, key in pairs.items()), key=lambda origin: order[origin[1]])
    state: dict[str, Tensor] = {}
    for key, group in groupby(origins, key=lambda origin: origin[1]):
        source = sources.pop(key)
        tensor = source.get()
        for part, _, ours in group:
            own = tensor if part is None else tensor.chunk(table.parts(key))[part]
            cast = own.to(dtype or own.dtype, copy=copy)
            state[ours] = cast.reshape(wanted[ours])
        if source.mapped and (copy or tensor.dtype != (dtype or tensor.dtype)):
            give_back(tensor)
    return state


def check_floats(keys: Iterable[str], sources: Mapping[str, Source]) -> None:
    """Refuse weights that are not floating-point numbers; `keys` may be names of parts."""
    for key in (split_part(key)[1] for key in keys):
        if sources[key].dtype not in FLOAT_NAMES:
            raise CheckpointError(f"{sources[key].path}: {key!r} is of type {sources[key].dtype}, expected floats")


PAGEMAP = Path("/proc/self/pagemap")
PRESENT, SWAPPED, OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
"""Bits of a page's entry. Source: Linux, Documentation/admin-guide/mm/pagemap.rst."""


def whole_pages(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the number of the pages of memory that lie within a contiguous tensor."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    return first, max(0, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first)


def advise(tensor: Tensor, advice: str) -> None:
    """Call `madvise` on a tensor's whole pages, where the system has that advice; `advice` is its name in `mmap`."""
    number: int | None = getattr(mmap, advice, None)
    call: Any = getattr(ctypes.CDLL(None), "madvise", None) if number is not None else None
    first, count = whole_pages(tensor)
    if call is not None and count > 0:
        call(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE), number)


def give_back(tensor: Tensor) -> None:
    """Let the system forget the pages of a mapped tensor that was read; else they count as memory of this process."""
    advise(tensor, "MADV_DONTNEED")


def give_back_unwritten(tensor: Tensor) -> bool:
    """Give back the pages of a tensor if it is mapped and was not written to; return whether that is so.

    A page that was written to is a page of the process's own, whose contents would be lost. Where the system does not
    say (it is not Linux, or does not allow it), nothing is given back.
    """
    first, count = whole_pages(tensor) if tensor.device.type == "cpu" else (0, 0)
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
