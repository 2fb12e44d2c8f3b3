"""Files of depth maps, read and written for the command: pictures, and the raw numbers of EXR, NumPy and PFM.

The first bytes of a file say what it is, the ending of its name what is to be written. H and W: of a map.
"""

from __future__ import annotations

import io
import re
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from depthdiff.checkpoint.write import write_file
from depthdiff.decoding import to_grey
from depthdiff.image import depth_image, one_map, read_maps
from depthdiff.picture_files import MAX_PIXELS, depth_bits, open_image, save_image

Array: TypeAlias = "np.ndarray[Any, Any]"

TYPES = "PNG, TIFF, EXR, NPY, NPZ, PFM or another picture"
RAW = (".npy", ".npz", ".pfm", ".exr", ".tif", ".tiff")
"""Endings of files that are written as float32, with the numbers as they are."""

NUMPY, ZIP, EXR = b"\x93NUMPY", b"PK\x03\x04", b"\x76\x2f\x31\x01"
ARRAYS = ("depth", "disparity", "arr_0")
"""Names of the array that is read where an NPZ file holds several."""
MAX_BYTES = 8 * MAX_PIXELS
"""Of an array."""

PFM = re.compile(
    rb"(P[Ff])[ \t]*\r?\n(?:#[^\n]*\n)*(\d{1,9})[ \t]+(\d{1,9})[ \t]*\r?\n([-+]?[\d.]+(?:[eE][-+]?\d+)?)[ \t]*\r?\n"
)
CHANNELS = ("Z", "V", "Y", "R")
"""Of EXR files: distance, luminance, or what is left of grey in a coloured picture."""

EXTRA = 'EXR files need the package OpenEXR: pip install "depthdiff[depth]"'
DAMAGED = (OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, OverflowError, RuntimeError, MemoryError,
           NotImplementedError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)  # fmt: skip
"""What readers of damaged files raise."""


def read_depth_file(path: Path, name: str) -> Array:
    """Read the numbers of a depth map as they are in a file, for `depthdiff.depth_maps.read_disparity`.

    - Pictures (PNG, TIFF and all others that the command reads): grey of 8 and 16 bits, 32-bit integers, floats; turned
      as their EXIF tag says. Of colours and palettes the luminance, at 8 bits; an alpha channel is dropped.
    - EXR: the channel Z, V, Y or R, alone or of a layer named depth, or the only one. What its data window leaves out
      is NaN.
    - NPY and NPZ: one array, or that named depth, disparity or arr_0. Pickles are refused.
    - PFM: either order of bytes; its rows go from bottom to top.

    Args:
        path: of the file.
        name: of the argument, for messages.

    Returns:
        (H, W), float32; holes as they are in the file.

    Raises:
        OSError: the file cannot be read.
        ImportError: an EXR file, and the package that reads it is not installed.
        ValueError: damaged, of an unknown type, too large, or not one map.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(EXR):
        values = _decoded(path, name, _read_exr)
    elif start.startswith((NUMPY, ZIP)):
        values = _decoded(path, name, _read_npy if start.startswith(NUMPY) else _read_npz)
    elif re.match(rb"P[Ff]\s", start):
        values = _decoded(path, name, _read_pfm)
    else:
        return _read_picture(path, name)
    try:
        with np.errstate(over="ignore"):
            maps = read_maps(values, f"{name} {path}")
    except TypeError as error:
        raise ValueError(f"{error}; save it as numbers") from error
    if len(maps) > 1:
        raise ValueError(f"{name} {path} must hold one map, got {len(maps)}; save them as files of their own")
    return maps[0].numpy()


def check_depth_type(path: Path) -> None:
    """Refuse a file to write whose type cannot hold a depth map.

    Raises:
        ImportError: EXR without the package that writes it.
        ValueError: a type that keeps no depth map, or is unknown.
    """
    if path.suffix.lower() == ".exr":
        _openexr()
    elif path.suffix.lower() not in RAW:
        depth_bits(path)


def write_depth_file(disparity: Tensor, path: Path) -> None:
    """Write one map (H, W), all or nothing.

    As float32, with its numbers as they are: NPY, NPZ, PFM, EXR (channel Z) and TIFF. Else as a grey picture from black
    (far) to white (near), of 16 bits where its type holds that (PNG), or of 8.

    Args:
        disparity: (H, W) or (1, H, W), finite.
        path: whose ending names the type.

    Raises:
        OSError: the file cannot be written.
        ImportError: EXR without the package that writes it.
        ValueError: not one map, or a type that keeps none.
    """
    ending = path.suffix.lower()
    if ending not in RAW:
        save_image(depth_image(disparity, depth_bits(path)), path)
        return
    content, values = io.BytesIO(), np.ascontiguousarray(one_map(disparity))
    if ending == ".npy":
        np.save(content, values, allow_pickle=False)
    elif ending == ".npz":
        np.savez_compressed(content, depth=values)
    elif ending == ".pfm":
        content.write(b"Pf\n%d %d\n-1.0\n" % values.shape[::-1] + values[::-1].astype("<f4").tobytes())
    elif ending == ".exr":
        openexr = _openexr()
        header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
        with tempfile.TemporaryDirectory() as folder:  # it writes to a path of its own
            whole = Path(folder) / "depth.exr"
            openexr.File(header, {"Z": values}).write(str(whole))
            content.write(whole.read_bytes())
    else:
        Image.fromarray(values).save(content, "TIFF")
    write_file(path, content.getvalue())


def _decoded(path: Path, name: str, read: Any) -> Array:
    """Call a reader, and name the file that it cannot read."""
    try:
        return read(path)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{name} {path} cannot be read: {reason}; save it again, as {TYPES}") from error


def _read_picture(path: Path, name: str) -> Array:
    image = open_image(path, name)
    values: Array = to_grey(image, f"{name} {path}")
    if image.mode == "I" and _is_unsigned(path):  # which Pillow reads as signed
        values = np.where(values < 0, values + np.float64(2**32), values).astype(np.float32)
    return values


def _is_unsigned(path: Path) -> bool:
    """Return whether a picture is a TIFF of 32-bit numbers without a sign."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `open_image` has looked at its size
        file = Image.open(path)
    with file:
        tags: Mapping[int, Any] = getattr(file, "tag_v2", {})
        return bool(tags) and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,)


