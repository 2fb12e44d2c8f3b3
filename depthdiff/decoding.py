"""Pixels out of PIL images, which may be files that were only opened until now: here they are first touched."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# What may be white in those of Pillow's modes that hold more than 8 bits:
DEEP = dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), (65535,)) | {"I": (255, 65535), "F": (1, 255, 65535)}
DECODING = (OSError, ValueError, TypeError, SyntaxError, EOFError, ArithmeticError, LookupError, AttributeError,
            RuntimeError, AssertionError, struct.error, zlib.error)  # fmt: skip
"""Errors of Pillow's decoders on damaged files."""


@contextmanager
def _decoding(image: Image.Image, name: str) -> Iterator[None]:
    """Name the argument whose image, maybe only opened until now, cannot be decoded or converted.

    Raises:
        ValueError: it is damaged, or larger than Pillow decodes.
    """
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise ValueError(
            f"{name} must have no more pixels than Pillow decodes, PIL.Image.MAX_IMAGE_PIXELS, got "
            f"{image.width}x{image.height}: {error}; make it smaller"
        ) from error
    except DECODING as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "is the file damaged, or was it closed before?"
        raise ValueError(f"{name} cannot be decoded: {reason[:200]}; {remedy}") from error


def upright(image: Image.Image, name: str) -> Image.Image:
    """Turn an image as its EXIF tag says."""
    with _decoding(image, name):
        return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Turn an image as its EXIF tag says, and convert it to RGB of 8 bits."""
    image = upright(image, name)
    if image.mode in DEEP:
        values = np.asarray(image, dtype=np.float64)
        low, top = values.min(initial=0), values.max(initial=0)
        scale = next((white for white in DEEP[image.mode] if top <= white), None)
        if scale is None or not low >= 0:
            raise ValueError(f"{name} of mode {image.mode} must be in 0..65535, got {low:g} to {top:g}")
        return Image.fromarray((values * (255 / scale)).round().astype(np.uint8)).convert("RGB")
    see_through = image.mode == "P" and "transparency" in image.info
    with _decoding(image, name):
        return (image.convert("RGBA") if see_through else image).convert("RGB")


def to_grey(image: Image.Image, name: str) -> np.ndarray[Any, Any]:
    """Return the values (H, W), float32, of a grey image, or the luminance of a coloured one."""
    grey = upright(image, name) if image.mode in (*DEEP, "L") else to_rgb(image, name).convert("L")
    return np.array(grey, dtype=np.float32)
