"""Which kind of model a checkpoint is, told from its small files, so that one that cannot do this job is named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthdiff.checkpoint.files import read_json
from depthdiff.checkpoint.hub import BUNDLED
from depthdiff.checks import check_path
from depthdiff.config import CheckpointError

DEPTH_MODEL = "sd2-community/stable-diffusion-2-depth"
CHANNELS = 5
"""Of the UNet of a depth-to-image model: four of latents and one of depth."""

BY_CHANNELS = {
    7: ("an upscaler (x4)", "diffusers' StableDiffusionUpscalePipeline"),
    8: ("a model that edits by instruction, or a latent upscaler", "the pipeline in diffusers that it was made for"),
    9: ("an inpainting model", "diffusers' StableDiffusionInpaintPipeline"),
}
"""Input channels of a UNet -> what it is, and what it is good for."""


def name_kind(unet: Mapping[str, Any], prediction_type: str) -> tuple[str, str]:
    """Name a latent diffusion model whose UNet does not take depth, and what it is good for.

    Args:
        unet: its parsed `config.json`.
        prediction_type: of its scheduler, such as "epsilon".
    """
    if unet.get("in_channels") in BY_CHANNELS:
        return BY_CHANNELS[unet["in_channels"]]
    width = unet.get("cross_attention_dim")
    if unet.get("in_channels") != 4 or not isinstance(width, int):
        return "a model of another kind", "the pipeline that it was made for"
    if width == 768:
        return "Stable Diffusion 1 (text-to-image)", "diffusers' pipelines, with depth by a ControlNet"
    if width == 2048:
        return "Stable Diffusion XL (text-to-image)", "diffusers' pipelines, with depth by a ControlNet"
    if width != 1024:
        return "a text-to-image model", "diffusers' text-to-image pipelines"
    useful = "diffusers' StableDiffusionPipeline; its text encoder and LoRAs fit the depth model as well"
    if prediction_type == "v_prediction":
        return "Stable Diffusion 2 or 2.1 at 768 pixels (text-to-image, v-prediction)", useful
    return "Stable Diffusion 2 or 2.1 base (text-to-image)", useful


def refuse_other_kinds(
    source: object, index: Mapping[str, Any], unet_config: Path | None = None, scheduler_config: Path | None = None
) -> None:
    """Refuse a pipeline whose UNet does not take depth.

    Args:
        source: name of the checkpoint, for errors.
        index: its parsed `model_index.json`.
        unet_config: where its UNet's config would be.
        scheduler_config: where its scheduler's config would be.

    Raises:
        CheckpointError: names what it is, and what would do.
    """
    if unet_config is None or not unet_config.is_file():
        return
    unet = read_json(unet_config)
    channels = unet.get("in_channels", 4)
    if channels == CHANNELS or "unet" not in index or not isinstance(channels, int):
        return
    scheduler = read_json(scheduler_config) if scheduler_config is not None and scheduler_config.is_file() else {}
    kind, useful = name_kind({**unet, "in_channels": channels}, str(scheduler.get("prediction_type", "epsilon")))
    raise CheckpointError(
        f"{source} is {kind}, saved as {index.get('_class_name', 'a pipeline of unknown class')}: its UNet takes "
        f"{channels} channels, depth-to-image needs {CHANNELS}, the last being depth. It is good for {useful}. "
        f"Use a depth-to-image checkpoint such as {DEPTH_MODEL}, or pass the UNet of one as unet=..."
    )


def describe_folder(name_or_path: str | os.PathLike[str]) -> None:
    """Refuse a folder that is no pipeline, and say what it is where that is plain.

    Raises:
        CheckpointError: names what is there instead of `model_index.json`.
    """
    check_path("the model's name", name_or_path)
    folder = Path(name_or_path)
    if (
        name_or_path == BUNDLED
        or not str(name_or_path)
        or not folder.is_dir()
        or (folder / "model_index.json").is_file()
    ):
        return
    single = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt"))
    inside = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    snapshots = sorted(path.parent for path in folder.glob("snapshots/*/model_index.json"))
    if snapshots:
        remedy = f"it is a repository of the cache; name {snapshots[-1]}"
    elif inside:
        remedy = f"did you mean the folder {inside[0]} in it?"
    elif (folder / "config.json").is_file():
        remedy = "it holds one component; load that with from_pretrained of its own class"
    elif single:
        remedy = f"it holds {single[0]}; from_single_file loads files"
    else:
        remedy = "is it a checkpoint in the layout of diffusers?"
    raise CheckpointError(f"{folder} has no model_index.json: {remedy}")
