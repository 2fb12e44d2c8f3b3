"""From a folder to a network's tensors: which files, what they hold, and the tensors themselves under our names.

Safetensors are taken where there are any, pickles where there is nothing else. Weights that keep their dtype are the
file's own pages; those that are cast are cast one by one, each giving its pages back before the next is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from depthdiff.checkpoint.header import FLOATS, read_header
from depthdiff.checkpoint.hub import read_json
from depthdiff.checkpoint.ldm import TABLES, Table, split_part
from depthdiff.checkpoint.mapped import give_back
from depthdiff.checkpoint.pickles import is_weight, read_pickle
from depthdiff.config import CheckpointError

SAFETENSORS, PICKLE = ".safetensors", ".bin"
PICKLE_STEMS = {"model": "pytorch_model"}
"""transformers calls pickles differently; diffusers does not."""

PART = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}", re.ASCII)
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def suffixes(use_safetensors: bool | None) -> tuple[str, ...]:
    """List the forms to look for, in order: both if None, else one."""
    return {None: (SAFETENSORS, PICKLE), True: (SAFETENSORS,), False: (PICKLE,)}[use_safetensors]


def check_variant(variant: object) -> None:
    """Refuse what cannot be part of a file's name.

    Raises:
        ValueError: names the argument.
    """
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        raise ValueError(f'variant must be part of a file\'s name, such as "fp16", got {variant!r}')


def weight_files(stem: str, variant: str | None, suffix: str = SAFETENSORS) -> tuple[str, str, str]:
    """Name the weight file, its index where it is split, and the pattern of its parts."""
    stem = PICKLE_STEMS.get(stem, stem) if suffix == PICKLE else stem
    dotted = "" if variant is None else f".{variant}"
    return f"{stem}{dotted}{suffix}", f"{stem}{suffix}.index{dotted}.json", f"{stem}{dotted}-?????-of-?????{suffix}"


def has_weights(folder: Path, stem: str, variant: str | None, suffix: str) -> bool:
    """Return whether a folder holds weights in one form, in one file or split."""
    return any((folder / name).is_file() for name in weight_files(stem, variant, suffix)[:2])


def find_weights(folder: Path, stem: str, variant: str | None, use_safetensors: bool | None = None) -> list[Path]:
    """List the weight files of a component: one, or the parts that an index names.

    Raises:
        CheckpointError: there are none, or an index names files that are missing or outside the folder.
    """
    for suffix in suffixes(use_safetensors):
        single, index, _ = weight_files(stem, variant, suffix)
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _parts(folder, index, suffix)
    raise CheckpointError(_what_is_there(folder, stem, variant, use_safetensors))


def _parts(folder: Path, index: str, suffix: str) -> list[Path]:
    weight_map = read_json(folder / index).get("weight_map")
    values = list(weight_map.values()) if isinstance(weight_map, dict) else []
    good = [isinstance(name, str) and name.endswith(suffix) and PART.fullmatch(name) is not None for name in values]
    if not values or not all(good):
        raise CheckpointError(
            f"{folder / index} must hold a weight_map of names of {suffix} files in the same folder; is it damaged?"
        )
    names = sorted(set(values))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} parts, first: {missing[0]}")
    return [folder / name for name in names]


def _what_is_there(folder: Path, stem: str, variant: str | None, use_safetensors: bool | None) -> str:
    """Say that there are no weights, what there is instead, and how to get at it."""
    wanted = [weight_files(stem, variant, suffix)[0] for suffix in suffixes(use_safetensors)]
    for name in wanted:
        if (folder / name).is_symlink():
            return f"{folder / name} is a symbolic link that leads to no file; download the file again"
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (SAFETENSORS, PICKLE, ".ckpt", ".msgpack", ".h5"))
    remedy = f"there is {', '.join(others)}" if others else "there are no weights at all"
    if use_safetensors is not None and has_weights(folder, stem, variant, PICKLE if use_safetensors else SAFETENSORS):
        remedy += f"; leave out use_safetensors={use_safetensors}"
    elif variant is not None and others:
        remedy += "; leave out variant or name another"
    elif any(f"{stem}." in name for name in others):
        remedy += '; name one as variant, such as variant="fp16"'
    return f"{folder} has no {' or '.join(wanted)}: {remedy}"


@dataclass(frozen=True)
class Source:
    """One tensor in a file.

    Attributes:
        path: of the file.
        dtype: as safetensors name it.
        shape: of the tensor.
        place: in the file; reading in this order is fastest.
        mapped: whether it comes as the file's own pages.
        get: returns it.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    place: int
    mapped: bool
    get: Callable[[], Tensor]


