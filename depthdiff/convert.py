"""A checkpoint from the layout of a folder to that of a single file and back, tensor by tensor.

Both directions keep the bits of every weight that a network here reads, and of what both layouts have a place for. Not
kept, for the other layout has no place for it: of a single file, the text tower's last layer with `text_projection` and
`logit_scale`, the vision transformer's `head`, and what `ldm.IGNORED` lists; of a folder, `position_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthdiff.checkpoint.hub import read_json
from depthdiff.checkpoint.ldm import KEPT, PREFIXES, TABLES, TABLES_LDM, Table, split_part
from depthdiff.checkpoint.loading import build, check_class
from depthdiff.checkpoint.save import (
    INDEX,
    Entry,
    model_index,
    owned_files,
    write_config,
    write_json,
    write_safetensors,
)
from depthdiff.checkpoint.single_file import check_known, find_single_file, open_single_file, read_config
from depthdiff.checkpoint.transaction import check_folder, replacing, settle
from depthdiff.checkpoint.weights import DTYPE_NAMES, Source, check_floats, give_back, open_folder
from depthdiff.checkpoint.write import check_target, files_below, refuse_same_file
from depthdiff.config import CheckpointError
from depthdiff.registry import CLASSES
from depthdiff.single_files import load_single_components, refuse_other_unets


def to_single_file(folder: Path, target: Path, *, dtype: torch.dtype | None = None, variant: str | None = None) -> None:
    """Write the networks of a folder into one file.

    `dtype` None leaves the folder's own; `variant` is of its weight files, such as "fp16".

    Raises:
        CheckpointError: the folder is damaged, its networks have no place in a single file, or the target is one of
            the files that are read.
        OSError: the file cannot be written.
    """
    target = check_target(target)
    for place in (folder, *(folder / component for component in CLASSES)):
        if place.is_dir():
            settle(place)
    refuse_same_file(target, files_below(folder))
    entries: list[Entry] = []
    for component, cls in CLASSES.items():
        place = folder / component
        config = read_json(place / "config.json")
        check_class(config, cls.__name__, place)
        model = build(cls, config, place / "config.json")
        name, sources = open_folder(cls, place, variant)
        tables = TABLES[cls.__name__], TABLES_LDM[cls.__name__](model.config)
        kept = KEPT if component == "depth_estimator" else {}
        entries += _convert(name, model, sources, *tables, dtype, kept, prefix=PREFIXES[component], convolve=True)
    write_safetensors(target, entries, follow=True)


def to_folder(
    file: str | Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    config: str | Path | None = None,
    prediction_type: str | None = None,
) -> None:
    """Write the networks of a single file, with what else a pipeline needs, into a folder.

    Of what the target holds, only files of the names that are written are replaced, all or none. `dtype` None leaves
    the file's own; `config` and `prediction_type` are as in `from_single_file`.

    Raises:
        CheckpointError: the file is damaged or lacks a network, or it is inside the target.
        OSError: the folder cannot be written.
    """
    target = check_folder("target", target)
    opened = open_single_file(find_single_file(file))
    if opened.path.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"{file} is inside {target}, the folder to write to; name another folder")
    refuse_other_unets(opened, prediction_type or "epsilon")
    check_known(opened)
    missing = sorted(CLASSES.keys() - opened.parts.keys())
    if missing:
        raise CheckpointError(f"{file} has no {' and no '.join(missing)}; a folder needs all networks")
    models: dict[str, Any] = {}
    for component, part in opened.parts.items():
        name = f"{file} ({component})"
        values = part.infer(name) if config is None else read_config(config, component)
        models[component] = build(CLASSES[component], values, name)
    settings: dict[str, Any] = {"config": config, "prediction_type": prediction_type}
    components = load_single_components(opened.path, overrides=models, **settings)
    parts = {"": (INDEX,), **{name: owned_files(model, None) for name, model in models.items()}}
    for path in (path for name in parts if (target / name).is_dir() for path in (target / name).iterdir()):
        refuse_same_file(path, [opened.path])
    with replacing(target, parts | {name: () for name in components.keys() - models.keys()}) as staged:
        write_json(staged("") / INDEX, model_index(components, "StableDiffusionDepth2ImgPipeline"))
        for component, model in models.items():
            write_config(model, staged(component))
            part = opened.parts[component]
            tables = part.table(model), TABLES[CLASSES[component].__name__]
            kept = {new: old for old, new in KEPT.items()} if component == "depth_estimator" else {}
            entries = _convert(str(file), model, part.sources, *tables, dtype, kept)
            write_safetensors(staged(component) / f"{model.weights_name}.safetensors", entries)
        for name, other in components.items():
            if name not in models:
                other.save_pretrained(staged(name))


def _convert(
    name: str,
    model: Any,
    sources: Mapping[str, Source],
    old: Table,
    new: Table,
    dtype: torch.dtype | None,
    kept: Mapping[str, str],
    *,
    prefix: str = "",
    convolve: bool = False,
) -> list[Entry]:
    """List the tensors to write in the layout of table `new`, and how each is read from the file `name` of table `old`.

    `kept` are layers that no network reads, old name -> new; with `convolve`, layers that may be 1x1 convolutions are
    written as such.
    """
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    pairs = old.assign(name, old.cut({key: source.shape for key, source in sources.items()}), wanted)
    check_floats(pairs.values(), sources)
    stacks: dict[str, dict[int, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, key in pairs.items():
        try:
            part, whole = split_part(new.published(ours))
        except KeyError as error:
            raise CheckpointError(f"{name}: the layer {ours!r} has no name in the other layout") from error
        stacks.setdefault(whole, {})[part or 0] = key
        shape = wanted[ours]
        if part is not None:
            shape = (shape[0] * new.parts(whole), *shape[1:])
        shapes[whole] = (*shape, 1, 1) if convolve and len(shape) == 2 and new.is_reshaped(ours) else shape
    rows = {whole: [parts[i] for i in sorted(parts)] for whole, parts in stacks.items()}
    for one, other in kept.items():
        rows |= {f"{other}.{leaf}": [f"{one}.{leaf}"] for leaf in ("weight", "bias") if f"{one}.{leaf}" in sources}
    entries = []
    for key, keys in rows.items():
        parts = [sources[split_part(key)[1]] for key in keys]
        own = parts[0].dtype if len({part.dtype for part in parts}) == 1 else "F32"
        shape = shapes.get(key, parts[0].shape)
        read = partial(_read, keys, sources, old, shape)
        kind = own if dtype is None else DTYPE_NAMES[dtype]
        entries.append(Entry(prefix + key, kind, shape, read, partial(_give_back, parts)))
    return entries


def _read(keys: list[str], sources: Mapping[str, Source], table: Table, shape: tuple[int, ...]) -> Tensor:
    tensors = []
    for key in keys:
        part, whole = split_part(key)
        tensor = sources[whole].get()
        tensors.append(tensor if part is None else tensor.chunk(table.parts(whole))[part])
    stacked = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return stacked.reshape(shape)


def _give_back(sources: list[Source]) -> None:
    for source in sources:
        if source.mapped:
            give_back(source.get())
