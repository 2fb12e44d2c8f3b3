"""The command: one photo, one prompt, one picture. The only file of the package that prints."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

import depthdiff
from depthdiff.adapters.formats import PICKLES
from depthdiff.approximations import Approximations, resolve_preset
from depthdiff.checkpoint.hub import BUNDLED
from depthdiff.checkpoint.single_file import SUFFIXES
from depthdiff.checkpoint.weights import check_variant
from depthdiff.checkpoint.write import check_target, try_to_write
from depthdiff.checks import best_device, check_device, check_number
from depthdiff.conditioning import cut_words
from depthdiff.depth_files import check_depth_type, read_depth_file, write_depth_file
from depthdiff.depth_maps import check_depth_options, depth_preview, read_disparity
from depthdiff.image import contact_sheet, depth_image, read_images
from depthdiff.inputs import LARGEST_SCALE
from depthdiff.inspect_checkpoint import inspect
from depthdiff.options import DTYPES, MAX_IMAGES, MAX_SIZE, MAX_STEPS, SHORTCUT_HELP, build_parser
from depthdiff.picture_files import (
    MAX_PIXELS,
    check_text,
    check_type,
    files_of,
    open_image,
    refuse_one_file_for_two,
    save_image,
)
from depthdiff.pipeline import StableDiffusionDepth2ImgPipeline
from depthdiff.process import (
    Terminated,
    allow_tf32,
    cleaning_up,
    keep_freed_buffers,
    lenient_streams,
)
from depthdiff.registry import make_scheduler
from depthdiff.schedulers import DDIMScheduler


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line, those of the process if absent.

    Returns:
        The exit status: 0; 1 where it failed, with one line on stderr; 130 where it was interrupted, 143 where it was
        terminated. Wrong usage raises SystemExit with status 2, as argparse does.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    verbose = False
    came: list[int] = []
    with lenient_streams():
        try:
            with cleaning_up() as came:
                if arguments[:1] == ["inspect"]:
                    return run_inspect(arguments[1:])
                options = build_parser().parse_args(arguments)
                verbose = options.verbose
                logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
                check_numbers(options)
                run(options, check_files(options))
        except KeyboardInterrupt:
            return fail("interrupted", 130)
        except Terminated:
            return fail("terminated", 143)
        except Exception as error:  # whatever it is, a person reads one line
            if came:  # torch makes errors of its own of what a signal raises within it
                return fail("interrupted", 130) if came[0] == signal.SIGINT else fail("terminated", 143)
            if verbose:
                traceback.print_exc()
            return fail(f"error: {' '.join(str(error).split()) or type(error).__name__}", 1)
    return 0


def fail(message: str, status: int) -> int:
    """Print one line on stderr; return the exit status."""
    print(f"depthdiff: {message}", file=sys.stderr)
    return status


def run_inspect(arguments: Sequence[str]) -> int:
    """Describe a file or folder; return 0 if it will load, else 1."""
    parser = argparse.ArgumentParser(
        prog="depthdiff inspect",
        description="Say what a checkpoint, a component or an adapter is, what it holds, and whether it will load.",
        epilog="exit status: 0 where it will load, 1 where not. Where inspect is a prompt: depthdiff -- inspect IMAGE",
    )
    parser.add_argument("path", metavar="PATH", help="a single file (.safetensors, .ckpt, .pt), a folder, or mini")
    report = inspect(parser.parse_args(arguments).path)
    print(report.text())
    return 0 if report.loads else 1


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers, a device or a prompt that cannot be, before any work.

    Raises:
        ValueError: names the option.
    """
    check_number("--strength", options.strength, 0, 1)
    check_number("--steps", options.steps, 1, MAX_STEPS, whole=True)
    check_number("--guidance", options.guidance, 0, LARGEST_SCALE)
    check_number("--eta", options.eta, 0, 1)
    check_number("--num-images", options.num_images, 1, MAX_IMAGES, whole=True)
    if options.seed is not None:
        check_number("--seed", options.seed, 0, 2**64 - options.num_images, whole=True)
    if options.clip_skip is not None:
        check_number("--clip-skip", options.clip_skip, 0, whole=True)
    if options.size is not None:
        check_number("--size", options.size, 8, MAX_SIZE, whole=True)
    for name in ("prompt", "negative_prompt"):
        if not (getattr(options, name) or "").isascii():
            check_text(name, getattr(options, name))
    check_variant(options.variant)
    if options.device != "auto":
        check_device("--device", options.device)
    for text in options.lora:
        lora_weight(text)
    shortcuts(options)
    check_depth_options(options.depth_invert, options.depth_range)
    if options.depth_keep_aspect and options.depth is not None:
        raise ValueError("--depth-keep-aspect is for depth that is estimated; leave it out, or --depth")


