"""From files to components: a network is built without memory and filled from memory-mapped weights, strictly.

`assign=True` puts the file's own pages into the network, so that the weights exist once, and are read when first used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from depthdiff.checkpoint import tokenizer_files
from depthdiff.checkpoint.files import read_json
from depthdiff.checkpoint.hub import fetch, fetch_config
from depthdiff.checkpoint.tables import TABLES
from depthdiff.config import CheckpointError
from depthdiff.image_processor import DPTImageProcessor
from depthdiff.models.base import Model
from depthdiff.models.clip_text import CLIPTextModel
from depthdiff.models.dpt import DPTForDepthEstimation
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.models.vae import AutoencoderKL
from depthdiff.schedulers.ddim import DDIMScheduler
from depthdiff.schedulers.lms import LMSDiscreteScheduler
from depthdiff.schedulers.pndm import PNDMScheduler
from depthdiff.tokenizer import CLIPTokenizer

AnyModel = TypeVar("AnyModel", bound=Model)
DType = torch.dtype | Literal["auto"] | None

SLOTS: dict[str, dict[str, Any]] = {
    "vae": {"AutoencoderKL": AutoencoderKL},
    "text_encoder": {"CLIPTextModel": CLIPTextModel},
    "tokenizer": dict.fromkeys(("CLIPTokenizer", "CLIPTokenizerFast"), CLIPTokenizer),
    "unet": {"UNet2DConditionModel": UNet2DConditionModel},
    "scheduler": {kind.__name__: kind for kind in (PNDMScheduler, DDIMScheduler, LMSDiscreteScheduler)},
    "depth_estimator": {"DPTForDepthEstimation": DPTForDepthEstimation},
    "feature_extractor": dict.fromkeys(
        ("DPTImageProcessor", "DPTImageProcessorFast", "DPTImageProcessorPil", "DPTFeatureExtractor"), DPTImageProcessor
    ),
}
"""Component -> published class name -> our class."""

SMALL_FILES = {
    "tokenizer": tokenizer_files.FILES,
    "scheduler": ("scheduler_config.json",),
    "feature_extractor": ("preprocessor_config.json",),
}


def weight_files(stem: str, variant: str | None) -> tuple[str, str, str]:
    """Name the weight file, its index where it is split, and the pattern of its parts."""
    if variant is None:
        return f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-?????-of-?????.safetensors"
    return (
        f"{stem}.{variant}.safetensors",
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.{variant}-?????-of-?????.safetensors",
    )


def load_model(
    cls: type[AnyModel],
    name_or_path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    torch_dtype: DType = None,
    variant: str | None = None,
    **where: Any,
) -> AnyModel:
    """Load a network.

    Args:
        cls: the network's class.
        name_or_path: a folder or a Hub id.
        subfolder: of it.
        torch_dtype: of the weights; float32 if absent, the file's own for "auto".
        variant: of the weight file, such as "fp16".
        **where: as in `fetch`.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the config.
    """
    check_dtype(torch_dtype)
    optional = weight_files(cls.weights_name, variant)
    folder = fetch(name_or_path, ["config.json"], subfolder=subfolder, optional=optional, **where)
    config = read_json(folder / "config.json")
    check_class(config, cls.__name__, folder)
    with torch.device("meta"):
        model = cls.from_config(config)
    state = read_weights(cls, folder, variant, {name: tuple(p.shape) for name, p in model.state_dict().items()})
    dtype = torch.float32 if torch_dtype is None else torch_dtype
    for name in state if isinstance(dtype, torch.dtype) else ():
        state[name] = state[name].to(dtype)
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_dtype(dtype: object) -> None:
    """Refuse a dtype in which no weights can be.

    Raises:
        ValueError: neither a floating-point dtype nor "auto" nor None.
    """
    if dtype not in (None, "auto", torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f'torch_dtype must be a floating-point torch dtype, "auto" or None, got {dtype!r}')


def check_class(config: Mapping[str, Any], wanted: str, folder: Path) -> None:
    """Refuse a config that says it belongs to another class; old ones say nothing.

    Raises:
        CheckpointError: with both names.
    """
    found = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or [wanted]
    if wanted not in found:
        raise CheckpointError(f"{folder / 'config.json'} describes a {found[0]}, expected a {wanted}")


def read_weights(
    cls: type[Model], folder: Path, variant: str | None, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Map the weight files of `folder` into memory, under our names.

    Args:
        cls: the network's class.
        folder: where the files are.
        variant: of the files, such as "fp16".
        wanted: our key -> shape.

    Raises:
        CheckpointError: a file is missing or damaged, or its keys, shapes or dtypes are not the network's.
    """
    sources: dict[str, tuple[Any, Path]] = {}  # published key -> open file, its path
    for path in find_weights(folder, cls.weights_name, variant):
        try:
            opened = safe_open(path, framework="pt")
            keys = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; is the download complete?") from error
        for key in keys:
            if key in sources:
                raise CheckpointError(f"{key!r} is in {sources[key][1].name} and in {path.name}; remove one file")
            sources[key] = (opened, path)
    slices = {key: opened.get_slice(key) for key, (opened, _) in sources.items()}
    shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
    pairs = TABLES[cls.__name__].assign(str(folder), shapes, wanted)
    for key in pairs.values():
        if slices[key].get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(f"{sources[key][1]}: {key!r} is of type {slices[key].get_dtype()}, expected floats")
    return {name: sources[key][0].get_tensor(key).reshape(wanted[name]) for name, key in pairs.items()}


