"""The options of depth of the command: one scene in every convention, what is saved, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_checkpoint import build_pipeline

from depthdiff import cli
from tests.depth_forms import METRES, RNG, pillow, turned


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    expected, _ = command("--depth", "clamped.npy", "--depth-invert", "--depth-range", 5, 40)
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
    "aspect of a file": (["--depth", "d.npy", "--depth-keep-aspect"], "--depth-keep-aspect applies to estimates"),
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
    assert "unrecognized arguments: over" in capsys.readouterr().err
