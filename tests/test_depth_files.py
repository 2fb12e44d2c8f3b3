"""Files of depth maps: every real form read to the right numbers, what is written read back, damage named.

Files are written by Pillow, and by libraries of their own: tifffile, pypng, OpenEXR, NumPy, and by hand for PFM.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import OpenEXR
import png
import pytest
import tifffile
import torch
from PIL import Image
from random_checkpoint import build_pipeline

from depthdiff import cli
from depthdiff.conditioning import fit_depth
from depthdiff.depth_files import check_depth_type, read_depth_file, write_depth_file
from depthdiff.depth_maps import read_disparity

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


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def coloured(grey):
    return np.stack([grey] * 3, axis=-1)


def with_alpha(colours):
    return np.concatenate([colours, RNG.integers(0, 256, (H, W, 1), dtype=np.uint8)], axis=-1)


def window():
    """A region of a larger render, as Blender writes it."""
    corners = [np.array(corner, np.int32) for corner in ((2, 1), (W + 1, H), (0, 0), (W + 3, H + 2))]
    whole = np.full((H + 3, W + 4), np.nan, np.float32)
    whole[1 : H + 1, 2 : W + 2] = METRES
    return {"dataWindow": tuple(corners[:2]), "displayWindow": tuple(corners[2:])}, whole


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


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_to_its_numbers(form, place):
    """Whatever the file's name ends in: its content tells. Maps of up to 24 bits keep every level."""
    write, expected = FORMS[form]
    content = write()
    for name in ("depth.png", "depth"):
        (place / name).write_bytes(content)
        found = read_depth_file(place / name, "--depth")
        assert found.dtype == np.float32
        assert np.array_equal(found, expected.astype(np.float32), equal_nan=True)


