"""Image files, read and written for the command: no other program runs, no input is overwritten."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from depthdiff.adapters.formats import ADAPTER_CONFIG
from depthdiff.checkpoint.hub import BUNDLED, bundled
from depthdiff.checkpoint.write import files_below, write_file
from depthdiff.decoding import DECODING, DEEP

SETTINGS = "depthdiff"
"""The key of the PNG text that holds, as JSON, how a picture was made."""

READ = (
    *("PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "TIFF", "GIF", "BMP", "DIB", "PPM", "TGA", "JPEG2000", "QOI"),
    *("ICO", "ICNS", "SGI", "PCX", "IM", "PSD", "DDS"),
)
"""Pillow's names of the types that are read. EPS, WMF and the like are programs, which Pillow would have others run."""

MAX_PIXELS = 178_956_970
"""Of a picture that is read: a few bytes of a file can claim any number of pixels. Pillow itself refuses more."""


def open_image(path: Path, name: str) -> Image.Image:
    """Read an image; `name` is that of the argument, for errors."""
    content = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            with Image.open(io.BytesIO(content), formats=_readable()) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"it claims {file.width}x{file.height} pixels")
                return file.copy()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} {path} is too large: {error}; at most {MAX_PIXELS:,} pixels are read") from error
    except UnidentifiedImageError as error:
        message = f"{name} {path} is damaged or not a picture of a known type; convert it to PNG or JPEG"
        raise ValueError(message) from error
    except DECODING as error:
        raise ValueError(f"{name} {path} cannot be decoded: {error or type(error).__name__}; is it damaged?") from error


def encode(picture: Image.Image, path: Path, how: Mapping[str, Any] | None = None) -> bytes:
    """Convert an image to the bytes of a file; `how` it was made is kept in the text of a PNG."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path} must end in the name of an image type that can be written, such as .png")
    options: dict[str, Any] = {}
    if how is not None and kind == "PNG":
        text = json.dumps(dict(how), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(SETTINGS, text)
    content = io.BytesIO()
    try:
        picture.save(content, kind, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: {kind} files cannot hold this picture ({error}); name a .png") from error
    return content.getvalue()


def save_image(picture: Image.Image, path: Path, how: Mapping[str, Any] | None = None) -> None:
    """Write an image, all or nothing; see `encode`."""
    write_file(path, encode(picture, path, how))


def check_text(name: str, text: str) -> None:
    """Refuse what the terminal's encoding could not read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid UTF-8, got bytes that are not") from error


def check_type(path: Path, size: tuple[int, int] = (320, 264)) -> None:
    """Refuse a file whose type cannot hold an RGB image of some size."""
    content = encode(Image.new("RGB", size), path)
    read = _decode(content)
    if read is not None and read.size != size:
        raise ValueError(f"{path} must be of a type that keeps the size, got {size} back as {read.size}; name a .png")


def depth_bits(path: Path) -> Literal[8, 16]:
    """Return how many bits of a depth map the type of a file keeps."""
    ramp = np.linspace(0, 65535, 64 * 48).round().reshape(48, 64)
    choices: tuple[tuple[Literal[8, 16], Any, float], ...] = ((16, np.uint16, 0), (8, np.uint8, 8))
    for bits, dtype, slack in choices:
        wanted = (ramp / (1 if bits == 16 else 257)).astype(dtype)
        try:
            read = _decode(encode(Image.fromarray(wanted), path))
        except ValueError:
            continue  # this type does not have so many bits, or no grey
        if read is not None and read.size == (64, 48) and (bits == 8 or read.mode in DEEP):
            values = np.asarray(read if bits == 16 else read.convert("L"), dtype=np.float64)
            if np.abs(values - wanted).max() <= slack:
                return bits
    raise ValueError(f"{path} must be of a type that keeps a depth map and can be read again, such as .png or .tiff")


def same_files(paths: Mapping[str, Path]) -> list[tuple[str, str]]:
    """List the pairs of names whose paths, existing or not, lead to one file through links or spellings."""
    seen: dict[tuple[int, int, str], str] = {}
    pairs = []
    for name, path in paths.items():
        place = Path(os.path.realpath(path))
        exists = place.exists()
        found = (place if exists else place.parent).stat()
        key = found.st_dev, found.st_ino, "" if exists else os.path.normcase(place.name)
        if key in seen:
            pairs.append((seen[key], name))
        seen.setdefault(key, name)
    return pairs


def files_of(name: str, place: str) -> dict[str, Path]:
    """List the files of a model or adapter, if it is on this machine: name for errors -> path."""
    path = bundled() if place == BUNDLED else Path(place)
    beside = [path.with_name(ADAPTER_CONFIG)] if path.is_file() else []
    return {f"{file} of the {name}": file for file in (*files_below(path), *beside) if file.is_file()}


def refuse_one_file_for_two(inputs: dict[str, Path], writes: list[Path]) -> None:
    """Refuse to write over an input, or to write two things to one file."""
    named = {f"{path} (file {number} to write)": path for number, path in enumerate(writes, 1)}
    for first, second in same_files(inputs | named):
        if second in named:
            raise ValueError(
                f"the files to write must all have different names, and none that of a file that is read: {first} and "
                f"{second} are the same file"
            )


def _decode(content: bytes) -> Image.Image | None:
    """Read an image that was just encoded; None if its type is not read."""
    try:
        with Image.open(io.BytesIO(content), formats=_readable()) as file:
            return file.copy()
    except UnidentifiedImageError:
        return None


def _readable() -> list[str]:
    """List the types that are read and that this Pillow knows."""
    Image.init()
    return [kind for kind in READ if kind in Image.OPEN]
