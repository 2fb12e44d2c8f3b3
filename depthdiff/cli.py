"""The command: one photo, one prompt, one picture. The only file of the package that prints."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from depthdiff.checkpoint.hub import BUNDLED
from depthdiff.checkpoint.single_file import SUFFIXES
from depthdiff.checks import best_device
from depthdiff.command_checks import (
    check_files,
    check_numbers,
    check_room,
    lora_weight,
    preview_path,
    shortcuts,
    split_option,
)
from depthdiff.command_inputs import Inputs, checksums, fit_inputs, options_of_call, read_inputs
from depthdiff.conditioning import cut_words, text_length
from depthdiff.depth_files import write_depth_file
from depthdiff.depth_maps import depth_preview, read_disparity
from depthdiff.image import contact_sheet, depth_image
from depthdiff.inspect_checkpoint import inspect
from depthdiff.options import DTYPES, read_options
from depthdiff.picture_files import save_image
from depthdiff.pipeline import StableDiffusionDepth2ImgPipeline
from depthdiff.previews import LatentToRGB, load_preview_decoder
from depthdiff.process import (
    Terminated,
    allow_tf32,
    cleaning_up,
    keep_freed_buffers,
    lenient_streams,
    showing_warnings,
    stopping,
)
from depthdiff.redo import read_redo
from depthdiff.registry import make_scheduler
from depthdiff.schedulers import DDIMScheduler
from depthdiff.settings import settings


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
                redo = arguments[:1] == ["redo"]
                options, said = read_redo(arguments[1:]) if redo else (read_options(arguments), [])
                for line in said:
                    print(f"depthdiff: {line}", file=sys.stderr)
                verbose = options.verbose
                logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
                with nullcontext() if verbose else showing_warnings("depthdiff.depth_maps"):
                    check_numbers(options)
                    return run(options, check_files(options))
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


def run(options: argparse.Namespace, outputs: list[Path]) -> int:
    """Do the work: read, load, repaint, save; return the exit status."""
    device = best_device() if options.device == "auto" else options.device
    dtype: Any = options.dtypes or DTYPES[options.dtype or ("float16" if device.startswith("cuda") else "auto")]
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    inputs, sums = read_inputs(options), checksums(options)
    warn_of_a_map_on_its_side(inputs)
    check_room(options, outputs, *inputs.size)

    keep_freed_buffers()
    if options.tf32 and device.startswith("cuda"):
        allow_tf32()
    pipe = load(options, dtype)
    pipe.scheduler.plan(options.steps, options.strength, eta=options.eta)  # refuses what it cannot do
    pipe.to(device)
    pipe.set_attention(options.attention)
    pipe.set_progress_bar_config(unit="step", disable=None if options.verbose else not sys.stderr.isatty())
    inputs, said = fit_inputs(inputs, options, pipe)
    if said is not None:
        print(f"depthdiff: {said}", file=sys.stderr)
    warn_of_cut_prompts(options, pipe)
    print(f"seed {seed + (options.index or 0)}")
    depth_map = inputs.depth_map
    if depth_map is None:
        assert inputs.photo is not None
        estimate = pipe.estimate_depth(inputs.photo, keep_aspect=options.depth_keep_aspect)
        depth_map = read_disparity(estimate, options.depth_invert, options.depth_range, "the estimated depth")
    pictures, taken = paint(pipe, options, dataclasses.replace(inputs, depth_map=depth_map), seed, outputs)
    if not pictures:
        raise KeyboardInterrupt
    works = [
        partial(save_image, pictures[i], path, settings(options, pictures[i], seed, i, pipe, sums, taken))
        for i, path in zip(numbers(options), outputs, strict=True)
    ]
    if options.save_depth is not None:
        works.append(partial(write_depth_file, depth_map[0], options.save_depth))
    if options.depth_preview is not None:
        works.append(partial(save_image, depth_preview(depth_map[0]), options.depth_preview))
    if options.sheet is not None:
        preview = depth_image(depth_map[0], bits=8).resize(pictures[0].size)
        shown = {"photo": inputs.photo, "depth": preview}
        tiles = {label: image for label, image in shown.items() if image is not None}
        labels = [*tiles, *[options.prompt] * len(pictures)]
        works.append(partial(save_image, contact_sheet([*tiles.values(), *pictures], labels), options.sheet))
    save_all(works)
    return 0 if taken is None else fail("interrupted; what there was is written", 130)


def numbers(options: argparse.Namespace) -> Sequence[int]:
    """Return which pictures of a batch are written: all, or the one that is made again."""
    return range(options.num_images) if options.index is None else [options.index]


def paint(
    pipe: StableDiffusionDepth2ImgPipeline,
    options: argparse.Namespace,
    inputs: Inputs,
    seed: int,
    outputs: list[Path],
) -> tuple[list[Image.Image], int | None]:
    """Paint the pictures, write previews on the way, and stop early where `--save-partial` allows that.

    Returns:
        The pictures, and after how many steps they were interrupted; None where they are complete.
    """
    decoder: Any = None
    if options.preview is not None:
        device = pipe.execution_device
        if options.preview_decoder is not None:
            decoder = load_preview_decoder(options.preview_decoder).to(device, pipe.vae.dtype)
        else:
            decoder = LatentToRGB.fit(pipe.vae, device)
    height, width = (None, None) if inputs.wanted is None else inputs.wanted
    run = pipe.prepare(
        options.prompt,
        inputs.photo,
        inputs.depth_map,
        strength=options.strength,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        negative_prompt=options.negative_prompt,
        num_images_per_prompt=options.num_images,
        eta=options.eta,
        clip_skip=options.clip_skip,
        **dataclasses.asdict(shortcuts(options)),
        generator=[torch.Generator().manual_seed(seed + i) for i in range(options.num_images)],
        mask_image=inputs.mask,
        height=height,
        width=width,
        resize_mode=None if height is None else "stretch",
        **options_of_call(options),
    )
    taken, latest, asked = 0, None, threading.Event()
    with stopping(asked.set if options.save_partial else None):
        for factor in (None, *([] if options.hires is None else [options.hires])):
            larger = run if factor is None or asked.is_set() else pipe.enlarge(run, factor, options.hires_strength)
            if asked.is_set():
                break
            run, latest = larger, None
            for step in pipe.progress_bar(pipe.denoise(run), total=len(run)):
                taken, latest = taken + 1, step
                if options.preview is not None and (step.index + 1) % options.preview == 0:
                    shown = pipe.preview(step, decoder)
                    for i, output in zip(numbers(options), outputs, strict=True):
                        save_image(shown[i], preview_path(output))
                if asked.is_set():
                    break
        else:
            if latest is None or latest.index + 1 == len(run):  # asked too late to leave anything out
                return pipe.decode(run), None
    if latest is None:
        return [], taken
    print("depthdiff: interrupted; decoding what there is; interrupt again to end at once", file=sys.stderr)
    if latest.denoised is not None and latest.index + 1 < len(run):
        run.latents = latest.denoised
    return pipe.decode(run), taken


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


def load(
    options: argparse.Namespace, dtype: torch.dtype | Literal["auto"] | dict[str, torch.dtype]
) -> StableDiffusionDepth2ImgPipeline:
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
            where["torch_dtype"] = "auto" if isinstance(dtype, dict) else dtype  # which is what differs by component
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
    """Say which words of the prompts are beyond what the text encoder reads; with a syntax, it reads them all."""
    if options.prompt_syntax is not None:
        return
    for name in ("prompt", "negative_prompt"):
        text = str(pipe.maybe_convert_prompt(getattr(options, name) or "", pipe.tokenizer))
        length = text_length(pipe.tokenizer, pipe.text_encoder)
        if lost := cut_words(text, pipe.tokenizer, length):
            which = name.replace("_", " ")
            print(f"depthdiff: the {which} is longer than {length - 2} tokens; not read: {lost}", file=sys.stderr)


def warn_of_a_map_on_its_side(inputs: Inputs) -> None:
    """Say where one of map and photo is upright and the other lies: a program that made the map may drop EXIF tags."""
    if inputs.photo is None or inputs.depth_map is None:
        return
    (height, width), photo = inputs.depth_map.shape[-2:], inputs.photo
    if (width - height) * (photo.width - photo.height) < 0:
        sizes = f"the depth map is {width}x{height}, the upright photo {photo.width}x{photo.height}"
        print(f"depthdiff: {sizes}; is one of them on its side?", file=sys.stderr)
