"""From files to components: a network is built without memory and filled from memory-mapped weights, strictly.

`assign=True` puts the file's own pages into the network, so that the weights exist once, and are read when first used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from depthdiff.checkpoint import tokenizer_files
from depthdiff.checkpoint.files import read_json
from depthdiff.checkpoint.hub import commit_of, fetch, naming_the_cache
from depthdiff.checkpoint.kinds import describe_folder, refuse_other_kinds
from depthdiff.checkpoint.weights import check_variant, has_weights, read_weights, suffixes, weight_files
from depthdiff.checks import FLOATS, brief
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


def load_model(
    cls: type[AnyModel],
    name_or_path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    torch_dtype: DType = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    copy: bool = False,
    **where: Any,
) -> AnyModel:
    """Load a network.

    Args:
        cls: the network's class.
        name_or_path: a folder or a Hub id.
        subfolder: of it.
        torch_dtype: of the weights; float32 if absent, the file's own for "auto".
        variant: of the weight file, such as "fp16".
        use_safetensors: True for these alone, False for pickles alone, None for pickles where there are no others.
        copy: weights into memory of the process's own, rather than map them.
        **where: as in `fetch`.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the config.
        ValueError: an argument that no file can have.
    """
    check_dtype(torch_dtype)
    check_names(variant, use_safetensors)
    for suffix in suffixes(use_safetensors):
        optional = weight_files(cls.weights_name, variant, suffix)
        folder = fetch(name_or_path, ["config.json"], subfolder=subfolder, optional=optional, **where)
        if has_weights(folder, cls.weights_name, variant, suffix):
            break
    with naming_the_cache(folder):
        config = read_json(folder / "config.json")
        check_class(config, cls.__name__, folder)
        model = build(cls, config, folder / "config.json")
        wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        state = read_weights(cls, folder, variant, wanted, None if dtype == "auto" else dtype, use_safetensors, copy)
    model.load_state_dict(state, assign=True)
    return model.eval()


class Unfilled(TorchFunctionMode):
    """Leaves out the drawing of first weights, which on the meta device costs a second and draws nothing."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor of a call of `torch.nn.init` as it is; call anything else."""
        named = named or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else named["tensor"]
        return function(*arguments, **named)


def build(cls: type[AnyModel], config: Mapping[str, Any], source: object) -> AnyModel:
    """Build a network without memory for its weights.

    Args:
        cls: the network's class.
        config: the parsed JSON of its config.
        source: name of where the config is from, for errors.

    Raises:
        CheckpointError: the config describes no network of this class.
    """
    try:
        with torch.device("meta"), Unfilled():
            return cls.from_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{source} describes no network that can be built: {reason}") from error


def check_dtype(dtype: object) -> None:
    """Refuse a dtype in which no weights can be.

    Raises:
        ValueError: neither a floating-point dtype nor "auto" nor None.
    """
    known = dtype is None or (isinstance(dtype, str) and dtype == "auto")
    if not known and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        found = repr(dtype) if isinstance(dtype, torch.dtype) else brief(dtype)
        raise ValueError(f'torch_dtype must be a floating-point torch dtype, "auto" or None, got {found}')


def computing_dtype(component: str, dtype: DType) -> DType:
    """Say what "auto" means for a component of a pipeline; any other dtype is what it is.

    Where there is a CUDA device, the file's own. On a processor, bfloat16 if that has it in hardware, else float32;
    never float16, which is several times slower there. The depth net stays in float32: it works once, and bfloat16
    has too few digits for depth.
    """
    if dtype != "auto" or torch.cuda.is_available():
        return dtype
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bfloat16 and component != "depth_estimator" else torch.float32


def check_names(variant: object, use_safetensors: object) -> None:
    """Refuse what cannot be part of a file's name, and a choice of form that is none.

    Raises:
        ValueError: always names the argument.
    """
    check_variant(variant)
    if use_safetensors is not None and not isinstance(use_safetensors, bool):
        raise ValueError(f"use_safetensors must be True, False or None, got {brief(use_safetensors)}")


def check_class(config: Mapping[str, Any], wanted: str, folder: Path) -> None:
    """Refuse a config that says it belongs to another class; old ones say nothing.

    Raises:
        CheckpointError: with both names.
    """
    found = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or [wanted]
    if wanted not in found:
        raise CheckpointError(f"{folder / 'config.json'} describes a {found[0]}, expected a {wanted}")


def load_components(
    name_or_path: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any],
    torch_dtype: DType = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    copy: bool = False,
    **where: Any,
) -> dict[str, Any]:
    """Load every component of a pipeline that is not in `overrides`.

    Args:
        name_or_path: a folder with a `model_index.json`, or a Hub id.
        overrides: ready components by name, returned as they are.
        torch_dtype: of the weights; float32 if absent; for "auto" see `computing_dtype`.
        variant: of the weight files, such as "fp16".
        use_safetensors: True for these alone, False for pickles alone, None for pickles where there are no others.
        copy: weights into memory of the process's own, rather than map them.
        **where: as in `depthdiff.checkpoint.hub.fetch`.

    Raises:
        CheckpointError: a file or component is missing, damaged or of a kind that this package does not have.
        ValueError: an argument that no file can have.
    """
    check_dtype(torch_dtype)
    check_names(variant, use_safetensors)
    describe_folder(name_or_path)
    told = [] if "unet" in overrides else ["unet/config.json", "scheduler/scheduler_config.json"]
    folder = fetch(name_or_path, ["model_index.json"], optional=told, **where)
    where["revision"] = commit_of(folder) or where.get("revision")  # so that all files are of one state
    with naming_the_cache(folder):
        index = read_json(folder / "model_index.json")
        refuse_other_kinds(name_or_path, index, *(folder / name for name in told))
    kinds = {name: component_class(name, index, name_or_path) for name in SLOTS if name not in overrides}
    folder = fetch_components(name_or_path, kinds, variant, use_safetensors, where)
    parts = dict(overrides)
    with naming_the_cache(folder):
        for name, kind in kinds.items():
            if not (folder / name).is_dir():
                raise CheckpointError(f"{name_or_path} has no folder {name}, which its model_index.json names")
            if issubclass(kind, Model):
                chosen: dict[str, Any] = {
                    "torch_dtype": computing_dtype(name, torch_dtype),
                    "variant": variant,
                    "use_safetensors": use_safetensors,
                    "copy": copy,
                }
                parts[name] = load_model(kind, folder, subfolder=name, **chosen)
            else:
                parts[name] = kind.from_pretrained(folder, subfolder=name)
    return parts


def fetch_components(
    name_or_path: str | os.PathLike[str],
    kinds: Mapping[str, Any],
    variant: str | None,
    use_safetensors: bool | None,
    where: Mapping[str, Any],
) -> Path:
    """Find the folder of a pipeline's components, and download what is missing: pickles only where nothing else is."""
    small, networks = [], {}
    for name, kind in kinds.items():
        is_model = issubclass(kind, Model)
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
            "or use a depth-to-image checkpoint such as sd2-community/stable-diffusion-2-depth"
        )
    if entry[1] not in SLOTS[name]:
        raise CheckpointError(
            f"{source}: {name} is a {entry[1]}; implemented here: {', '.join(SLOTS[name])}. Pass another as {name}=..."
        )
    return SLOTS[name][entry[1]]