def find_weights(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """List the weight files of a component: one, or the parts that an index names.

    Raises:
        CheckpointError: there are none, or an index names files that are missing or outside the folder.
    """
    single, index, _ = weight_files(stem, variant)
    if (folder / single).is_file():
        return [folder / single]
    if (folder / index).is_file():
        weight_map = read_json(folder / index).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) and weight_map else []
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise CheckpointError(f"{folder / index} must hold a weight_map of file names in the same folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} parts, first: {missing[0]}")
        return [folder / name for name in names]
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".ckpt"))
    remedy = f"there is {', '.join(others)}" if others else "there are no weights at all"
    if any(name.endswith(".bin") for name in others):
        remedy += "; pickled weights are not read, convert them to safetensors"
    elif variant is not None and others:
        remedy += "; leave out variant or name another"
    raise CheckpointError(f"{folder} has no {single}: {remedy}")


def load_components(
    name_or_path: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any],
    torch_dtype: DType = None,
    variant: str | None = None,
    **where: Any,
) -> dict[str, Any]:
    """Load every component of a pipeline that is not in `overrides`.

    Args:
        name_or_path: a folder with a `model_index.json`, or a Hub id.
        overrides: ready components by name, returned as they are.
        torch_dtype: of the weights; float32 if absent, the file's own for "auto".
        variant: of the weight files, such as "fp16".
        **where: as in `depthdiff.checkpoint.hub.fetch`.

    Raises:
        CheckpointError: a file or component is missing, damaged or of a kind that this package does not have.
    """
    check_dtype(torch_dtype)
    index = fetch_config(name_or_path, "model_index.json", **where)
    kinds = {name: component_class(name, index, name_or_path) for name in SLOTS if name not in overrides}
    patterns = []
    for name, kind in kinds.items():
        model = isinstance(kind, type) and issubclass(kind, Model)
        files = ("config.json", *weight_files(kind.weights_name, variant)) if model else SMALL_FILES[name]
        patterns += [f"{name}/{file}" for file in files]
    folder = fetch(name_or_path, ["model_index.json"], optional=patterns, **where)
    parts = dict(overrides)
    for name, kind in kinds.items():
        if not (folder / name).is_dir():
            raise CheckpointError(f"{name_or_path} has no folder {name}, which its model_index.json names")
        if issubclass(kind, Model):
            parts[name] = load_model(kind, folder, subfolder=name, torch_dtype=torch_dtype, variant=variant)
        else:
            parts[name] = kind.from_pretrained(folder, subfolder=name)
    return parts


def component_class(name: str, index: Mapping[str, Any], source: object) -> Any:
    """Look up our class for a component of a `model_index.json`.

    Raises:
        CheckpointError: the component is missing or of a class that this package does not have.
    """
    entry = index.get(name)
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        kind = index.get("_class_name", "a pipeline of unknown class")
        raise CheckpointError(
            f"{source} is {kind} and has no {name}, which depth-to-image needs; pass one as {name}=..., "
            "or use a depth-to-image checkpoint such as sd2-community/stable-diffusion-2-depth"
        )
    if entry[1] not in SLOTS[name]:
        raise CheckpointError(
            f"{source}: {name} is a {entry[1]}; implemented here: {', '.join(SLOTS[name])}. Pass another as {name}=..."
        )
    return SLOTS[name][entry[1]]
