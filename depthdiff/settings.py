"""How a picture was made: what the command stores in it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from PIL import Image

import depthdiff
from depthdiff.command_checks import FILES, shortcuts
from depthdiff.options import SHORTCUT_HELP
from depthdiff.registry import CLASSES

STORED = (
    *("prompt", "negative_prompt", "strength", "steps", "guidance", "eta", "num_images", "clip_skip", "karras"),
    *("start", "guidance_rescale", "seamless", "prompt_syntax", "height", "width", "resize_mode", "hires"),
    *("hires_strength", "windows", "mask_blur", "mask_content", "depth_invert", "depth_range", "depth_keep_aspect"),
    *("model", "prediction_type", "variant", "lora", "embedding", "attention", "tf32"),
)
"""Options of the command that a picture depends on, stored as they are."""
OTHER_NAMES = {"size": "shorter_side", "scheduler": "solver"}
"""Options that are stored under another name: what they lead to is stored under their own."""
KEYS = (
    *FILES,
    *STORED,
    *SHORTCUT_HELP,
    *OTHER_NAMES.values(),
    "seed",
    "index",
    "device",
    "dtypes",
    "sha256",
    "version",
)
"""What is needed to make a picture again."""


def settings(
    options: argparse.Namespace,
    picture: Image.Image,
    seed: int,
    index: int,
    pipe: Any,
    sums: dict[str, str],
    taken: int | None,
) -> dict[str, Any]:
    """Say how a picture was made: enough to make it again, as `depthdiff redo` does.

    Args:
        options: of the command.
        picture: that was made.
        seed: of the first picture.
        index: of this picture among those of the command.
        pipe: that made it.
        sums: SHA-256 of the files that were read, by option.
        taken: steps after which it was interrupted; None where it is complete.
    """
    chosen = {name: getattr(options, name) for name in STORED} | (options.typed or {})
    names = {name: None if (path := getattr(options, name)) is None else path.name for name in FILES}
    return {
        **names,
        **chosen,
        **dataclasses.asdict(shortcuts(options)),
        "size": picture.size,
        "shorter_side": options.size,
        "seed": seed + index,
        "index": index,
        "solver": options.scheduler,
        "scheduler": type(pipe.scheduler).__name__,
        "device": pipe.execution_device.type,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "dtypes": {name: str(getattr(pipe, name).dtype).removeprefix("torch.") for name in CLASSES},
        "sha256": sums,
        **({} if taken is None else {"interrupted_after": taken}),
        "version": depthdiff.__version__,
    }
