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

from depthdiff.adapters.formats import COMPONENTS, CROSS_ATTENTION_DIMS, KOHYA, read_file, split_key
from depthdiff.adapters.methods import make_delta, rank
from depthdiff.adapters.mixin import LORA_FILES
from depthdiff.adapters.textual_inversion import FILES as WORD_FILES
from depthdiff.adapters.textual_inversion import read_words
from depthdiff.checkpoint.hub import BUNDLED, bundled, read_json, refuse_other_kinds
from depthdiff.checkpoint.ldm import TABLES
from depthdiff.checkpoint.loading import build, check_class
from depthdiff.checkpoint.single_file import LDM, open_single_file
from depthdiff.checkpoint.weights import DTYPE_NAMES, FLOAT_NAMES, Source, is_pickle, open_folder, read_start
from depthdiff.config import CheckpointError
from depthdiff.models.base import Network
from depthdiff.registry import CLASSES, COMPONENT_CLASSES, SMALL_FILES, component_class
from depthdiff.single_files import refuse_other_unets

LAYOUTS = {LDM: "single file of Stability's own code (ldm)", "diffusers": "folder of diffusers"}
Config = Mapping[str, Any]
ADAPTER_FILES = (*LORA_FILES, *WORD_FILES)
LARGEST_ADAPTER = 2**31
"""Bytes; files of adapters are read whole."""
SCHEDULER_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
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
    """Infer what a file or folder, or "mini", is and whether it will load; no tensors but an adapter's are read.

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
    try:
        file = open_single_file(report.path)
    except CheckpointError:
        if not _inspect_adapter(report):
            raise
        return
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
        name = next((name for name in CLASSES if kind in COMPONENT_CLASSES[name]), None)
        if name is not None:
            _inspect_part(report, name, folder, COMPONENT_CLASSES[name][kind])
            report.remedies.append(f"it is a {name} alone; {kind}.from_pretrained loads it")
        elif not _inspect_small_part(report):
            _inspect_adapter_folder(report)
        return
    index = read_json(folder / "model_index.json")
    for name in COMPONENT_CLASSES:
        try:
            kind = component_class(name, index, folder)
        except CheckpointError as error:
            report.components.append(Component(name, "missing", problems=[str(error)]))
            continue
        if issubclass(kind, Network):
            _inspect_part(report, name, folder / name, kind)
        else:
            part = Component(name, kind.__name__)
            report.components.append(part)
            part.problems += _problems(partial(kind.from_pretrained, folder, subfolder=name))
    report.problems += _problems(partial(refuse_other_kinds, folder, index, folder))


def _inspect_adapter_folder(report: Report) -> None:
    """Describe the adapter's file in a folder, or say that there is nothing that is known here."""
    adapters = sorted(path for path in report.path.glob("*") if path.name in ADAPTER_FILES)
    if adapters:
        report.path = adapters[0]
        _inspect_file(report)
    else:
        report.layout = "unknown"
        report.problems.append("it has neither model_index.json nor the files of a component or adapter known here")


def _inspect_small_part(report: Report) -> bool:
    """Describe the folder of a component without weights; return False if it is not one."""
    folder = report.path
    for name, files in SMALL_FILES.items():
        if not any((folder / file).is_file() for file in files):
            continue
        kinds = COMPONENT_CLASSES[name]
        if name == "scheduler":
            found = str(read_json(folder / files[0]).get("_class_name", "a scheduler of unknown class"))
        else:
            found = next(iter(kinds))
        part = Component(name, found)
        report.components.append(part)
        report.nbytes += sum((folder / file).stat().st_size for file in files if (folder / file).is_file())
        if found not in kinds:
            part.problems.append(f"implemented here: {', '.join(kinds)}")
            return True
        try:
            loaded = kinds[found].from_pretrained(folder)
        except CheckpointError as error:
            part.problems.append(str(error))
        else:
            part.config = {key: loaded.config[key] for key in SCHEDULER_SETTINGS} if name == "scheduler" else {}
        report.remedies.append(f"it is a {name} alone; {kinds[found].__name__}.from_pretrained loads it")
        return True
    return False


def _inspect_adapter(report: Report) -> bool:
    """Describe an adapter or learnt words in a file; return False if it is neither."""
    if report.nbytes > LARGEST_ADAPTER:
        return False
    try:
        state, _, path = read_file(report.path, (), weight_name=None, subfolder=None, use_safetensors=None)
        keys = [split_key(key) for key in state] if isinstance(state, Mapping) else []
        if keys and all(keys):
            _describe_adapter(report, state)
        else:
            _describe_words(report, read_words(state, None, str(path), path.stem))
    except (CheckpointError, ValueError):  # the error about checkpoints says more
        return False
    return True


def _describe_adapter(report: Report, state: Mapping[str, Any]) -> None:
    layers: dict[str, dict[str, Any]] = {}
    for key, tensor in state.items():
        layer, part = split_key(key) or (key, "")
        layers.setdefault(layer, {})[part] = tensor
    report.layout = "adapter"
    for component in COMPONENTS:
        prefixes = (f"{component}.", *KOHYA[component])
        own = {layer: parts for layer, parts in layers.items() if layer.startswith(prefixes)}
        if component == "unet":  # older files name no component
            others = tuple(prefix for name in COMPONENTS for prefix in (f"{name}.", *KOHYA[name]))
            own |= {layer: parts for layer, parts in layers.items() if not layer.startswith(others)}
        if not own:
            continue
        methods = dict.fromkeys(map(method_of, own.values()))
        found = Component(component, ", ".join(methods))
        report.components.append(found)
        if "unknown method" in methods:
            found.problems.append("some layers have tensors of no method known here, or too few")
        ranks = sorted({number for parts in own.values() if (number := rank(parts))})
        found.config = {"layers": len(own), "ranks": ", ".join(map(str, ranks)) or "none"}
        tensors = [tensor for parts in own.values() for tensor in parts.values()]
        found.parameters = sum(tensor.numel() for tensor in tensors)
        found.nbytes = sum(tensor.nbytes for tensor in tensors)
        found.dtypes = dict(Counter(DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors))
    report.remedies.append("load_lora_weights loads it; whether it fits depends on the model")


def method_of(parts: Mapping[str, Any]) -> str:
    """Name the method of one layer's tensors."""
    delta = make_delta({name: part for name, part in parts.items() if name not in ("alpha", "diff_b")}, None)
    if delta is None:
        return "unknown method"
    return "DoRA" if delta.magnitude is not None else delta.method


def _describe_words(report: Report, words: Mapping[str, Any]) -> None:
    report.layout = "textual inversion"
    for word, vectors in words.items():
        width = vectors.shape[-1] if vectors.ndim else 0
        architecture = CROSS_ATTENTION_DIMS.get(width)
        made = f"{width} channels" + (f", of {architecture}" if architecture else "")
        found = Component(word, "learnt word", config={"vectors": vectors.numel() // max(width, 1), "made for": made})
        report.components.append(found)
    report.remedies.append("load_textual_inversion loads it, where the text encoder has as many channels")


def _inspect_part(report: Report, name: str, folder: Path, cls: type[Any]) -> None:
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
    part.config = {name: model.config[name] for name in SIZES[part.name] if hasattr(model.config, name)}
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
