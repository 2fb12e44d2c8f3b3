"""`load_image` and `make_image_grid`, under the module name that scripts import them from."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from urllib.request import Request, urlopen

from PIL import Image, UnidentifiedImageError

from depthdiff.checks import show
from depthdiff.decoding import to_rgb, upright

SECONDS = 30  # until a server that does not answer is given up


def load_image(
    image: str | os.PathLike[str] | Image.Image,
    convert_method: Callable[[Image.Image], Image.Image] | None = None,
) -> Image.Image:
    """Open a picture, turn it as its EXIF tag says, and convert it to RGB.

    Args:
        image: a file, an address that begins with http:// or https://, or a picture that is open already.
        convert_method: used instead of the conversion to RGB.

    Raises:
        TypeError: `image` is none of these.
        ValueError: it is not a picture that Pillow reads.
        OSError: there is no such file, or the server does not send it.
    """
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        raise TypeError(f"image must be a path, a web address or a PIL image, got {show(image)}")
    try:
        picture = image if isinstance(image, Image.Image) else _open(os.fspath(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"image must be a picture that Pillow reads, got {show(image)}") from error
    return to_rgb(picture, "image") if convert_method is None else convert_method(upright(picture, "image"))


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Put pictures side by side, row by row.

    Args:
        images: rows * cols of them; each place has the size of the first.
        rows: how many rows.
        cols: how many pictures in a row.
        resize: to squares with this side first.

    Raises:
        ValueError: their number is not rows * cols.
    """
    if not images or min(rows, cols) < 1 or len(images) != rows * cols:
        raise ValueError(f"images must be rows * cols, {rows} * {cols}, got {len(images)}")
    tiles = [image if resize is None else image.resize((resize, resize)) for image in images]
    width, height = tiles[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for index, tile in enumerate(tiles):
        grid.paste(tile, (index % cols * width, index // cols * height))
    return grid


def _open(place: str) -> Image.Image:
    if not place.startswith(("http://", "https://")):
        return Image.open(place)
    with urlopen(Request(place, headers={"User-Agent": "depthdiff"}), timeout=SECONDS) as answer:
        return Image.open(io.BytesIO(answer.read()))