def test_maps_that_differ_in_unit_alone_are_one_map(place):
    """Photoshop's 15 bits, 16 bits and floats: the call sees the same, but for the rounding of half a level."""
    maps = []
    for number, content in enumerate((pypng(DEEP // 2, 16), pypng(DEEP, 16), tiff(FLOATS))):
        (place / f"{number}").write_bytes(content)
        maps.append(fit_depth(read_disparity(read_depth_file(place / f"{number}", "--depth")), 8, 8))
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], atol=1e-4, rtol=0)  # observed: 3.2e-5


def turned(array, orientation, kind, mode=None):
    """Write pixels that a camera stored on the side, with the tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    sideways = np.ascontiguousarray(np.rot90(array, {6: 1, 3: 2, 8: 3}[orientation]))
    return pillow(sideways, kind, mode, exif=exif)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_map_is_turned_as_its_tag_says(place, orientation):
    (place / "plain.png").write_bytes(pillow(DEEP))
    (place / "turned.png").write_bytes(turned(DEEP, orientation, "PNG"))
    expected = read_depth_file(place / "plain.png", "--depth")
    assert np.array_equal(read_depth_file(place / "turned.png", "--depth"), expected)


def claiming(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(content, name="depth.npy"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def pickled():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


BAD = {
    "text": (lambda: b"no picture at all", "damaged or not a picture of a known type"),
    "nothing": (lambda: b"", "damaged or not a picture of a known type"),
    "cut PNG": (lambda: pypng(DEEP, 16)[:-40], "cannot be decoded"),
    "cut NPY": (lambda: numpy_file(METRES)[:-40], "cannot be read: .*; save it again"),
    "NPY without a header": (lambda: b"\x93NUMPY\x01\x00", "cannot be read"),
    "NPY of objects": (pickled, "real numbers, got dtype object"),
    "NPY of text": (lambda: numpy_file(np.array([["a"]])), "real numbers, got dtype <U1"),
    "NPY of complex numbers": (lambda: numpy_file(METRES + 1j), "real numbers, got dtype complex64"),
    "NPY of records": (lambda: numpy_file(np.zeros((2, 2), [("a", "f4")])), "real numbers"),
    "NPY that claims much": (lambda: claiming((99999, 99999)), "claims the shape .* at most 178,956,970"),
    "NPY of a line": (lambda: numpy_file(METRES[0]), r"--depth .* must be \(H, W\), .* got \(11,\)"),
    "NPY of colours": (lambda: numpy_file(coloured(METRES)), "of a colour image pass one channel"),
    "NPY of nothing": (lambda: numpy_file(METRES[:0]), "nothing empty"),
    "NPY of two maps": (lambda: numpy_file(np.stack([METRES] * 2)), "must hold one map, got 2"),
    "NPZ of several": (
        lambda: numpy_zip(a=METRES, b=METRES),
        "one array, or one named depth, disparity, arr_0, got a, b",
    ),
    "NPZ of none": (lambda: zipped(b"", "readme.txt"), "got none"),
    "NPZ of objects": (lambda: zipped(pickled()), "real numbers, got dtype object"),
    "NPZ that claims much": (lambda: zipped(claiming((99999, 99999)) + b"\0" * 10**6), "claims the shape"),
    "cut NPZ": (lambda: numpy_zip(depth=METRES)[:-60], "cannot be read"),
    "PFM without numbers": (lambda: b"Pf\nwide high\n-1\n", "three lines Pf, width and height, and a scale"),
    "cut PFM": (lambda: pfm(METRES)[:-4], "ends before its 11x7 values do"),
    "PFM that claims much": (lambda: b"Pf\n99999 99999\n-1.0\n" + b"\0" * 99, "claims 99999x99999 pixels"),
    "PFM of nothing": (lambda: b"Pf\n0 5\n-1.0\n", "claims 0x5 pixels"),
    "cut EXR": (lambda: exr(Z=METRES)[:-60], "cannot be read"),
    "EXR header alone": (lambda: exr(Z=METRES)[:60], "cannot be read"),
    "EXR of other channels": (
        lambda: exr(G=METRES, B=METRES),
        "one channel, or one named Z, V, Y, R or depth.Z, got B, G",
    ),
    "EXR of normals": (
        lambda: exr(**{"A.Normal.X": METRES, "A.Normal.Z": METRES}),
        "one channel, or one named .* got A.Normal.X, A.Normal.Z",
    ),
    "HDR": (lambda: b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n", "known type"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BAD)
def test_damaged_and_foreign_files_are_named(case, place):
    write, message = BAD[case]
    (place / "map").write_bytes(write())
    with pytest.raises(ValueError, match=message) as caught:
        read_depth_file(place / "map", "--depth")
    assert str(caught.value).startswith("--depth ") and "map" in str(caught.value)


KINDS = {"EXR": "EXR float, Z", "NPY": "NPY uint16", "NPZ": "NPZ of one", "PFM": "PFM", "PNG": "PNG 16 bit, pypng",
         "TIFF": "TIFF float, tifffile"}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_files_with_random_damage_are_read_or_named(kind, place):
    """Nothing else is ever raised, and memory stays that of the map."""
    rng = np.random.default_rng(0)
    whole, refused = FORMS[KINDS[kind]][0](), 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(4, len(data)))] = int(rng.integers(256))
        (place / "map").write_bytes(bytes(data[: int(rng.integers(len(data) // 2, len(data) + 1))]))
        try:
            found = read_depth_file(place / "map", "--depth")
            assert found.dtype == np.float32 and found.ndim == 2
        except ValueError as error:
            assert str(error).startswith("--depth ")
            refused += 1
    assert refused > 10


def test_a_missing_file_is_the_systems_error(place):
    with pytest.raises(FileNotFoundError):
        read_depth_file(place / "nowhere.npy", "--depth")


WITHOUT = """
import sys
from pathlib import Path
sys.modules["OpenEXR"] = None
from depthdiff.depth_files import check_depth_type, read_depth_file
for use in (lambda: read_depth_file(Path("a.exr"), "--depth"), lambda: check_depth_type(Path("b.exr"))):
    try:
        use()
    except ImportError as error:
        print(error)
"""


def test_without_the_extra_exr_files_name_it(place):
    (place / "a.exr").write_bytes(exr(Z=METRES))
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ['EXR files need the package OpenEXR: pip install "depthdiff[depth]"'] * 2


# what is written


@pytest.mark.parametrize("name", ["d.npy", "d.npz", "d.pfm", "d.exr", "d.tiff", "d.TIF"])
def test_raw_files_keep_every_bit(place, name):
    disparity = torch.from_numpy(METRES - 40)
    check_depth_type(Path(name))
    write_depth_file(disparity[None], Path(name))
    assert np.array_equal(read_depth_file(Path(name), "--depth"), disparity.numpy())
    with pytest.raises(ValueError, match="disparity must be one map, got 2"):
        write_depth_file(torch.rand(2, 3, 4), Path(name))


def test_other_programs_read_what_is_written(place):
    """Upright, by the libraries themselves."""
    for name in ("d.npy", "d.npz", "d.exr", "d.tiff", "d.png"):
        write_depth_file(torch.from_numpy(METRES), Path(name))
    assert np.array_equal(np.load("d.npy"), METRES)
    assert np.array_equal(np.load("d.npz")["depth"], METRES)
    assert np.array_equal(tifffile.imread("d.tiff"), METRES)
    assert np.array_equal(OpenEXR.File("d.exr").channels()["Z"].pixels, METRES)
    rows = np.stack([np.array(row) for row in png.Reader(filename="d.png").read()[2]])
    levels = (METRES.astype(np.float64) - METRES.min()) / np.ptp(METRES.astype(np.float64)) * 65535
    assert np.abs(rows - levels).max() <= 0.5


def test_types_without_depth_are_refused(place):
    for name in ("d.txt", "d.pdf", "d"):
        with pytest.raises(ValueError, match=r"must end in the name of an image type|keeps a depth map"):
            check_depth_type(Path(name))


# the command


@pytest.fixture
def command(place, small_photo, monkeypatch):
    """Run the command on a photo with a random pipeline in float32; return the picture."""
    pipe = build_pipeline("tiny")
    monkeypatch.setattr(cli, "load", lambda options, dtype: pipe)
    small_photo.save("photo.png")

    def run(*options, photo="photo.png"):
        arguments = ["a cup", photo, "--steps", "2", "--seed", "1", "-o", "a.png", *map(str, options)]
        assert cli.main(arguments) == 0
        with Image.open("a.png") as picture:
            picture.load()
            return np.asarray(picture).astype(int), json.loads(picture.text["depthdiff"])

    return run


BOUNDS = {"npy": 0, "npz": 0, "pfm": 0, "exr": 0, "tiff": 0, "png": 1, "jpg": 20}
"""Ending -> largest difference of the pictures in levels of 255. Observed: 0, png 1, jpg (8 bits, lossy) 18."""


@pytest.mark.parametrize("ending", BOUNDS)
def test_a_saved_map_gives_the_same_picture(command, ending):
    first, _ = command("--save-depth", f"depth.{ending}")
    second, how = command("--depth", f"depth.{ending}")
    assert np.abs(first - second).max() <= BOUNDS[ending]
    assert how["depth"] == f"depth.{ending}"


def test_a_saved_map_saved_again_is_the_same_file(command):
    for ending in ("npy", "png", "exr"):
        command("--save-depth", f"one.{ending}")
        command("--depth", f"one.{ending}", "--save-depth", f"two.{ending}")
        assert Path(f"one.{ending}").read_bytes() == Path(f"two.{ending}").read_bytes()


def test_conventions_of_one_scene_give_one_picture(command):
    """Disparity, metres with infinity as sky, and a picture in which white is far."""
    scene = np.linspace(1, 0.125, 44 * 60, dtype=np.float64).reshape(44, 60)
    np.save("disparity.npy", scene.astype(np.float32))
    metres = (1 / scene).astype(np.float32)
    np.save("metres.npy", metres)
    sky = metres.copy()
    sky[metres == metres.max()] = np.inf
    sky[-1, -2] = metres.max()
    np.save("sky.npy", sky)
    Path("white_is_far.png").write_bytes(pillow((65535 * (1 - scene) / 0.875).round().astype(np.uint16)))
    expected, how = command("--depth", "disparity.npy")
    assert (how["depth_invert"], how["depth_range"], how["depth_keep_aspect"]) == (False, None, False)
    for name, *options in (
        ("metres.npy", "--depth-invert"),
        ("sky.npy", "--depth-invert"),
        ("white_is_far.png", "--depth-invert", "flip"),
    ):
        found, how = command("--depth", name, *options)
        assert np.abs(found - expected).max() <= 1, name  # observed: 1
        assert how["depth_invert"] == ("flip" if "flip" in options else True)
    wrong, _ = command("--depth", "metres.npy")
    assert np.abs(wrong - expected).max() > 10


def test_a_range_flattens_what_is_beyond(command):
    np.save("metres.npy", (METRES + 1).repeat(6, 0).repeat(6, 1))
    np.save("clamped.npy", (METRES + 1).clip(5, 40).repeat(6, 0).repeat(6, 1))
    expected, _ = command("--depth", "clamped.npy", "--depth-invert")
    found, how = command("--depth", "metres.npy", "--depth-invert", "--depth-range", 5, 40)
    assert np.array_equal(found, expected)
    assert how["depth_range"] == [5, 40]
    command("--depth-range", 0.5, 0.25, "--save-depth", "estimated.npy")  # of what is estimated as well
    assert np.load("estimated.npy").min() >= 0.25
    assert np.load("estimated.npy").max() <= 0.5


def test_the_aspect_can_be_kept(command, small_photo):
    command("--save-depth", "stretched.npy")
    _, how = command("--depth-keep-aspect", "--save-depth", "kept.npy")
    assert np.load("stretched.npy").shape == (64, 64)
    assert np.load("kept.npy").shape == (64, 96)
    assert how["depth_keep_aspect"] is True


def test_the_preview_shows_the_map_that_was_used(command):
    np.save("ramp.npy", np.linspace(0, 1, 300).reshape(1, 300).repeat(3, 0))
    command("--depth", "ramp.npy", "--depth-preview", "preview.png")
    with Image.open("preview.png") as preview:
        assert (preview.mode, preview.size) == ("RGB", (300, 3))
        grey = np.asarray(preview.convert("L")).astype(int)[1]
    assert grey[0] == 0 and grey[-1] == 255
    assert (grey[8:] > grey[:-8]).all()


@pytest.mark.parametrize("tagged", [True, False])
def test_a_photo_on_its_side_and_its_map_are_both_turned_upright(command, small_photo, tagged, capsys):
    """The map carries the tag as well, or was drawn for the upright photo."""
    photo, depth = np.asarray(small_photo), RNG.integers(0, 65536, (88, 120), dtype=np.uint16)
    Path("side.png").write_bytes(turned(photo, 6, "PNG"))
    Path("side.jpg").write_bytes(turned(photo, 6, "JPEG"))
    Path("depth.png").write_bytes(pillow(depth))
    Path("given.png").write_bytes(turned(depth, 6, "PNG") if tagged else pillow(depth))
    expected, _ = command("--depth", "depth.png")
    found, _ = command("--depth", "given.png", photo="side.png")
    assert np.array_equal(found, expected)
    found, _ = command("--depth", "given.png", photo="side.jpg")
    assert found.shape == expected.shape == (88, 120, 3)
    assert "on its side" not in capsys.readouterr().err
    Path("bare.png").write_bytes(pillow(np.ascontiguousarray(np.rot90(depth))))  # by a program that dropped the tag
    command("--depth", "bare.png", photo="side.jpg")
    line = "depthdiff: the depth map is 88x120, the upright photo 120x88; is one of them on its side?"
    assert line in capsys.readouterr().err


REFUSED = {
    "order of distances": (["--depth", "d.npy", "--depth-invert", "--depth-range", "9", "1"], "near below far"),
    "order of disparities": (["--depth", "d.npy", "--depth-range", "1", "9"], "near above far"),
    "no number": (["--depth-range", "nan", "9"], "near of depth_range must be in"),
    "aspect of a file": (["--depth", "d.npy", "--depth-keep-aspect"], "--depth-keep-aspect is for depth that is est"),
    "no map": (["--depth", "text.npy"], "--depth text.npy is damaged or not a picture of a known type"),
    "missing": (["--depth", "nowhere.npy"], "depth nowhere.npy is not a file"),
    "disparity as distances": (["--depth", "zero.npy", "--depth-invert"], "--depth must hold distances above 0"),
    "type to save": (["--save-depth", "d.xyz"], "d.xyz must be of a type that keeps a depth map"),
    "type of the preview": (["--depth-preview", "d.npy"], "must end in the name of an image type"),
    "over the map": (["--depth", "d.npy", "--save-depth", "d.npy"], "must all have different names"),
    "preview over the picture": (["--depth-preview", "a.png"], "must all have different names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_options_are_one_line_before_any_work(case, place, small_photo, monkeypatch, capsys):
    def work(options, dtype):
        raise AssertionError("loading was reached")

    monkeypatch.setattr(cli, "load", work)
    small_photo.save("photo.png")
    np.save("d.npy", METRES)
    np.save("zero.npy", METRES * 0)
    Path("text.npy").write_text("no map")
    before = sorted(path.name for path in place.iterdir())
    options, message = REFUSED[case]
    assert cli.main(["a cup", "photo.png", "-o", "a.png", *options]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line and line.startswith("depthdiff: error: ")
    assert sorted(path.name for path in place.iterdir()) == before


def test_unknown_words_of_inversion_are_wrong_usage(capsys):
    with pytest.raises(SystemExit):
        cli.main(["a cup", "photo.png", "--depth-invert", "over"])
    assert "invalid choice: 'over'" in capsys.readouterr().err
