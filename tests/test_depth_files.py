"""Files of depth maps: every real form read to the right numbers, what is written read back, damage named."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import OpenEXR
import png
import pytest
import tifffile
import torch

from depthdiff.conditioning import fit_depth
from depthdiff.depth_files import check_depth_type, read_depth_file, write_depth_file
from depthdiff.depth_maps import read_disparity
from tests.depth_forms import (
    DEEP,
    FLOATS,
    FORMS,
    METRES,
    coloured,
    exr,
    numpy_file,
    numpy_zip,
    pfm,
    pillow,
    pypng,
    tiff,
    turned,
    window,
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    "EXR of a region elsewhere": (
        lambda: exr(header=window((90, 90))[0], Z=METRES),
        "its data window is beside its display window",
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
