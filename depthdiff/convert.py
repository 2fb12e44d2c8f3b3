"""A checkpoint from the layout of a folder to that of a single file and back, tensor by tensor.

Both directions keep the bits of every weight that a network here reads, and of what both layouts have a place for. Not
kept, for the other layout has no place for it: of a single file, the text tower's last layer with `text_projection` and
`logit_scale`, the vision transformer's `head`, and what `tables_ldm.IGNORED` lists; of a folder, `position_ids`.
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

KEPT_TABLE = Table(KEPT)


def to_single_file(folder: Path, target: Path, *, dtype: torch.dtype | None = None, variant: str | None = None) -> None:
    """Write the networks of a folder into one file.

    Args:
        folder: with `model_index.json` and a folder for every network.
        target: the file; one that exists is replaced whole.
        dtype: to cast to; None leaves the folder's own.
        variant: of the folder's weight files, such as "fp16".

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
        names = Names(TABLES[cls.__name__], TABLES_LDM[cls.__name__](model.config), model, convolve=True)
        kept = _kept(sources, back=False) if component == "depth_estimator" else {}
        rows = names.convert(name, sources) | {key: [old] for key, old in kept.items()}
        entries += make_entries(PREFIXES[component], rows, names.shapes, sources, names.source, dtype)
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

    Args:
        file: as in `find_single_file`.
        target: the folder; of what it holds, only files of the names that are written are replaced, all or none.
        dtype: to cast to; None leaves the file's own.
        config: as in `load_single_components`.
        prediction_type: what the UNet predicts; "epsilon" if None.

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
            names = Names(part.table(model), TABLES[CLASSES[component].__name__], model, convolve=False)
            kept = _kept(part.sources, back=True) if component == "depth_estimator" else {}
            rows = names.convert(str(file), part.sources) | {key: [old] for key, old in kept.items()}
            entries = make_entries("", rows, names.shapes, part.sources, names.source, dtype)
            write_safetensors(staged(component) / f"{model.weights_name}.safetensors", entries)
        for name, other in components.items():
            if name not in models:
                other.save_pretrained(staged(name))


class Names:
    """The keys of a network in two layouts.

    Args:
        source: the table of the layout that is read.
        target: the table of the layout that is written.
        model: the network; its weights are not read.
        convolve: write layers that may be 1x1 convolutions as such, as the single file does.
    """

    def __init__(self, source: Table, target: Table, model: Any, *, convolve: bool) -> None:
        self.source, self.target, self.convolve = source, target, convolve
        self.wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def convert(self, name: str, sources: Mapping[str, Source]) -> dict[str, list[str]]:
        """Return, for every key to be written, the keys to be read, several where they are stacked.

        Raises:
            CheckpointError: the file `name` does not fit the network, or the network the layout.
        """
        pairs = self.source.assign(name, self.source.cut({k: s.shape for k, s in sources.items()}), self.wanted)
        check_floats(pairs.values(), sources)
        stacks: dict[str, dict[int, str]] = {}
        for ours, key in pairs.items():
            try:
                part, whole = split_part(self.target.published(ours))
            except KeyError as error:
                raise CheckpointError(f"{name}: the layer {ours!r} has no name in the other layout") from error
            stacks.setdefault(whole, {})[part or 0] = key
            shape = self.wanted[ours]
            if part is not None:
                shape = (shape[0] * self.target.parts(whole), *shape[1:])
            convolved = self.convolve and len(shape) == 2 and self.target.is_reshaped(ours)
            self.shapes[whole] = (*shape, 1, 1) if convolved else shape
        return {whole: [parts[i] for i in sorted(parts)] for whole, parts in stacks.items()}


def _kept(sources: Mapping[str, Source], *, back: bool) -> dict[str, str]:
    """Find tensors that no network reads but both layouts have: new key -> old key."""
    translate = KEPT_TABLE.published if back else KEPT_TABLE.ours
    found = {}
    for key in sources:
        try:
            found[str(translate(key))] = key
        except KeyError:  # an ordinary tensor
            continue
    return found


def make_entries(
    prefix: str,
    rows: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Source],
    table: Table,
    dtype: torch.dtype | None,
) -> list[Entry]:
    """Say how every tensor is read, and how its file's pages are given back.

    Args:
        prefix: of the keys to be written.
        rows: key to be written -> keys to be read.
        shapes: key to be written -> shape; that of the tensor read if absent.
        sources: key to be read -> tensor.
        table: of the layout that is read.
        dtype: to cast to; None leaves the file's own.
    """
    entries = []
    for new, old in rows.items():
        parts = [sources[split_part(key)[1]] for key in old]
        own = parts[0].dtype if len({part.dtype for part in parts}) == 1 else "F32"
        shape = shapes.get(new, parts[0].shape)
        read = partial(_read, old, sources, table, shape)
        kind = own if dtype is None else DTYPE_NAMES[dtype]
        entries.append(Entry(prefix + new, kind, shape, read, partial(_give_back, parts)))
    return entries


def _read(old: list[str], sources: Mapping[str, Source], table: Table, shape: tuple[int, ...]) -> Tensor:
    tensors = []
    for key in old:
        part, whole = split_part(key)
        tensor = sources[whole].get()
        tensors.append(tensor if part is None else tensor.chunk(table.parts(whole))[part])
    stacked = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return stacked.reshape(shape)


def _give_back(sources: list[Source]) -> None:
    for source in sources:
        if source.mapped:
            give_back(source.get())
