"""What the command's options mean, and the refusal of those that cannot be, before any work."""

from __future__ import annotations

import argparse
from pathlib import Path

from depthdiff.adapters.formats import PICKLES
from depthdiff.approximations import Approximations, resolve_preset
from depthdiff.call_options import read_hires
from depthdiff.checkpoint.hub import BUNDLED
from depthdiff.checkpoint.weights import check_variant
from depthdiff.checkpoint.write import check_target, try_to_write
from depthdiff.checks import check_device, check_number
from depthdiff.depth_files import check_depth_type
from depthdiff.depth_maps import check_depth_options
from depthdiff.inputs import LARGEST_SCALE
from depthdiff.options import MAX_IMAGES, MAX_SIZE, MAX_STEPS, SHORTCUT_HELP
from depthdiff.picture_files import MAX_PIXELS, check_text, check_type, files_of, refuse_one_file_for_two
from depthdiff.sizes import wanted_size

STRENGTH = 0.8
"""Where nothing else is asked for, and there is a photo."""
FILES = "image", "depth", "mask"
"""Options that name files that a picture depends on."""
SIZES = "size", "height", "width", "hires"
"""Options that say how large pictures are."""


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers, a device or a prompt that cannot be, before any work.

    Raises:
        ValueError: names the option.
    """
    if options.image is None:
        for name in ("strength", "mask", "depth_keep_aspect"):
            if getattr(options, name) not in (None, False):
                raise ValueError(f"--{name.replace('_', '-')} needs IMAGE, the photo; got --depth alone")
    if options.strength is None:
        options.strength = 1.0 if options.image is None or options.start == "noise" else STRENGTH
    check_number("--strength", options.strength, 0, 1)
    check_number("--steps", options.steps, 1, MAX_STEPS, whole=True)
    check_number("--guidance", options.guidance, 0, LARGEST_SCALE)
    check_number("--eta", options.eta, 0, 1)
    check_number("--num-images", options.num_images, 1, MAX_IMAGES, whole=True)
    if options.seed is not None:
        check_number("--seed", options.seed, 0, 2**64 - options.num_images, whole=True)
    if options.clip_skip is not None:
        check_number("--clip-skip", options.clip_skip, 0, whole=True)
    if options.preview is not None:
        check_number("--preview", options.preview, 1, whole=True)
    elif options.preview_decoder is not None:
        raise ValueError("--preview-decoder is for previews; give --preview as well")
    for name in ("size", "height", "width"):
        if getattr(options, name) is not None:
            check_number(f"--{name}", getattr(options, name), 8, MAX_SIZE, whole=True)
    if options.hires_strength is not None and options.hires is None:
        raise ValueError("--hires-strength needs --hires")
    if options.size is not None and (options.height is not None or options.width is not None):
        raise ValueError("--size must be left out where --height or --width say the size")
    read_hires(options.hires, options.hires_strength)
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


def check_files(options: argparse.Namespace) -> list[Path]:
    """Name the pictures to write, and refuse places that cannot be written before any work.

    Raises:
        OSError: the photo is missing, or a folder to write to is, or it cannot be written.
        ValueError: a file type that Pillow cannot write, or one file named for two things.
    """
    inputs: dict[str, Path] = {}
    for name in FILES:
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
    if options.preview_decoder is not None:
        if not options.preview_decoder.exists():
            raise FileNotFoundError(f"--preview-decoder {options.preview_decoder} is neither a file nor a folder")
        inputs |= files_of("preview decoder", str(options.preview_decoder))
    inputs |= files_of("model", options.model or BUNDLED)
    if options.picture is not None:
        inputs[f"the picture {options.picture}"] = options.picture
    start: Path = options.image or options.depth
    output: Path = options.output or start.with_name(f"{start.stem}-depthdiff.png")
    outputs = [output]
    if options.num_images > 1 and options.index is None:
        outputs = [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(1, options.num_images + 1)]
    writes = [*outputs, *filter(None, (options.save_depth, options.depth_preview, options.sheet))]
    writes += map(preview_path, outputs) if options.preview is not None else ()
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


def preview_path(output: Path) -> Path:
    """Name the preview of a picture."""
    return output.with_name(f"{output.stem}-preview.png")


def check_room(options: argparse.Namespace, outputs: list[Path], height: int, width: int) -> None:
    """Refuse pictures that are too large, or for which the disk lacks room, as far as that is known.

    Args:
        options: of the command.
        outputs: files to write.
        height: of the photo, or of the depth map alone.
        width: of the same.

    Raises:
        ValueError: too many pixels.
        OSError: a disk has less free room than the pictures have bytes.
    """
    if options.height is not None or options.width is not None:
        height, width = wanted_size(options.height, options.width, (height, width), 1)
    factor = (1.0 if options.size is None else options.size / min(height, width)) * (options.hires or 1)
    pixels = round(width * factor) * round(height * factor)
    if pixels > MAX_PIXELS:
        sizes = " ".join(f"--{n} {v}" for n, v in vars(options).items() if n in SIZES and v is not None)
        raise ValueError(f"{sizes} asks for {pixels:,} pixels, at most {MAX_PIXELS:,} can be; choose less")
    if options.model is not None or any(
        getattr(options, name) is not None for name in SIZES[:3]
    ):  # else the bundled model may choose a smaller size
        for folder in {path.absolute().parent for path in outputs}:
            try_to_write(folder, pixels * len(outputs) // 20)  # less than any type needs


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