def check_files(options: argparse.Namespace) -> list[Path]:
    """Name the pictures to write, and refuse places that cannot be written before any work.

    Raises:
        OSError: the photo is missing, or a folder to write to is, or it cannot be written.
        ValueError: a file type that Pillow cannot write, or one file named for two things.
    """
    inputs: dict[str, Path] = {}
    for name in ("image", "depth"):
        path: Path | None = getattr(options, name)
        if path is not None:
            if not path.is_file():
                raise FileNotFoundError(f"{name} {path} is not a file")
            inputs[f"the {'photo' if name == 'image' else name} {path}"] = path
    for name, texts in (("lora", options.lora), ("embedding", options.embedding)):
        for file in (split_option(text)[0] for text in texts):
            if Path(file).suffix in (".safetensors", *PICKLES) and not Path(file).is_file():
                raise FileNotFoundError(f"{name} {file} is not a file")
            inputs |= files_of(name, file)
    inputs |= files_of("model", options.model or BUNDLED)
    output: Path = options.output or options.image.with_name(f"{options.image.stem}-depthdiff.png")
    outputs = [output]
    if options.num_images > 1:
        outputs = [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(1, options.num_images + 1)]
    writes = [*outputs, *filter(None, (options.save_depth, options.depth_preview, options.sheet))]
    for path in writes:
        check_target(path)
    for path in {*outputs[:1], options.sheet, options.depth_preview} - {None}:
        check_type(path)
    if options.save_depth is not None:
        check_depth_type(options.save_depth)
    refuse_one_file_for_two(inputs, writes)
    for folder in {path.absolute().parent for path in writes}:
        try_to_write(folder)
    return outputs


def run(options: argparse.Namespace, outputs: list[Path]) -> None:
    """Do the work: load, repaint, save."""
    device = best_device() if options.device == "auto" else options.device
    dtype: Any = DTYPES[options.dtype or ("float16" if device.startswith("cuda") else "auto")]
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    photo = read_images(open_image(options.image, "image"))[0]
    assert isinstance(photo, Image.Image)
    given = None if options.depth is None else read_depth_file(options.depth, "--depth")
    depth_map = None if given is None else read_disparity(given, options.depth_invert, options.depth_range, "--depth")
    if depth_map is not None:
        warn_of_a_map_on_its_side(depth_map, photo)
    check_room(options, outputs, photo)

    keep_freed_buffers()
    if options.tf32 and device.startswith("cuda"):
        allow_tf32()
    pipe = load(options, dtype)
    pipe.scheduler.plan(options.steps, options.strength, eta=options.eta)  # refuses what it cannot do
    pipe.to(device)
    pipe.set_attention(options.attention)
    pipe.set_progress_bar_config(unit="step", disable=None if options.verbose else not sys.stderr.isatty())
    photo = fit_photo(photo, options.size, pipe)
    warn_of_cut_prompts(options, pipe)
    print(f"seed {seed}")
    if depth_map is None:
        estimate = pipe.estimate_depth(photo, keep_aspect=options.depth_keep_aspect)
        depth_map = read_disparity(estimate, options.depth_invert, options.depth_range, "the estimated depth")
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
        **dataclasses.asdict(shortcuts(options)),
        generator=[torch.Generator().manual_seed(seed + i) for i in range(options.num_images)],
    )
    pictures: list[Image.Image] = result[0]
    works = [
        partial(save_image, picture, path, settings(options, picture, seed + i, pipe))
        for i, (picture, path) in enumerate(zip(pictures, outputs, strict=True))
    ]
    if options.save_depth is not None:
        works.append(partial(write_depth_file, depth_map[0], options.save_depth))
    if options.depth_preview is not None:
        works.append(partial(save_image, depth_preview(depth_map[0]), options.depth_preview))
    if options.sheet is not None:
        preview = depth_image(depth_map[0], bits=8).resize(pictures[0].size)
        labels = ["photo", "depth", *[options.prompt] * len(pictures)]
        works.append(partial(save_image, contact_sheet([photo, preview, *pictures], labels), options.sheet))
    save_all(works)


