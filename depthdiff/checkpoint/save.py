"""From components to files in the layout of diffusers, all or nothing (see `depthdiff.checkpoint.transaction`).

A safetensors file is written tensor by tensor, so that the memory needed is that of the largest one: its header, which
names the place of every tensor, comes first. Source: huggingface/safetensors, README.md, "Format".
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthdiff.arguments import warn_of_pickles
from depthdiff.checkpoint.hub import DIFFUSERS_VERSION
from depthdiff.checkpoint.ldm import TABLES
from depthdiff.checkpoint.transaction import check_folder, replacing
from depthdiff.checkpoint.weights import DTYPE_NAMES, check_variant, weight_files
from depthdiff.checkpoint.write import write_text, writing
from depthdiff.config import CheckpointError

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
DIFFUSERS_CLASSES = (
    *("AutoencoderKL", "AutoencoderTiny", "UNet2DConditionModel"),
    *("PNDMScheduler", "DDIMScheduler", "LMSDiscreteScheduler"),
)
INDEX = "model_index.json"
SIZE = re.compile(r"[1-9]\d{0,14}(\.\d+)? *[KMGT]B", re.IGNORECASE)
"""Texts that huggingface_hub takes for a size."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what `read` returns is cast to `dtype`, a name of safetensors; then `done` is called."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    done: Callable[[], None]


def tensor_entry(key: str, tensor: Tensor) -> Entry:
    """Describe a tensor that is in memory."""
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
        kind = f"{tensor.dtype} and {tensor.layout} on {tensor.device}"
        raise ValueError(f"{key!r} must be a dense tensor of numbers to be saved, got {kind}")
    return Entry(key, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.detach, lambda: None)


def write_safetensors(
    path: Path, entries: Iterable[Entry], *, follow: bool = False, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all; `follow` is as in `check_target`."""
    ordered = sorted(entries, key=lambda entry: (-TORCH_DTYPES[entry.dtype].itemsize, entry.key))
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
    begin = 0
    for entry in entries:
        if entry.key in values:
            raise CheckpointError(f"{path}: two tensors would have the name {entry.key!r}")
        end = begin + TORCH_DTYPES[entry.dtype].itemsize * math.prod(entry.shape)
        values[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    return struct.pack("<Q", len(text)) + text


def save_model(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write a network; arguments and errors are those of its `save_pretrained`."""
    place = _check_arguments(folder, safe_serialization, variant, max_shard_size)
    _refuse_narrow_weights(model)
    with replacing(place, {"": owned_files(model, variant)}) as staged:
        _write_model(model, staged(""), variant, max_shard_size)


def save_components(
    components: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    class_name: str,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write a pipeline: `model_index.json` and a folder for every component that is not None.

    The errors are those of `save_model`.
    """
    place = _check_arguments(folder, safe_serialization, variant, max_shard_size)
    parts: dict[str, tuple[str, ...]] = {"": (INDEX,)}
    for name, part in components.items():
        if _is_network(part):
            _refuse_narrow_weights(part)
        if part is not None:
            parts[name] = owned_files(part, variant) if _is_network(part) else ()
    with replacing(place, parts) as staged:
        write_json(staged("") / INDEX, model_index(components, class_name))
        for name, part in components.items():
            if _is_network(part):
                _write_model(part, staged(name), variant, max_shard_size)
            elif part is not None:
                part.save_pretrained(staged(name))


def _check_arguments(folder: object, safe_serialization: object, variant: object, max_shard_size: object) -> Path:
    """Refuse invalid arguments before anything is written; return the folder's absolute path."""
    place = check_folder("save_directory", folder)
    warn_of_pickles(safe_serialization)
    check_variant(variant)
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, (int, str)):
        raise TypeError(f"max_shard_size must be bytes or a text, got {type(max_shard_size).__name__}")
    good = SIZE.fullmatch(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size > 0
    if not good:
        raise ValueError(
            f'max_shard_size must be a positive number of bytes, or a text such as "5GB", got {max_shard_size!r}'
        )
    return place


def _is_network(part: object) -> bool:
    return hasattr(part, "weights_name")


def owned_files(model: Any, variant: str | None) -> tuple[str, ...]:
    """List the names, and patterns of names, of the files that a network consists of in a folder."""
    return ("config.json", *weight_files(model.weights_name, variant))


def model_index(components: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """Make the content of `model_index.json`."""
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION}
    for name, part in sorted(components.items()):
        kind = type(part).__name__
        library = "diffusers" if kind in DIFFUSERS_CLASSES else "transformers"
        index[name] = [None, None] if part is None else [library, kind]
    return index


def write_config(model: Any, folder: Path) -> None:
    """Write `config.json`."""
    write_text(folder / "config.json", model.to_json_string())


def _write_model(model: Any, folder: Path, variant: str | None, max_shard_size: int | str) -> None:
    """Write `config.json` and the weights, in published names, into a folder."""
    write_config(model, folder)
    from huggingface_hub import split_torch_state_dict_into_shards  # deferred: takes 0.2 s to import

    table = TABLES[type(model).__name__]
    state = {table.published(name): tensor for name, tensor in model.state_dict().items()}
    single, index_name, _ = weight_files(model.weights_name, variant)
    plan = split_torch_state_dict_into_shards(
        state,
        filename_pattern=single.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    for name, keys in plan.filename_to_tensors.items():
        write_safetensors(folder / name, [tensor_entry(key, state[key]) for key in keys])
    if plan.is_sharded:
        write_json(folder / index_name, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as diffusers and transformers do."""
    write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _refuse_narrow_weights(model: Any) -> None:
    narrow = next((parameter.dtype for parameter in model.parameters() if parameter.dtype.itemsize < 2), None)
    if narrow is not None:
        kind = type(model).__name__
        raise ValueError(
            f"{kind} weights are stored in {narrow} and have lost precision; reload the {kind} and save that"
        )
