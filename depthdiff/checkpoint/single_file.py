"""From a single file to components: what it holds is sorted by prefix, and configs are inferred from shapes.

The file is the layout of Stability's own code (`512-depth-ema.safetensors` or `.ckpt`), the whole of it or one network:
a UNet or an autoencoder with or without the prefix that it has in the whole. One network in the folder's layout, such
as `diffusion_pytorch_model.safetensors`, is known as well where its config is.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from depthdiff.checkpoint.geometry import INFER, Shapes, guessed_wrongly
from depthdiff.checkpoint.hub import HUB_ID, HubOptions, Name, check_places, fetch, read_json
from depthdiff.checkpoint.ldm import IGNORED, IGNORED_PREFIXES, PREFIXES, TABLES, TABLES_LDM, Table
from depthdiff.checkpoint.loading import build, fill, read_dtype
from depthdiff.checkpoint.weights import Source, is_pickle, open_pickle, open_safetensors, read_start
from depthdiff.checks import check_path
from depthdiff.config import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Unpack

NETWORKS: dict[str, str] = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "depth_estimator": "DPTForDepthEstimation",
}
"""Component -> the published name of its class."""

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
LDM, FOLDER = "ldm", "diffusers"

MARKS = {
    ("unet", LDM): ("input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"),
    ("vae", LDM): ("encoder.down.0.block.0.conv1.weight", "decoder.mid.block_1.conv1.weight"),
    ("text_encoder", LDM): ("positional_embedding", "transformer.resblocks.0.ln_1.weight"),
    ("depth_estimator", LDM): ("pretrained.model.cls_token", "scratch.layer1_rn.weight"),
    ("unet", FOLDER): ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
    ("vae", FOLDER): ("encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    ("text_encoder", FOLDER): ("text_model.final_layer_norm.weight",),
    ("depth_estimator", FOLDER): ("dpt.embeddings.cls_token",),
}
"""(component, layout) -> keys by which a file that holds this one alone is known."""

OTHERS = (
    ("conditioner.embedders.", "a Stable Diffusion XL checkpoint, which knows no depth"),
    ("cond_stage_model.transformer.", "a Stable Diffusion 1 checkpoint, which knows no depth"),
    ("control_model.", "a ControlNet"),
    ("model.diffusion_model.double_blocks.", "a FLUX checkpoint"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 checkpoint"),
    ("lora_unet_", "a LoRA; load it into a pipeline with load_lora_weights"),
    ("lora_te_", "a LoRA; load it into a pipeline with load_lora_weights"),
    ("string_to_param", "a learnt word; load it into a pipeline with load_textual_inversion"),
    ("emb_params", "a learnt word; load it into a pipeline with load_textual_inversion"),
)
"""What keys of other kinds of files begin with -> what those are."""

HUB_URL = re.compile(r"(https?://[^/]+)/([^/]+/[^/]+)/(?:blob|resolve|raw)/([^/]+)/([^?#]+)(?:[?#].*)?")
HUB_HOSTS = ("https://huggingface.co", "https://hf.co", "https://www.huggingface.co")


@dataclass
class Part:
    """One network in a single file; `sources` are its tensors by key without prefix."""

    component: str
    layout: str
    sources: dict[str, Source] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key without prefix -> shape."""
        return {key: source.shape for key, source in self.sources.items()}

    def infer(self, source: str) -> dict[str, Any]:
        """Infer the network's config from its shapes; `source` is the name of the file, for errors."""
        if self.layout != LDM:
            raise CheckpointError(
                f"{source} holds one {self.component} in the layout of a folder and no config; name a folder or "
                "repository that has it as config=..., or load the file into a pipeline with load_single_file"
            )
        return INFER[self.component](Shapes(source, self.shapes))

    def table(self, model: Any) -> Table:
        """Return the table of names for a network of this geometry."""
        name = NETWORKS[self.component]
        return TABLES_LDM[name](model.config) if self.layout == LDM else TABLES[name]


@dataclass
class SingleFile:
    """What a single file holds: its networks, keys that no network reads with the reason, and unknown keys."""

    path: Path
    parts: dict[str, Part] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def find_single_file(name: Name, **hub: Unpack[HubOptions]) -> Path:
    """Find a single file: on this machine, or on the Hub as "owner/name/file" or as the file's address there.

    Raises:
        CheckpointError: there is no such file, or one of the reasons of `fetch`.
        ValueError: the address names another revision.
    """
    check_path("the file's name", name)
    path, text = Path(name), os.fspath(name)
    if text and path.is_file():
        return path
    if text and path.is_dir():
        raise CheckpointError(f"{text} is a folder, expected a file; from_pretrained loads folders")
    found = HUB_URL.fullmatch(text)
    if found is not None:
        from huggingface_hub import constants  # deferred: takes 0.2 s to import

        if found[1] not in (*HUB_HOSTS, constants.ENDPOINT.rstrip("/")):
            raise CheckpointError(f"{text} is not an address of a known Hub; download the file and pass its path")
        if hub.get("revision") not in (None, found[3]):
            raise ValueError(f"revision is {hub['revision']!r}, but the address names {found[3]!r}; give one of them")
        repo_id, hub["revision"], file = found[2], found[3], found[4]
    else:
        owner, _, rest = text.partition("/")
        repo_id, file = f"{owner}/{rest.partition('/')[0]}", rest.partition("/")[2]
        if not HUB_ID.fullmatch(repo_id) or owner in (".", "..") or not file.endswith(SUFFIXES):
            raise CheckpointError(
                f"{text!r} is not a file here, nor the name of one on the Hub: owner/name/file.safetensors"
            )
    if ".." in file.split("/") or "\\" in file:
        raise CheckpointError(f"{text!r} leaves its repository")
    return fetch(repo_id, [file], **hub) / file


