"""Depth maps in every real form, written by Pillow, tifffile, pypng, OpenEXR and NumPy, and by hand for PFM."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import OpenEXR
import png
import tifffile
from PIL import Image

H, W = 7, 11
RNG = np.random.default_rng(5)
DEEP = RNG.integers(0, 65536, (H, W), dtype=np.uint16)
BYTES = (DEEP // 257).astype(np.uint8)
FLOATS = (DEEP / 777).astype(np.float32)
METRES = FLOATS + np.float32(0.25)
SKY = np.where(np.arange(H)[:, None] < 2, np.float32(np.nan), METRES).astype(np.float32)
PALETTE = np.stack([np.arange(256), np.arange(256)[::-1], np.arange(256) // 2], axis=1).astype(np.uint8)
LUMINANCE = (PALETTE.astype(np.int64) @ [299, 587, 114] / 1000).round()


def pillow(array, kind="PNG", mode=None, **options):
    image = Image.fromarray(array)
    file = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def pypng(values, bits, **options):
    """Rows of one channel or several, (H, W) or (H, W, C)."""
    file = io.BytesIO()
    options = {"greyscale": True, **options}
    png.Writer(W, H, bitdepth=bits, **options).write(file, values.reshape(H, -1).tolist())
    return file.getvalue()


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def numpy_file(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def numpy_zip(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def pfm(array, order="<", kind="Pf"):
    """As MiDaS writes it: three lines, then rows from the bottom."""
    scale = "-1.000000" if order == "<" else "1.000000"
    data = array[::-1].astype(f"{order}f4").tobytes()
    return f"{kind}\n{array.shape[1]} {array.shape[0]}\n{scale}\n".encode() + data


def exr(header=None, **channels):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.exr"
        OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION} | (header or {}), channels).write(str(path))
        return path.read_bytes()


def coloured(grey):
    return np.stack([grey] * 3, axis=-1)


def with_alpha(colours):
    return np.concatenate([colours, RNG.integers(0, 256, (H, W, 1), dtype=np.uint8)], axis=-1)


def window(corner=(2, 1)):
    """A region of a larger render, as Blender writes it: a header, and the whole picture."""
    left, top = corner
    data = np.array([left, top], np.int32), np.array([left + W - 1, top + H - 1], np.int32)
    display = np.array([0, 0], np.int32), np.array([W + 3, H + 2], np.int32)
    whole = np.full((H + 3, W + 4), np.nan, np.float32)
    whole[top : top + H, left : left + W] = METRES[: max(H + 3 - top, 0), : max(W + 4 - left, 0)]
    return {"dataWindow": data, "displayWindow": display}, whole


HALF = METRES.astype(np.float16)
FORMS = {
    "PNG 8 bit, Pillow": (lambda: pillow(BYTES), BYTES),
    "PNG 8 bit, pypng": (lambda: pypng(BYTES, 8), BYTES),
    "PNG 16 bit, Pillow": (lambda: pillow(DEEP), DEEP),
    "PNG 16 bit, pypng": (lambda: pypng(DEEP, 16), DEEP),
    "PNG 16 bit, interlaced": (lambda: pypng(DEEP, 16, interlace=True), DEEP),
    "PNG 4 bit": (lambda: pypng(BYTES // 16, 4), BYTES // 16 * 17),
    "PNG grey and alpha": (lambda: pypng(np.stack([BYTES, 255 - BYTES], axis=-1), 8, alpha=True), BYTES),
    "PNG RGB grey": (lambda: pypng(coloured(BYTES), 8, greyscale=False), BYTES),
    "PNG RGBA grey, Pillow": (lambda: pillow(with_alpha(coloured(BYTES))), BYTES),
    "PNG palette": (
        lambda: pypng(BYTES, 8, greyscale=None, palette=[tuple(map(int, one)) for one in PALETTE]),
        LUMINANCE[BYTES],
    ),
    "PNG 15 bit, Photoshop": (lambda: pypng(DEEP // 2, 16), DEEP // 2),
    "JPEG of one level": (lambda: pillow(np.full((H, W), 77, np.uint8), "JPEG"), np.full((H, W), 77)),
    "WebP": (lambda: pillow(coloured(BYTES), "WEBP", lossless=True), BYTES),
    "PGM 16 bit": (lambda: pillow(DEEP, "PPM"), DEEP),
    "TIFF 8 bit": (lambda: tiff(BYTES), BYTES),
    "TIFF 16 bit": (lambda: tiff(DEEP), DEEP),
    "TIFF 16 bit, big-endian": (lambda: tiff(DEEP, byteorder=">"), DEEP),
    "TIFF 16 bit with a sign": (lambda: tiff((DEEP // 2).astype(np.int16) - 9), DEEP // 2 - np.float32(9)),
    "TIFF 16 bit, LZW": (lambda: pillow(DEEP, "TIFF", compression="tiff_lzw"), DEEP),
    "TIFF 32 bit": (lambda: tiff(DEEP.astype(np.int32) * 100 - 7), DEEP.astype(np.int32) * 100 - 7),
    "TIFF 32 bit without a sign": (lambda: tiff(DEEP.astype(np.uint32) << 16), DEEP.astype(np.uint32) << 16),
    "TIFF float, tifffile": (lambda: tiff(SKY, compression="zlib"), SKY),
    "TIFF float, Pillow": (lambda: pillow(METRES, "TIFF"), METRES),
    "TIFF float, big-endian": (lambda: tiff(METRES, byteorder=">"), METRES),
    "TIFF float, BigTIFF": (lambda: tiff(METRES, bigtiff=True), METRES),
    "EXR float, Z": (lambda: exr(Z=METRES), METRES),
    "EXR half, Y": (lambda: exr(Y=HALF), HALF),
    "EXR V": (lambda: exr(V=SKY), SKY),
    "EXR grey as RGBA": (lambda: exr(R=METRES, G=METRES, B=METRES, A=np.ones((H, W), np.float32)), METRES),
    "EXR layers": (
        lambda: exr(
            **{"View Layer.Combined.R": BYTES.astype(np.float16), "View Layer.Combined.G": HALF},
            **{"View Layer.Depth.Z": METRES, "View Layer.Normal.Z": -METRES},
        ),
        METRES,
    ),
    "EXR one channel of any name": (lambda: exr(inverse=METRES), METRES),
    "EXR whole numbers": (lambda: exr(Z=DEEP.astype(np.uint32)), DEEP),
    "EXR, not compressed": (lambda: exr(header={"compression": OpenEXR.NO_COMPRESSION}, Z=METRES), METRES),
    "EXR of a region": (lambda: exr(header=window()[0], Z=METRES), window()[1]),
    "EXR of a region that reaches out": (lambda: exr(header=window((9, 5))[0], Z=METRES), window((9, 5))[1]),
    "NPY uint16": (lambda: numpy_file(DEEP), DEEP),
    "NPY float64": (lambda: numpy_file(SKY.astype(np.float64)), SKY),
    "NPY half, big-endian": (lambda: numpy_file(HALF.astype(">f2")), HALF),
    "NPY of columns": (lambda: numpy_file(np.asfortranarray(METRES)), METRES),
    "NPY (1, H, W)": (lambda: numpy_file(METRES[None]), METRES),
    "NPY (H, W, 1)": (lambda: numpy_file(METRES[..., None]), METRES),
    "NPZ of one": (lambda: numpy_zip(anything=METRES), METRES),
    "NPZ, depth among others": (lambda: numpy_zip(depth=METRES, camera=np.eye(3)), METRES),
    "NPZ, without a name": (lambda: numpy_zip(arr_0=METRES, mask=BYTES), METRES),
    "PFM": (lambda: pfm(METRES), METRES),
    "PFM, big-endian": (lambda: pfm(SKY, ">"), SKY),
    "PFM, grey in colours": (lambda: pfm(coloured(METRES), kind="PF"), METRES),
}


def turned(array, orientation, kind, mode=None):
    """Write pixels that a camera stored on the side, with the tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    sideways = np.ascontiguousarray(np.rot90(array, {6: 1, 3: 2, 8: 3}[orientation]))
    return pillow(sideways, kind, mode, exif=exif)
