"""What a file or folder is, and whether it will load, found out from names, shapes and configs; no tensor is read."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from depthdiff.checkpoint.hub import BUNDLED, bundled, read_json, refuse_other_kinds
from depthdiff.checkpoint.ldm import TABLES
from depthdiff.checkpoint.loading import build, check_class
from depthdiff.checkpoint.single_file import LDM, open_single_file
from depthdiff.checkpoint.weights import DTYPE_NAMES, FLOAT_NAMES, Source, is_pickle, open_folder, read_start
from depthdiff.config import CheckpointError
from depthdiff.models.base import Network
from depthdiff.registry import CLASSES, COMPONENT_CLASSES, component_class
from depthdiff.single_files import refuse_other_unets

LAYOUTS = {LDM: "single file of Stability's own code (ldm)", "diffusers": "folder of diffusers"}
Config = Mapping[str, Any]
BYTES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


@dataclass
class Component:
    """One part of a checkpoint: what it holds, and in `problems` why it will not load.

    `parameters` counts the weights of a network, those that are ignored included; `dtypes` is the type of numbers ->
    how many tensors; `ignored`, `missing` and `unknown` are keys.
    """

    name: str
    kind: str
    parameters: int = 0
    nbytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What `inspect` found: the parts, and why the whole will not load.

    `ignored` are keys of a single file that belong to no network -> the reason; `remedies` says what to do about parts
    that are not there.
    """

    path: Path
    layout: str = "unknown"
    form: str = ""
    nbytes: int = 0
    components: list[Component] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)

    @property
    def loads(self) -> bool:
        """Return whether it will load: a whole pipeline, or a part of one into a pipeline."""
        return not self.problems and not any(component.problems for component in self.components)

    def text(self) -> str:
        """Return the report as lines of text."""
        lines = [f"{self.path}: {self.layout}{f', {self.form}' if self.form else ''}, {self.nbytes:,} bytes"]
        for part in self.components:
            lines += _describe(part)
        for reason, count in Counter(self.ignored.values()).items():
            lines.append(f"  ignored: {count} keys, {reason}")
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  note: {remedy}" for remedy in self.remedies]
        lines.append("will load" if self.loads else "will not load")
        return "\n".join(lines)


def _describe(part: Component) -> list[str]:
    types = ", ".join(f"{count} {name}" for name, count in part.dtypes.items())
    size = f": {part.parameters:,} parameters, {part.nbytes:,} bytes, tensors: {types}" if part.dtypes else ""
    lines = [f"  {part.name} ({part.kind}){size}"]
    if part.config:
        lines.append("    " + ", ".join(f"{name} {value}" for name, value in part.config.items()))
    for what in ("ignored", "missing", "unknown"):
        keys: list[str] = getattr(part, what)
        if keys:
            lines.append(f"    {what}: {len(keys)} keys, first: {', '.join(sorted(keys)[:3])}")
    return lines + [f"    problem: {problem}" for problem in part.problems]


def inspect(path: str | os.PathLike[str]) -> Report:
    """Infer what a file or folder, or "mini", is and whether it will load, without reading tensors.

    A pickle's program is run by torch's interpreter, which knows nothing but tensors; those in files of torch before
    version 1.6 cannot be mapped and are read. What is wrong with the checkpoint is in the report and is not raised.
    """
    place = bundled() if path == BUNDLED else Path(path)
    report = Report(place)
    try:
        if place.is_dir():
            _inspect_folder(report)
        elif place.is_file():
            _inspect_file(report)
        else:
            report.problems.append("there is no such file or folder")
    except CheckpointError as error:
        report.problems.append(str(error))
    return report