def save_all(works: list[partial[None]]) -> None:
    """Write every file and print its name; where some fail, the others are still written.

    Raises:
        OSError: of the first that failed.
    """
    errors = []
    for work in works:
        try:
            work()
            print(work.args[1])
        except (OSError, ValueError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def check_room(options: argparse.Namespace, outputs: list[Path], photo: Image.Image) -> None:
    """Refuse pictures that are too large, or for which there is no room on the disk, as far as that is known.

    Raises:
        ValueError: too many pixels.
        OSError: a disk has less free room than the pictures have bytes.
    """
    factor = 1.0 if options.size is None else options.size / min(photo.size)
    pixels = round(photo.width * factor) * round(photo.height * factor)
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"--size {options.size} asks for {pixels:,} pixels, at most {MAX_PIXELS:,} can be; choose less"
        )
    if options.model is not None or options.size is not None:  # else the bundled model may choose a smaller size
        for folder in {path.absolute().parent for path in outputs}:
            try_to_write(folder, pixels * len(outputs) // 20)  # less than any type needs


def load(options: argparse.Namespace, dtype: torch.dtype | Literal["auto"]) -> StableDiffusionDepth2ImgPipeline:
    """Load the pipeline, and show its warnings as plain lines."""
    if options.scheduler is not None:
        make_scheduler(options.scheduler, {}, "--scheduler", karras=options.karras)  # refuses before anything is loaded
    if options.model is None:
        print(f"depthdiff: no --model named, using the small one that comes along: {BUNDLED}", file=sys.stderr)
        options.model = BUNDLED
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        where: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": options.offline}
        if options.model.endswith(SUFFIXES) and not Path(options.model).is_dir():
            pipe = StableDiffusionDepth2ImgPipeline.from_single_file(
                options.model, prediction_type=options.prediction_type, scheduler_type=options.scheduler, **where
            )
        else:
            if options.scheduler is not None:  # wins over the checkpoint's, also where that is not implemented
                where["scheduler"] = read_scheduler(options)
            pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(options.model, variant=options.variant, **where)
    for warning in caught:
        print(f"depthdiff: {warning.message}", file=sys.stderr)
    if options.karras:
        name = options.scheduler or type(pipe.scheduler).__name__
        pipe.scheduler = make_scheduler(name, pipe.scheduler.config, "--karras: --scheduler", karras=True)
    names = [f"lora_{number}" for number in range(len(options.lora))]
    for name, text in zip(names, options.lora, strict=True):
        pipe.load_lora_weights(split_option(text)[0], name, local_files_only=options.offline)
    if names:
        pipe.set_adapters(names, [lora_weight(text) for text in options.lora])
    for file, word in map(split_option, options.embedding):
        pipe.load_textual_inversion(file, word, local_files_only=options.offline)
    return pipe


def read_scheduler(options: argparse.Namespace) -> Any:
    """Build the chosen solver from the settings of the checkpoint's, whatever class that is."""
    config: Any = DDIMScheduler.load_config(options.model, subfolder="scheduler", local_files_only=options.offline)
    return make_scheduler(options.scheduler, config, "--scheduler", karras=options.karras)


def warn_of_cut_prompts(options: argparse.Namespace, pipe: StableDiffusionDepth2ImgPipeline) -> None:
    """Say which words of the prompts are beyond what the text encoder reads."""
    for name in ("prompt", "negative_prompt"):
        text = str(pipe.maybe_convert_prompt(getattr(options, name) or "", pipe.tokenizer))
        length = min(pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings)
        if lost := cut_words(text, pipe.tokenizer, length):
            which = name.replace("_", " ")
            print(f"depthdiff: the {which} is longer than {length - 2} tokens; not read: {lost}", file=sys.stderr)


def warn_of_a_map_on_its_side(depth_map: torch.Tensor, photo: Image.Image) -> None:
    """Say where one of map and photo is upright and the other lies: a program that made the map may drop EXIF tags."""
    height, width = depth_map.shape[-2:]
    if (width - height) * (photo.width - photo.height) < 0:
        sizes = f"the depth map is {width}x{height}, the upright photo {photo.width}x{photo.height}"
        print(f"depthdiff: {sizes}; is one of them on its side?", file=sys.stderr)


def shortcuts(options: argparse.Namespace) -> Approximations:
    """Read what is to be left out for speed."""
    return resolve_preset(options.preset, **{name: getattr(options, name) for name in SHORTCUT_HELP})


def split_option(text: str) -> tuple[str, str | None]:
    """Cut `FILE:MORE` in two, where FILE is there, else at the last colon; a file with a colon in its name is whole."""
    colons = [place for place in range(len(text) - 1, 0, -1) if text[place] == ":"]
    if Path(text).exists() or not colons:
        return text, None
    for place in colons:
        if Path(text[:place]).exists():
            return text[:place], text[place + 1 :]
    file, more = text[: colons[0]], text[colons[0] + 1 :]
    return (text, None) if "/" in more or "\\" in more else (file, more)


def lora_weight(text: str) -> float:
    """Read the weight of `FILE:WEIGHT`, 1 if absent."""
    weight = split_option(text)[1]
    try:
        number = 1.0 if weight is None else float(weight)
    except ValueError as error:
        raise ValueError(f"--lora {text}: {weight!r} must be a number") from error
    check_number(f"the weight of --lora {text}", number, -LARGEST_SCALE, LARGEST_SCALE)
    return number


def fit_photo(photo: Image.Image, size: int | None, pipe: StableDiffusionDepth2ImgPipeline) -> Image.Image:
    """Resize the photo's shorter side to `size`; if absent and far too large for the bundled model, to what that knows.

    Other models are left alone: the published one's config says 256 pixels, and was trained on 512.
    """
    shorter, trained = min(photo.size), pipe.unet.config.sample_size
    if size is None and pipe.name_or_path == BUNDLED and isinstance(trained, int):
        trained = trained * pipe.vae_scale_factor
        size = trained if shorter > 1.5 * trained else None
    if size is None or size == shorter:
        return photo
    width, height = (round(side * size / shorter) for side in photo.size)
    print(f"depthdiff: photo resized from {photo.width}x{photo.height} to {width}x{height}", file=sys.stderr)
    return photo.resize((width, height), Image.Resampling.LANCZOS)


def settings(
    options: argparse.Namespace,
    picture: Image.Image,
    seed: int,
    pipe: StableDiffusionDepth2ImgPipeline,
) -> dict[str, Any]:
    """Say how a picture was made: enough to make it again with `--num-images 1`."""
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "image": options.image.name,
        "depth": None if options.depth is None else options.depth.name,
        "depth_invert": options.depth_invert,
        "depth_range": options.depth_range,
        "depth_keep_aspect": options.depth_keep_aspect,
        "strength": options.strength,
        "steps": options.steps,
        "guidance": options.guidance,
        "eta": options.eta,
        "clip_skip": options.clip_skip,
        **dataclasses.asdict(shortcuts(options)),
        "size": picture.size,
        "seed": seed,
        "scheduler": type(pipe.scheduler).__name__,
        "model": options.model,
        "lora": options.lora,
        "embedding": options.embedding,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "version": depthdiff.__version__,
    }
