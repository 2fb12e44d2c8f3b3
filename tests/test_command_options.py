"""The options of the command that change a call: each gives the library's picture, or is refused in one line."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoint import build_pipeline

from depthdiff import cli
from depthdiff.redo import read_redo

ROOT = Path(__file__).parents[1]
COFFEE = ROOT / "tests" / "data" / "coffee.png"


@pytest.fixture(autouse=True)
def interrupts_arrive():
    """Let SIGINT arrive, here and in new processes, also where it was ignored as by nohup or a shell's `&`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def shared():
    """A random pipeline in float32."""
    pipe = build_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def small_photo(photo):
    """A photograph, 96x56."""
    return photo.resize((96, 56))


@pytest.fixture
def place(tmp_path, small_photo, monkeypatch):
    """A working folder with a photo and a depth map."""
    small_photo.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    np.save("depth.npy", np.random.default_rng(0).random((44, 60), dtype=np.float32))
    return tmp_path


@pytest.fixture
def command(place, shared, monkeypatch):
    """Run the command; return the picture and what is stored in it."""
    monkeypatch.setattr(cli, "load", lambda options, dtype: shared)

    def run(*options, front=("a cup", "photo.png"), status=0):
        arguments = [*front, "--steps", 3, "--seed", 5, "-o", "a.png", *options]
        assert cli.main([str(one) for one in arguments]) == status
        with Image.open("a.png") as picture:
            picture.load()
            return np.asarray(picture), json.loads(picture.text["depthdiff"])

    return run


def library(pipe, image, **options):
    call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(5), **options}
    return np.asarray(pipe("a cup", image, **call).images[0])


def test_a_mask_keeps_the_photo(command, shared, photo):
    """To the byte beyond the feather, which ends at three deviations; within, everything is another."""
    white = np.zeros((400, 600), dtype=bool)
    white[120:240, 200:360] = True
    Image.fromarray(white).save("mask.png")
    found, how = command(
        "--mask", "mask.png", "--mask-blur", 2.5, "--mask-content", "noise", "--strength", 0.4, front=("a cup", COFFEE)
    )
    near = np.zeros_like(white)
    near[112:248, 192:368] = True  # 2.5 pixels * 3, rounded up
    own = np.asarray(photo)
    assert np.array_equal(found[~near], own[~near])
    assert (found[128:232, 208:352] != own[128:232, 208:352]).any(axis=-1).mean() > 0.95
    assert (how["mask"], how["mask_blur"], how["image"]) == ("mask.png", 2.5, "coffee.png")
    options = {"mask_image": Image.fromarray(white), "mask_blur": 2.5, "mask_content": "noise", "strength": 0.4}
    assert np.array_equal(found, library(shared, photo, **options))