def open_safetensors(path: Path) -> dict[str, Source]:
    """List the tensors of a safetensors file, for which nothing but its header is read.

    Raises:
        CheckpointError: the file is damaged.
    """
    entries, _ = read_header(path)
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; is the download complete?") from error

    def source(key: str) -> Source:
        entry = entries[key]
        return Source(path, entry.dtype, entry.shape, entry.begin, True, lambda: opened.get_tensor(key))

    return {key: source(key) for key in entries}


def open_pickle(path: Path) -> dict[str, Source]:
    """List the tensors of a pickle, mapped into memory where its format allows it.

    Raises:
        CheckpointError: the file is damaged, or holds more than tensors.
    """
    content, mapped = read_pickle(path)
    sources = {}
    for place, (key, tensor) in enumerate(content.items()):
        if not is_weight(tensor):
            raise CheckpointError(
                f"{path}: {key[:80]!r} is no tensor but {type(tensor).__name__}; is it a file of weights?"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {key[:80]!r} claims more numbers than the file holds; it is damaged")
        dtype = DTYPES.get(tensor.dtype, str(tensor.dtype))
        sources[key] = Source(path, dtype, tuple(tensor.shape), place, mapped, tensor.contiguous)
    return sources


def read_weights(
    cls: type[Any],
    folder: Path,
    variant: str | None,
    wanted: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None = None,
    use_safetensors: bool | None = None,
    copy: bool = False,
) -> dict[str, Tensor]:
    """Read the weights in `folder`, under our names.

    Args:
        cls: the network's class.
        folder: where the files are.
        variant: of the files, such as "fp16".
        wanted: our key -> shape.
        dtype: to cast to; None leaves the file's own.
        use_safetensors: True for these alone, False for pickles alone, None for pickles where there are no others.
        copy: into memory of the process's own, rather than map them.

    Raises:
        CheckpointError: a file is missing or damaged, or its keys, shapes or dtypes are not the network's.
    """
    name, sources = open_folder(cls, folder, variant, use_safetensors)
    return read_tensors(name, sources, TABLES[cls.__name__], wanted, dtype, copy)


def open_folder(
    cls: type[Any], folder: Path, variant: str | None = None, use_safetensors: bool | None = None
) -> tuple[str, dict[str, Source]]:
    """List the tensors in the weight files of `folder`; arguments and errors as in `read_weights`.

    Returns:
        The name of the files, for errors, and published key -> tensor.
    """
    sources: dict[str, Source] = {}
    paths = find_weights(folder, cls.weights_name, variant, use_safetensors)
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
    state: dict[str, Tensor] = {}
    origins = [(*split_part(key), ours) for ours, key in pairs.items()]
    origins.sort(key=lambda origin: (sources[origin[1]].path, sources[origin[1]].place, origin[1]))
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
    """Refuse weights that are no floating-point numbers; `keys` may be names of parts.

    Raises:
        CheckpointError: names the first.
    """
    for key in (split_part(key)[1] for key in keys):
        if sources[key].dtype not in FLOATS:
            raise CheckpointError(f"{sources[key].path}: {key!r} is of type {sources[key].dtype}, expected floats")