@torch.inference_mode(False)
def open_single_file(path: Path) -> SingleFile:
    """Sort what a file holds by the network that it belongs to; no tensor is read."""
    sources = open_pickle(path) if is_pickle(read_start(path)) else open_safetensors(path)
    file = SingleFile(path)
    bare, prefixes = None, tuple(PREFIXES.values())
    if not any(key.startswith(prefixes) for key in sources):
        alone = (key for key, marks in MARKS.items() if all(mark in sources for mark in marks))
        bare = next((Part(component, layout) for component, layout in alone), None)
    if bare is not None:
        file.parts[bare.component] = bare
    for key, source in sources.items():
        _sort_in(file, bare, key, source)
    if not file.parts:
        found = f"{_other_kind(sources) or 'holds no network that is known here'}; its first keys: {_first(sources)}"
        raise CheckpointError(f"{path} {found if sources else 'holds no tensors'}")
    return file


def lost_settings(file: SingleFile, folder: Path, classes: Mapping[str, type[Any]]) -> list[str]:
    """List what the configs of a folder say that a single file made from it does not, each as "component: setting"."""
    lost = []
    for component, part in file.parts.items():
        source = folder / component / "config.json"
        own = build(classes[component], read_json(source), source).config
        make = getattr(classes[component], "config_class", classes[component]).__init__
        defaults = {name: one.default for name, one in inspect.signature(make).parameters.items()}
        guess = defaults | part.infer(str(file.path))
        lost += [f"{component}: {name}" for name in guessed_wrongly(component, own, guess)]
    return lost


def _sort_in(file: SingleFile, bare: Part | None, key: str, source: Source) -> None:
    reason = IGNORED.get(key) or next((why for stem, why in IGNORED_PREFIXES.items() if key.startswith(stem)), None)
    found = next((name for name, prefix in PREFIXES.items() if key.startswith(prefix)), None)
    if reason is not None:
        file.ignored[key] = reason
    elif bare is not None:
        bare.sources[key] = source
    elif found is not None:
        part = file.parts.setdefault(found, Part(found, LDM))
        part.sources[key.removeprefix(PREFIXES[found])] = source
    else:
        file.unknown.append(key)


def _other_kind(keys: Iterable[str]) -> str | None:
    return next((f"is {kind}" for prefix, kind in OTHERS if any(key.startswith(prefix) for key in keys)), None)


def _first(keys: Iterable[str]) -> str:
    return ", ".join(repr(key[:80]) for key in sorted(keys)[:3])


def check_known(file: SingleFile) -> None:
    """Refuse a file with keys that belong to no network, and name what it is."""
    if file.unknown:
        name = " ".join([str(file.path), *filter(None, [_other_kind(file.unknown)])])
        first = _first(file.unknown)
        raise CheckpointError(f"{name}: {len(file.unknown)} keys belong to no network, first: {first}")


@torch.inference_mode(False)
def load_part(
    file: SingleFile,
    component: str,
    cls: type[Any],
    config: Mapping[str, Any] | None,
    torch_dtype: Any = None,
    source: object = None,
) -> Any:
    """Load one network of a file, whose tensors are taken out of it.

    The config is inferred from shapes if None; `source` is the name of where it is from, for errors.
    """
    part = file.parts[component]
    name = f"{file.path} ({component})"
    model = build(cls, part.infer(name) if config is None else config, name if source is None else source)
    return fill(model, name, part.sources, part.table(model), torch_dtype)


def load_single_model(
    cls: type[Any],
    name: Name,
    *,
    config: Name | None = None,
    subfolder: str | None = None,
    torch_dtype: Any = None,
    **where: Any,
) -> Any:
    """Load one network from a single file that holds it, alone or with others; see `Network.from_single_file`."""
    check_places(subfolder=subfolder, **where)
    from_where = {key: value for key, value in where.items() if key != "revision"}
    torch_dtype = read_dtype(torch_dtype)
    file = open_single_file(find_single_file(name, **where))
    component = next((component for component, kind in NETWORKS.items() if kind == cls.__name__), None)
    if component is None:
        raise CheckpointError(f"single files hold no {cls.__name__}, but {', '.join(NETWORKS.values())}; load it with "
                              "from_pretrained")  # fmt: skip
    if component not in file.parts:
        raise CheckpointError(f"{file.path} has no {component}, it holds {', '.join(file.parts)}")
    values = None if config is None else read_config(config, subfolder or component, **from_where)
    return load_part(file, component, cls, values, torch_dtype, config)


def read_config(name: Name, subfolder: str, **where: Any) -> dict[str, Any]:
    """Read the `config.json` of a component, from its own folder or that of a pipeline; errors as in `fetch`."""
    check_path("config", name)
    alone = Path(name) / "config.json"
    if not alone.is_file():
        alone = fetch(name, ["config.json"], subfolder=subfolder, **where) / "config.json"
    return read_json(alone)