SIZES = {
    "unet": ("in_channels", "block_out_channels", "layers_per_block", "attention_head_dim", "cross_attention_dim"),
    "vae": ("block_out_channels", "layers_per_block", "latent_channels", "scaling_factor"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    "depth_estimator": ("hidden_size", "num_hidden_layers", "image_size", "is_hybrid"),
}


def _inspect_file(report: Report) -> None:
    report.nbytes = report.path.stat().st_size
    report.form = "pickle" if is_pickle(read_start(report.path)) else "safetensors"
    file = open_single_file(report.path)
    report.layout = LAYOUTS[next(iter(file.parts.values())).layout]
    report.ignored = file.ignored
    if file.unknown:
        first = ", ".join(sorted(file.unknown)[:3])
        report.problems.append(f"{len(file.unknown)} keys belong to no network, first: {first}")
    for component in (name for name in CLASSES if name in file.parts):
        part = file.parts[component]
        found = Component(component, CLASSES[component].__name__)
        report.components.append(found)
        _count(found, part.sources)
        if part.layout != LDM:
            report.remedies.append(f"{component} comes without a config; load it into a pipeline, or pass config=...")
            continue
        config = partial(part.infer, str(report.path))
        _inspect_network(found, CLASSES[component], config, part.sources, part.table)
    report.problems += _problems(partial(refuse_other_unets, file, "epsilon"))
    missing = [component for component in CLASSES if component not in file.parts]
    if missing:
        report.remedies.append(f"it has no {', '.join(missing)}: load it into a pipeline with load_single_file")


def _inspect_folder(report: Report) -> None:
    folder = report.path
    report.layout, report.form = LAYOUTS["diffusers"], ""
    if not (folder / "model_index.json").is_file():
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        kind = str(config.get("_class_name") or (config.get("architectures") or [None])[0])
        name = next((name for name, cls in CLASSES.items() if cls.__name__ == kind), None)
        if name is None:
            report.layout = "unknown"
            report.problems.append("it has neither model_index.json nor the config.json of a network known here")
            return
        _inspect_part(report, name, folder)
        report.remedies.append(f"it is a {name} alone; {kind}.from_pretrained loads it")
        return
    index = read_json(folder / "model_index.json")
    for name in COMPONENT_CLASSES:
        try:
            kind = component_class(name, index, folder)
        except CheckpointError as error:
            report.components.append(Component(name, "missing", problems=[str(error)]))
            continue
        if issubclass(kind, Network):
            _inspect_part(report, name, folder / name)
        else:
            part = Component(name, kind.__name__)
            report.components.append(part)
            part.problems += _problems(partial(kind.from_pretrained, folder, subfolder=name))
    report.problems += _problems(partial(refuse_other_kinds, folder, index, folder))


def _inspect_part(report: Report, name: str, folder: Path) -> None:
    cls = CLASSES[name]
    part = Component(name, cls.__name__)
    report.components.append(part)
    try:
        _, sources = open_folder(cls, folder)
    except CheckpointError as error:
        part.problems.append(str(error))
        return
    paths = {source.path for source in sources.values()}
    report.nbytes += sum(path.stat().st_size for path in paths)
    forms = {report.form} if report.form else set()
    forms |= {"safetensors" if path.suffix == ".safetensors" else "pickle" for path in paths}
    report.form = " and ".join(sorted(forms))
    _count(part, sources)

    def config() -> Config:
        values = read_json(folder / "config.json")
        check_class(values, cls.__name__, folder)
        return values

    _inspect_network(part, cls, config, sources, lambda _: TABLES[cls.__name__])


def _count(part: Component, sources: Mapping[str, Source]) -> None:
    for source in sources.values():
        count = math.prod(source.shape)
        part.nbytes += count * BYTES.get(source.dtype, 0)
        part.parameters += count if source.dtype in FLOAT_NAMES else 0
    part.dtypes = dict(Counter(source.dtype for source in sources.values()).most_common())


def _inspect_network(
    part: Component,
    cls: type[Any],
    config: Callable[[], Config],
    sources: Mapping[str, Source],
    table: Callable[[Any], Any],
) -> None:
    try:
        model = build(cls, config(), part.name)
    except CheckpointError as error:
        part.problems.append(str(error))
        return
    part.config = {name: model.config[name] for name in SIZES[part.name]}
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    names = table(model)
    published = names.cut({key: source.shape for key, source in sources.items()})
    found = names.compare(published, wanted)
    part.ignored, part.missing, part.unknown = found.ignored, found.missing, found.unknown
    part.problems += found.faults(len(published), len(wanted))
    strange = [
        key for key, source in sources.items() if source.dtype not in FLOAT_NAMES and key in found.pairs.values()
    ]
    part.problems += [f"{key!r} holds no floating-point numbers" for key in strange[:1]]


def _problems(check: Callable[[], object]) -> Iterable[str]:
    try:
        check()
    except CheckpointError as error:
        return [str(error)]
    return []
