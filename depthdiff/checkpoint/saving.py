"""From components to files, in the layout of diffusers, all or nothing.

Everything is written into a new folder beside the target, which then takes the target's place in one step: killed at
any moment, the old folder or the new one is whole.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from depthdiff.checkpoint.files import DIFFUSERS_VERSION
from depthdiff.checkpoint.tables import TABLES
from depthdiff.checkpoint.weights import weight_files
from depthdiff.models.base import Model

DIFFUSERS_CLASSES = ("AutoencoderKL", "UNet2DConditionModel", "PNDMScheduler", "DDIMScheduler", "LMSDiscreteScheduler")
TRANSFORMERS_TYPES = {"CLIPTextModel": "clip_text_model", "DPTForDepthEstimation": "dpt"}


def save_model(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write a network; see `depthdiff.models.base.Model.save_pretrained`.

    Raises:
        ValueError: `safe_serialization` is False, or weights lie in 8 bits.
        OSError: the folder cannot be written.
    """
    _refuse_pickles(safe_serialization)
    _refuse_narrow_weights(model)
    with replacing(Path(folder), stale=weight_files(model.weights_name, variant)) as new:
        write_model(model, new, variant, max_shard_size)


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

    Raises:
        ValueError: `safe_serialization` is False, or weights lie in 8 bits.
        OSError: the folder cannot be written.
    """
    _refuse_pickles(safe_serialization)
    index = model_index(components, class_name)
    stale = []
    for name, part in components.items():
        if isinstance(part, Model):
            _refuse_narrow_weights(part)
            stale += [f"{name}/{file}" for file in weight_files(part.weights_name, variant)]
    with replacing(Path(folder), stale=tuple(stale)) as new:
        write_json(new / "model_index.json", index)
        for name, part in components.items():
            if isinstance(part, Model):
                (new / name).mkdir()
                write_model(part, new / name, variant, max_shard_size)
            elif part is not None:
                part.save_pretrained(new / name)


def model_index(components: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """Say what a pipeline is made of, as `model_index.json` does."""
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION}
    for name, part in sorted(components.items()):
        kind = type(part).__name__
        library = "diffusers" if kind in DIFFUSERS_CLASSES else "transformers"
        index[name] = [None, None] if part is None else [library, kind]
    return index


def write_config(model: Model, folder: Path) -> None:
    """Write `config.json`."""
    kind = type(model).__name__
    config = model.config.to_dict()
    if kind in TRANSFORMERS_TYPES:
        config |= {"architectures": [kind], "model_type": TRANSFORMERS_TYPES[kind]}
    else:
        config = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION} | config
    write_json(folder / "config.json", config)


def write_model(model: Model, folder: Path, variant: str | None, max_shard_size: int | str) -> None:
    """Write `config.json` and the weights, in published names, into an empty folder."""
    write_config(model, folder)
    from huggingface_hub import split_torch_state_dict_into_shards  # deferred: takes 0.2 s to import

    table = TABLES[type(model).__name__]
    state = {table.published(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    single, index_name, _ = weight_files(model.weights_name, variant)
    plan = split_torch_state_dict_into_shards(
        state,
        filename_pattern=single.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        write_json(folder / index_name, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as diffusers and transformers do."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def replacing(folder: Path, *, stale: tuple[str, ...]) -> Iterator[Path]:
    """Hand out a new folder, and put it in the place of `folder` when its writing has succeeded.

    What else is in the old folder goes along, but for files that match `stale` and are not written anew.

    Raises:
        OSError: the target is a file, or its parent cannot be written.
    """
    folder = folder.resolve() if folder.is_symlink() else folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the place to save to is a file; name a folder", str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.saving-", dir=folder.parent))
    try:
        os.chmod(new, folder.stat().st_mode if folder.exists() else 0o777 & ~_umask())
        yield new
        if folder.exists():
            _keep_others(folder, new, stale)
            _exchange(new, folder)
        else:
            os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _keep_others(old: Path, new: Path, stale: tuple[str, ...]) -> None:
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        target = new / name
        if path.is_dir() and not path.is_symlink():
            target.mkdir(exist_ok=True)
        elif not target.exists() and not any(fnmatch(name.as_posix(), pattern) for pattern in stale):
            try:
                os.link(path, target, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(path, target, follow_symlinks=False)


def _exchange(new: Path, folder: Path) -> None:
    """Swap two folders, in one step where the system can, else in two renames that leave both whole."""
    if not _exchange_in_one_step(new, folder):
        old = new.with_name(new.name + ".old")
        os.rename(folder, old)
        os.rename(new, folder)
        shutil.rmtree(old)


def _exchange_in_one_step(new: Path, folder: Path) -> bool:
    """Ask Linux to swap two folders; False where the system or its file system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    at_cwd, exchange = -100, 2
    return swap is not None and swap(at_cwd, os.fsencode(new), at_cwd, os.fsencode(folder), exchange) == 0


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _refuse_pickles(safe_serialization: bool) -> None:
    if safe_serialization is not True:
        raise ValueError(f"safe_serialization must be True, got {safe_serialization!r}: pickles are never written")


def _refuse_narrow_weights(model: Model) -> None:
    narrow = next((parameter.dtype for parameter in model.parameters() if parameter.dtype.itemsize < 2), None)
    if narrow is not None:
        kind = type(model).__name__
        raise ValueError(f"weights of the {kind} lie in {narrow}, the rest is lost; load it anew and save that")