def _read_npy(path: Path) -> Array:
    with path.open("rb") as file:
        return _read_array(file)


def _read_npz(path: Path) -> Array:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        wanted = names if len(names) == 1 else [name for name in ARRAYS if name in names]
        if not wanted:
            found = ", ".join(names[:8]) or "none"
            raise ValueError(f"it must hold one array, or one named {', '.join(ARRAYS)}, got {found}")
        with archive.open(f"{wanted[0]}.npy") as file:
            return _read_array(file)


def _read_array(file: IO[bytes]) -> Array:
    """Read an array, once its header says that it is one of numbers and not too large."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it must be an array of numbers, got one of version {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.kind not in "buif":
        raise ValueError(f"it must be an array of real numbers, got dtype {dtype}")
    size = 1
    for side in shape:
        size *= int(side)
    if size * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"it claims the shape {shape}; at most {MAX_PIXELS:,} values are read")
    file.seek(0)
    array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array.astype(dtype.newbyteorder("="))


def _read_pfm(path: Path) -> Array:
    """Read a portable float map. Source: P. Debevec, "PFM: Portable FloatMap", as its header, scale and rows are."""
    content = path.read_bytes()
    head = PFM.match(content)
    if head is None:
        raise ValueError("its header must be the three lines Pf, width and height, and a scale")
    channels = 3 if head[1] == b"PF" else 1
    width, height, scale = int(head[2]), int(head[3]), float(head[4])
    _check_size(width, height)
    if len(content) - head.end() < 4 * width * height * channels:
        raise ValueError(f"it ends before its {width}x{height} values do")
    values = np.frombuffer(content, "<f4" if scale < 0 else ">f4", width * height * channels, head.end())
    values = values.astype(np.float32).reshape(height, width, channels)[::-1]
    if channels == 3 and not (values == values[..., :1]).all():
        return np.ascontiguousarray(values @ np.array([0.299, 0.587, 0.114], np.float32))  # ITU-R BT.601, as Pillow
    return np.ascontiguousarray(values[..., 0])


def _openexr() -> Any:
    """Import the package that reads and writes EXR files."""
    try:
        import OpenEXR
    except ImportError as error:
        raise ImportError(EXTRA) from error
    return OpenEXR


def _read_exr(path: Path) -> Array:
    openexr = _openexr()
    header = openexr.File(str(path), header_only=True).header()
    if "deep" in str(header["type"]):
        raise ValueError("it is a deep image, of many depths a pixel; flatten it")
    (left, top), (right, bottom) = (corner.tolist() for corner in header["dataWindow"])
    (x, y), (x_end, y_end) = (corner.tolist() for corner in header["displayWindow"])
    for width, height in ((right - left + 1, bottom - top + 1), (x_end - x + 1, y_end - y + 1)):
        _check_size(width, height)
    channels = openexr.File(str(path), separate_channels=True).channels()
    values = np.asarray(channels[_channel(list(channels))].pixels, dtype=np.float32)
    if values.shape != (bottom - top + 1, right - left + 1):
        raise ValueError(f"its depth is subsampled, to {values.shape[1]}x{values.shape[0]} values")
    if (left, top, right, bottom) == (x, y, x_end, y_end):
        return values
    first, last = (max(top, y), max(left, x)), (min(bottom, y_end), min(right, x_end))
    if first[0] > last[0] or first[1] > last[1]:
        raise ValueError("its data window is beside its display window, so that no pixel has a depth")
    whole = np.full((y_end - y + 1, x_end - x + 1), np.nan, np.float32)
    rows, columns = (slice(begin, end + 1) for begin, end in zip(first, last, strict=True))
    whole[_shifted(rows, y), _shifted(columns, x)] = values[_shifted(rows, top), _shifted(columns, left)]
    return whole


def _shifted(part: slice, origin: int) -> slice:
    return slice(part.start - origin, part.stop - origin)


def _channel(names: list[str]) -> str:
    """Choose the channel of an EXR file that holds depth."""
    for wanted in CHANNELS:
        if wanted in names:
            return wanted
        of_layers = [name for name in sorted(names) if name.endswith(f".{wanted}") and "depth" in name.lower()]
        if of_layers:
            return of_layers[0]
    if len(names) != 1:
        found = ", ".join(sorted(names)[:8]) or "none"
        raise ValueError(f"it must have one channel, or one named {', '.join(CHANNELS)} or depth.Z, got {found}")
    return names[0]


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS or width < 1:
        raise ValueError(f"it claims {width}x{height} pixels; 1 to {MAX_PIXELS:,} are read")