CASES = {
    "seamless": (["--seamless"], {"seamless": True}),
    "seamless along one axis": (["--seamless", "x"], {"seamless": "x"}),
    "windows": (["--windows", 64, 32], {"windows": (64, 32)}),
    "start": (["--start", "noise"], {"start": "noise", "strength": 1.0}),
    "hires": (["--hires", 1.5], {"hires": 1.5}),
    "hires with strength": (["--hires", 2, "--hires-strength", 0.7], {"hires": 2, "hires_strength": 0.7}),
    "hires without a step": (["--hires", 2, "--hires-strength", 0], {"hires": 2, "hires_strength": 0}),
    "preview": (["--preview", 1], {}),
    "rescaled": (["--guidance-rescale", 0.7], {"guidance_rescale": 0.7}),
    "aspect": (["--depth-keep-aspect"], {"depth_keep_aspect": True}),
    "range": (["--depth-range", 0.4, 0.1], {"depth_range": (0.4, 0.1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_options_are_those_of_the_library(case, command, shared, small_photo, place):
    """And the picture differs from the one without, but for previews, which cost nothing of it."""
    options, arguments = CASES[case]
    found, how = command(*options)
    assert np.array_equal(found, library(shared, small_photo, **arguments))
    if case == "preview":
        with Image.open("a-preview.png") as preview:
            assert preview.size == (96, 56)
    else:
        assert {name: how[name] for name in arguments} == json.loads(json.dumps(arguments))
        plain = library(shared, small_photo)
        assert found.shape != plain.shape or np.abs(found.astype(int) - plain).max() > 10
    assert {path.name for path in place.glob("a-*")} == ({"a-preview.png"} if case == "preview" else set())


def test_depth_alone(command, shared):
    """Its size counts unless another is asked for."""
    depth = torch.from_numpy(np.load("depth.npy"))[None]
    for options, arguments in (([], {}), (["--height", 64, "--width", 96], {"height": 64, "width": 96})):
        found, how = command("--depth", "depth.npy", *options, front=("a cup",))
        assert np.array_equal(found, library(shared, None, depth_map=depth, strength=1.0, **arguments))
        assert found.shape == ((64, 96, 3) if options else (40, 56, 3))
        assert (how["image"], how["depth"], how["strength"]) == (None, "depth.npy", 1.0)


SIZES = {
    "crop": "photo resized from 96x56 to 64x64: cropped by left 20, right 20",
    "pad": "photo resized from 96x56 to 64x64: padded by top 20, bottom 20",
    "stretch": "photo resized from 96x56 to 64x64: stretched",
}


@pytest.mark.parametrize("mode", SIZES)
def test_sizes(mode, command, shared, small_photo, capsys):
    found, _ = command("--height", 64, "--width", 64, "--resize-mode", mode)
    assert f"depthdiff: {SIZES[mode]}" in capsys.readouterr().err.splitlines()
    assert np.array_equal(found, library(shared, small_photo, height=64, width=64, resize_mode=mode))
    assert found.shape == (64, 64, 3)


def test_one_side_of_a_size(command, shared, small_photo, capsys):
    found, _ = command("--width", 48)
    assert found.shape == (32, 48, 3)
    assert np.array_equal(found, library(shared, small_photo, width=48))


@pytest.mark.parametrize(
    "order",
    [
        ["--steps", "2", "a cup", "--seed", "5", "photo.png", "-o", "a.png"],
        ["--seed", "5", "--seamless", "x", "-o", "a.png", "a cup", "photo.png", "--steps", "2"],
        ["-o", "a.png", "--windows", "64", "32", "a cup", "photo.png", "--steps", "2", "--seed", "5"],
        ["--karras", "--steps", "2", "--seed=5", "-o", "a.png", "--", "a cup", "photo.png"],
    ],
)
def test_options_stand_anywhere(order, place, monkeypatch, shared):
    monkeypatch.setattr(cli, "load", lambda options, dtype: shared)
    assert cli.main(order) == 0
    with Image.open("a.png") as picture:
        how = json.loads(picture.text["depthdiff"])
    assert (how["prompt"], how["image"], how["steps"], how["seed"]) == ("a cup", "photo.png", 2, 5)


DEPTH = ("a cup", "--depth", "depth.npy")
PHOTO = ("a cup", "photo.png")
REFUSED = {
    "mask without a photo": ((*DEPTH, "--mask", "photo.png"), "--mask needs IMAGE, the photo; got --depth alone"),
    "strength without one": ((*DEPTH, "--strength", "0.5"), "--strength needs IMAGE"),
    "aspect without one": ((*DEPTH, "--depth-keep-aspect"), "--depth-keep-aspect needs IMAGE"),
    "two sizes": ((*PHOTO, "--size", "64", "--height", "64"), "--size must be left out where --height or --width"),
    "blur alone": ((*PHOTO, "--mask-blur", "2"), "--mask-blur needs --mask"),
    "content alone": ((*PHOTO, "--mask-content", "noise"), "--mask-content needs --mask"),
    "windows": ((*PHOTO, "--windows", "60", "20"), "windows must be multiples of 8"),
    "gaps": ((*PHOTO, "--windows", "64", "128"), "stride <= size"),
    "hires": ((*PHOTO, "--hires", "9"), "hires must be in [1, 4], got 9"),
    "hires's strength alone": ((*PHOTO, "--hires-strength", "0.5"), "--hires-strength needs --hires"),
    "mode alone": ((*PHOTO, "--resize-mode", "pad"), "--resize-mode needs --height or --width"),
    "a height that is none": ((*PHOTO, "--height", "60"), "height must be a multiple of 8, got 60"),
    "noise, but a little": ((*PHOTO, "--start", "noise", "--strength", "0.5"), "needs strength 1"),
    "seamless windows": ((*PHOTO, "--windows", "64", "32", "--seamless"), "--windows cannot be --seamless as well"),
    "decoder alone": ((*PHOTO, "--preview-decoder", "photo.png"), "give --preview as well"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_combinations_are_one_line_before_the_model_is_loaded(case, place, tiny_folder, monkeypatch, capsys):
    def load(options, dtype):
        raise AssertionError("loading was reached")

    monkeypatch.setattr(cli, "load", load)
    before = sorted(place.iterdir())
    arguments, message = REFUSED[case]
    assert cli.main([*arguments, "-o", "a.png", "--model", str(tiny_folder)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("depthdiff: error: ") and message in line
    assert sorted(place.iterdir()) == before


def test_multiples_are_those_of_the_model(place, monkeypatch, capsys):
    """Of 4 pixels for the small one that comes along; what is no folder is asked when it is loaded."""

    def load(options, dtype):
        raise AssertionError("loading was reached")

    monkeypatch.setattr(cli, "load", load)
    for windows, model in ((("60", "20"), []), (("61", "20"), ["--model", "some/model"])):
        assert cli.main([*PHOTO, "--windows", *windows, *model]) == 1
        assert "loading was reached" in capsys.readouterr().err
    assert cli.main([*PHOTO, "--windows", "62", "20"]) == 1
    assert "windows must be multiples of 4" in capsys.readouterr().err


def test_filled_holes_are_one_line(command, capsys):
    """Also without -v; and loggers are afterwards as they were before."""
    holes = np.load("depth.npy")
    holes[:11] = np.nan
    np.save("holes.npy", holes)
    logger = logging.getLogger("depthdiff.depth_maps")
    before = logger.level, logger.propagate, list(logger.handlers)
    command("--depth", "holes.npy")
    assert capsys.readouterr().err.splitlines() == [
        "depthdiff: --depth: 25 % of the values are unknown (NaN or infinite) and count as farthest"
    ]
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def interrupt_after(monkeypatch, count, *, times=1):
    """Send SIGINT when a preview is written for the `count`-th time, in the midst of the work."""
    written, save = [], cli.save_image

    def save_image(picture, path, how=None):
        save(picture, path, how)
        written.append(path)
        if len(written) == count:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "save_image", save_image)


def test_a_partial_picture_is_what_is_expected(command, shared, small_photo, monkeypatch, capsys):
    """The clean latents that the last step predicts, decoded. Its redo is the whole picture."""
    whole, _ = command("--strength", 1)
    whole_file = Path("a.png").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        found, how = command("--strength", 1, "--preview", 1, "--save-partial", status=130)
    assert how["interrupted_after"] == 2
    assert capsys.readouterr().err.splitlines()[-1] == "depthdiff: interrupted; what there was is written"
    generator = torch.Generator().manual_seed(5)
    run = shared.prepare("a cup", small_photo, num_inference_steps=3, strength=1.0, generator=generator)
    steps = shared.denoise(run)
    for _ in range(2):
        step = next(steps)
    steps.close()
    assert np.array_equal(found, np.asarray(shared.decode(step.denoised)[0]))
    assert not np.array_equal(found, whole)
    _, [line] = read_redo(["a.png"])
    assert line == "a.png: was interrupted after 2 steps; the whole picture is made"
    assert cli.main(["redo", "a.png"]) == 0
    assert Path("a-redo.png").read_bytes() == whole_file


@pytest.mark.parametrize(("count", "size", "taken"), [(4, (56, 96), 4), (5, (112, 192), 5), (6, (112, 192), 6)])
def test_a_second_pass_is_interrupted(count, size, taken, command, monkeypatch):
    """After the first pass, or within the second: a picture of that pass's size."""
    interrupt_after(monkeypatch, count)
    options = ["--strength", 1, "--hires", 2, "--hires-strength", 1, "--preview", 1, "--save-partial"]
    found, how = command(*options, status=130)
    assert found.shape == (*size, 3)
    assert how["interrupted_after"] == taken


def test_between_two_passes_the_first_counts(command, shared, monkeypatch):
    """Which is whole, but smaller than what was asked for."""
    whole, _ = command("--strength", 1)
    enlarge = shared.enlarge

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return enlarge(*arguments)

    monkeypatch.setattr(shared, "enlarge", interrupted)
    found, how = command("--strength", 1, "--hires", 2, "--save-partial", status=130)
    assert np.array_equal(found, whole) and how["interrupted_after"] == 4  # PNDM's first step takes two


def test_after_the_last_step_there_is_nothing_to_leave_out(command, monkeypatch):
    whole, _ = command("--strength", 1)
    interrupt_after(monkeypatch, 4)
    found, how = command("--strength", 1, "--preview", 1, "--save-partial")
    assert np.array_equal(found, whole) and "interrupted_after" not in how


@pytest.mark.parametrize("arguments", [["--save-partial", "twice"], []])
def test_nothing_is_written(arguments, place, shared, monkeypatch, capsys):
    """At the second SIGINT, or where it was not asked for; previews aside."""
    monkeypatch.setattr(cli, "load", lambda options, dtype: shared)
    interrupt_after(monkeypatch, 1, times=2 if arguments else 1)
    before = signal.getsignal(signal.SIGINT)
    status = cli.main(["a cup", "photo.png", "--preview", "1", "-o", "a.png", *arguments[:1]])
    assert status == 130 and signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.splitlines() == ["depthdiff: interrupted"]
    assert {path.name for path in place.iterdir()} == {"photo.png", "depth.npy", "a-preview.png"}


@pytest.mark.skipif(os.name != "posix", reason="sends signals as POSIX does")
def test_a_process_that_is_interrupted(place, tiny_folder):
    """Whoever reads the preview meanwhile finds it whole at any time."""
    options = ["--model", tiny_folder, "--steps", 1000, "--preview", 1, "--save-partial", "-o", "a.png"]
    command = [sys.executable, "-m", "depthdiff", "a cup", "photo.png", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    seen, end = set(), time.monotonic() + 120
    while len(seen) < 3 and process.poll() is None and time.monotonic() < end:
        if Path("a-preview.png").exists():
            with Image.open("a-preview.png") as preview:
                seen.add(preview.tobytes())
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert len(seen) == 3 and said.splitlines()[-1] == "depthdiff: interrupted; what there was is written"
    with Image.open("a.png") as picture:
        picture.load()
        how = json.loads(picture.text["depthdiff"])
    assert picture.size == (96, 56) and 3 <= how["interrupted_after"] < 1000
    assert {path.name for path in place.iterdir()} == {"photo.png", "depth.npy", "a.png", "a-preview.png"}
