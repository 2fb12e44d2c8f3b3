"""Weights in pickles (`.bin`, `.pt`, `.ckpt`), read without running anything that they contain.

A pickle is a program. This one is looked through first, so that what it would call can be named, and then run by
torch's interpreter, which knows a fixed list of calls that make tensors and no others.
"""

from __future__ import annotations

import mmap
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthdiff.checkpoint.header import ZIP, read_start
from depthdiff.config import CheckpointError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
HARMLESS = (
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.nn.parameter.Parameter",
)
"""What files of weights call, beside names of types."""

MAX_PROGRAM = 2**21
"""Bytes of a pickle without its tensors; that of Stable Diffusion 2's UNet has 0.1 million."""

AGAIN = "download it again, or take safetensors"


def read_pickle(path: Path) -> tuple[dict[str, Any], bool]:
    """Map the tensors of a pickle into memory, as far as its format allows.

    Returns:
        What the file holds by name, tensors or not; of a training checkpoint its `state_dict`. And whether the tensors
        are the file's own pages: torch's format before version 1.6 cannot be mapped.

    Raises:
        CheckpointError: no pickle, a damaged one, or one that is more than tensors: nothing of it has been run.
    """
    content, zipped = _load(path, mapped=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} must hold tensors by name, got {type(content).__name__}")
    return dict(content), zipped


def read_tensors_anyhow(path: Path, most: int) -> Any:
    """Read what a pickle of tensors holds, in whatever form, into memory of its own.

    Args:
        path: of the file.
        most: tensors that it may hold.

    Raises:
        CheckpointError: as `read_pickle`; or there are more tensors, or more numbers, than the file can hold.
    """
    content, _ = _load(path, mapped=False)
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
    if claimed > path.stat().st_size or not all(map(is_weight, tensors)):
        raise CheckpointError(f"{path} claims tensors of {claimed:,} bytes, more than it holds; it is damaged")
    return content


def _load(path: Path, mapped: bool) -> tuple[Any, bool]:
    """Look through a pickle and read it; return what it holds, and whether its format can be mapped."""
    start, size = read_start(path)
    if start[8:10] == b'{"':
        raise CheckpointError(f"{path} is a safetensors file under the name of a pickle; name it .safetensors")
    zipped = start.startswith(ZIP)
    _refuse_code(path, _names_in_zip(path, size) if zipped else _names_in_stream(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} cannot be read as a pickle of tensors: {_first_line(error)}; {AGAIN}") from error
    except (AttributeError, TypeError, AssertionError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}; {AGAIN}") from error
    return content, zipped


def is_weight(value: object) -> bool:
    """Return whether a value of a pickle is an ordinary tensor on the CPU."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _refuse_code(path: Path, names: Iterator[str]) -> None:
    """Refuse a pickle that names more than tensors are made of."""
    try:
        found = list(dict.fromkeys(names))
    except (ValueError, IndexError, OSError, EOFError, NotImplementedError, OverflowError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged or no pickle of torch: {_first_line(error)}; {AGAIN}") from error
    strange = [name for name in found if not _is_harmless(name)]
    if strange:
        raise CheckpointError(
            f"{path} holds more than tensors: it would use {', '.join(strange[:3])}. Nothing of it was run. "
            "Do not open it with other programs; get the weights as safetensors from whom you trust"
        )


def _is_harmless(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    is_type = module == "torch" and (leaf.endswith("Storage") or isinstance(vars(torch).get(leaf), torch.dtype))
    return is_type or name in HARMLESS


def _names_in_zip(path: Path, size: int) -> Iterator[str]:
    """List what the program in an archive of torch refers to; its parts must be stored as they are, once."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
            raise ValueError("its parts are compressed or larger than the file")
        programs = [part for part in parts if part.filename.endswith("/data.pkl")]
        if len(programs) != 1 or programs[0].file_size > MAX_PROGRAM:
            raise ValueError(f"it holds {len(programs)} programs, expected one of at most {MAX_PROGRAM:,} bytes")
        program = archive.read(programs[0])
    yield from _names(program)


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
