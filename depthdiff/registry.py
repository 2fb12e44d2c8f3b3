"""The components of a pipeline by name, and their loading from a folder or the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import depthdiff.schedulers
from depthdiff.checkpoint.hub import (
    DEPTH_MODEL,
    commit_of,
    describe_folder,
    fetch,
    naming_the_cache,
    read_json,
    refuse_other_kinds,
)
from depthdiff.checkpoint.loading import DType, check_names, load_model, read_dtype
from depthdiff.checkpoint.weights import has_weights, suffixes, weight_files
from depthdiff.checks import brief, nearest
from depthdiff.config import CheckpointError, constructor_fields
from depthdiff.image_processor import DPTImageProcessor
from depthdiff.models.autoencoder_tiny import AutoencoderTiny
from depthdiff.models.base import Network
from depthdiff.models.clip import CLIPTextModel
from depthdiff.models.dpt import DPTForDepthEstimation
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.models.vae import AutoencoderKL
from depthdiff.parts import is_function
from depthdiff.schedulers.names import SHORT_NAMES, find_scheduler
from depthdiff.schedulers.spacing import SPACINGS
from depthdiff.tokenizer import CLIPTokenizer
from depthdiff.tokenizer import files as tokenizer_files

COMPONENT_CLASSES: dict[str, dict[str, Any]] = {
    "vae": {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny},
    "text_encoder": {"CLIPTextModel": CLIPTextModel},
    "tokenizer": dict.fromkeys(("CLIPTokenizer", "CLIPTokenizerFast"), CLIPTokenizer),
    "unet": {"UNet2DConditionModel": UNet2DConditionModel},
    "scheduler": {name: getattr(depthdiff.schedulers, name) for name in depthdiff.schedulers.FILES},
    "depth_estimator": {"DPTForDepthEstimation": DPTForDepthEstimation},
    "feature_extractor": dict.fromkeys(
        ("DPTImageProcessor", "DPTImageProcessorFast", "DPTImageProcessorPil", "DPTFeatureExtractor"), DPTImageProcessor
    ),
}
"""Component -> published class name -> our class."""

CLASSES: dict[str, type[Network]] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "depth_estimator": DPTForDepthEstimation,
}
"""Component -> the class of its network."""

Dtypes = DType | str | Mapping[str, DType | str]
"""One dtype for all networks, by itself or by name, or one by component."""

SMALL_FILES = {
    "tokenizer": tokenizer_files.FILES,
    "scheduler": ("scheduler_config.json",),
    "feature_extractor": ("preprocessor_config.json",),
}


def make_scheduler(name: str, config: Mapping[str, Any], argument: str = "scheduler", *, karras: bool = False) -> Any:
    """Build a solver from the settings of another one.

    Args:
        name: see `depthdiff.schedulers.names.find_scheduler`.
        config: of a scheduler.
        argument: name of the argument, for errors.
        karras: space the noise levels as arXiv:2206.00364 does.

    Raises:
        ValueError: an unknown name, or a solver whose noise levels cannot be spaced so.
    """
    found, settings = find_scheduler(name, argument)
    kind = COMPONENT_CLASSES["scheduler"][found]
    if karras:
        settings["use_karras_sigmas"] = True
    fields = constructor_fields(kind)
    if any(setting in SPACINGS for setting in settings):  # which wins over that of the config
        settings = {**{name: False for name in SPACINGS if name in fields}, **settings}
    for setting in settings:
        if setting not in fields:
            classes = {short: COMPONENT_CLASSES["scheduler"][solver.kind] for short, solver in SHORT_NAMES.items()}
            able = [short for short, one in classes.items() if setting in constructor_fields(one)]
            raise ValueError(f"{argument} {name!r} has no {setting}; these have it: {', '.join(able)}")
    return kind.from_config(config, **settings)


def computing_dtype(component: str, dtype: DType) -> DType:
    """Return what "auto" means for a component of a pipeline, and any other dtype as it is.

    Where there is a CUDA device, the file's own. On a processor, bfloat16 if that has it in hardware, else float32;
    never float16, which is several times slower there. The depth net stays in float32: it works once, and bfloat16
    has too few digits for depth.
    """
    if dtype != "auto" or torch.cuda.is_available():
        return dtype
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bfloat16 and component != "depth_estimator" else torch.float32


def read_dtypes(torch_dtype: Dtypes) -> dict[str, DType]:
    """Return the dtype of each network, of one for all or of a dict by component, whose "default" is for the others.

    Raises:
        ValueError: a dtype that weights cannot have, or an entry that is not a network's.
    """
    if not isinstance(torch_dtype, Mapping):
        return dict.fromkeys(CLASSES, read_dtype(torch_dtype))
    for name in torch_dtype:
        if name not in (*CLASSES, "default"):
            raise ValueError(
                f"torch_dtype must have entries for {', '.join(CLASSES)} or default, got {brief(name)}"
                f"{nearest(name, CLASSES)}"
            )
    default = torch_dtype.get("default")
    return {name: read_dtype(torch_dtype.get(name, default)) for name in CLASSES}


def load_components(
    name_or_path: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any],
    torch_dtype: Dtypes = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    copy: bool = False,
    **where: Any,
) -> dict[str, Any]:
    """Load every component of a pipeline that is not in `overrides`; see `StableDiffusionDepth2ImgPipeline`.

    `copy` reads weights into memory of the process's own instead of mapping them.

    Raises:
        CheckpointError: a file or component is missing, damaged or of a kind that this package does not have.
        ValueError: an argument that no file can have.
    """
    dtypes = read_dtypes(torch_dtype)
    check_names(variant, use_safetensors)
    describe_folder(name_or_path)
    configs = [] if "unet" in overrides else ["unet/config.json", "scheduler/scheduler_config.json"]
    folder = fetch(name_or_path, ["model_index.json"], optional=configs, **where)
    where["revision"] = commit_of(folder) or where.get("revision")  # so that all files are of one state
    with naming_the_cache(folder):
        index = read_json(folder / "model_index.json")
        if "unet" not in overrides:
            refuse_other_kinds(name_or_path, index, folder)
    parts = dict(overrides)
    if is_function(parts.get("depth_estimator")) and not any(index.get("feature_extractor") or [None]):
        parts.setdefault("feature_extractor", None)  # which a function does not need
    kinds = {name: component_class(name, index, name_or_path) for name in COMPONENT_CLASSES if name not in parts}
    folder = _fetch_components(name_or_path, kinds, variant, use_safetensors, where)
    with naming_the_cache(folder):
        for name, kind in kinds.items():
            if not (folder / name).is_dir():
                raise CheckpointError(f"{name_or_path} has no folder {name}, which its model_index.json names")
            if issubclass(kind, Network):
                chosen: dict[str, Any] = {"variant": variant, "use_safetensors": use_safetensors, "copy": copy}
                dtype = computing_dtype(name, dtypes[name])
                parts[name] = load_model(kind, folder, subfolder=name, torch_dtype=dtype, **chosen)
            else:
                parts[name] = kind.from_pretrained(folder, subfolder=name)
    return parts


def _fetch_components(
    name_or_path: str | os.PathLike[str],
    kinds: Mapping[str, Any],
    variant: str | None,
    use_safetensors: bool | None,
    where: Mapping[str, Any],
) -> Path:
    """Find the folder of a pipeline's components, and download what is missing: pickles only where nothing else is."""
    small, networks = [], {}
    for name, kind in kinds.items():
        is_model = issubclass(kind, Network)
        small += [f"{name}/{file}" for file in (["config.json"] if is_model else SMALL_FILES[name])]
        if is_model:
            networks[name] = kind.weights_name
    for suffix in suffixes(use_safetensors):
        weights = [f"{name}/{file}" for name, stem in networks.items() for file in weight_files(stem, variant, suffix)]
        folder = fetch(name_or_path, ["model_index.json"], optional=small + weights, **where)
        networks = {n: s for n, s in networks.items() if not has_weights(folder / n, s, variant, suffix)}
        if not networks:
            break
    return folder


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
            f"or use a depth-to-image checkpoint such as {DEPTH_MODEL}"
        )
    if entry[1] not in COMPONENT_CLASSES[name]:
        raise CheckpointError(
            f"{source}: {name} is a {entry[1]}; implemented here: {', '.join(COMPONENT_CLASSES[name])}. Pass another "
            f"as {name}=..."
        )
    return COMPONENT_CLASSES[name][entry[1]]
