"""The command: what it writes, prints and returns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from depthdiff import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler, StableDiffusionDepth2ImgPipeline
from depthdiff.cli import main
from depthdiff.options import build_parser

COLLECTED = """
import gc, sys
runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase) if info["generation"] == 2 else None)
from depthdiff.__main__ import main
sys.argv = ["depthdiff", "--version"]
try:
    main()
finally:
    print(len(runs), gc.isenabled(), gc.get_freeze_count() > 100_000, "torch" in sys.modules)
"""


def test_imports_are_not_looked_through_for_garbage():
    """What is old already, that is, which takes a seventh of the time; afterwards what the command makes is."""
    done = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, line = done.stdout.splitlines()
    assert version.startswith("depthdiff ")
    assert line == "0 True True True"
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '\ndepthdiff = "depthdiff.__main__:main"\n' in project
    done = subprocess.run([sys.executable, "-m", "depthdiff", "inspect", "/nowhere"], capture_output=True)
    assert done.returncode == 1, "what the command returns is the exit status"


@pytest.fixture
def place(tmp_path, tiny_folder, small_photo, monkeypatch):
    """A working folder with a photo, and the checkpoint beside it."""
    small_photo.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(tiny_folder, *more):
    return ["two tigers", "photo.png", "--model", str(tiny_folder), "--steps", "3", *map(str, more)]


def test_a_picture_that_can_be_made_again(place, tiny_folder, capsys):
    assert main(command(tiny_folder, "--seed", 7, "-o", "a.png", "-n", "blurry")) == 0
    out = capsys.readouterr().out
    assert "seed 7" in out
    assert "a.png" in out
    with Image.open("a.png") as picture:
        how = json.loads(picture.text["depthdiff"])
        first = np.asarray(picture)
    assert first.shape == (88, 120, 3)
    assert (how["prompt"], how["negative_prompt"], how["seed"], how["steps"]) == ("two tigers", "blurry", 7, 3)
    again = command(tiny_folder, "--seed", how["seed"], "-o", "b.png", "-n", how["negative_prompt"])
    assert main(again) == 0
    with Image.open("b.png") as picture:
        assert np.array_equal(np.asarray(picture), first)
    assert sorted(path.name for path in place.iterdir()) == ["a.png", "b.png", "photo.png"]


def test_default_name_and_new_seed(place, tiny_folder, capsys):
    assert main(command(tiny_folder)) == 0
    assert main(command(tiny_folder)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("seed ")
    assert lines[0] != lines[2]
    assert (place / "photo-depthdiff.png").exists()


def test_the_picture_is_that_of_the_library(place, tiny_folder, small_photo):
    assert (
        main(
            command(
                tiny_folder, "--seed", 5, "-o", "a.png", "--scheduler", "ddim", "--eta", "0.5", "--dtype", "float32"
            )
        )
        == 0
    )
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder)
    from depthdiff import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = pipe(
        "two tigers", small_photo, num_inference_steps=3, eta=0.5, generator=torch.Generator().manual_seed(5)
    ).images[0]
    with Image.open("a.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_several_pictures_depth_and_sheet(place, tiny_folder):
    arguments = ["--num-images", 2, "--seed", 1, "-o", "a.jpg", "--save-depth", "depth.png", "--sheet", "sheet.png"]
    assert main(command(tiny_folder, *arguments)) == 0
    with Image.open("a-1.jpg") as one, Image.open("a-2.jpg") as two:
        assert np.abs(np.asarray(one).astype(int) - np.asarray(two)).max() > 10
    with Image.open("depth.png") as depth:
        assert depth.mode == "I;16"
        assert np.asarray(depth).max() == 65535
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 4 * 100
    # the depth map that was saved, used again, gives the same picture but for its 16 bits
    exact = ("--seed", 1, "--dtype", "float32")
    assert main(command(tiny_folder, *exact, "-o", "b.png", "--depth", "depth.png")) == 0
    assert main(command(tiny_folder, *exact, "-o", "c.png")) == 0
    with Image.open("b.png") as b, Image.open("c.png") as c:
        assert np.abs(np.asarray(b).astype(int) - np.asarray(c)).max() <= 2


FAILURES = {
    "photo missing": (["two tigers", "nowhere.png"], "nowhere.png is not a file"),
    "photo that is none": (["two tigers", "text.png"], "not a picture of a known type"),
    "model missing": (["two tigers", "photo.png", "--model", "./nowhere"], "'./nowhere' is neither a folder nor"),
    "folder missing": (["two tigers", "photo.png", "-o", "no/a.png"], "does not exist; make it first"),
    "unknown type": (["two tigers", "photo.png", "-o", "a.xyz"], "must end in the name of an image type"),
    "over the photo": (["two tigers", "photo.png", "-o", "photo.png"], "must all have different names"),
    "no pictures": (["two tigers", "photo.png", "--num-images", "0"], "--num-images must be in [1, 1000], got 0"),
    "strength": (["two tigers", "photo.png", "--strength", "1.5"], "strength must be in [0, 1], got 1.5"),
    "size": (["two tigers", "photo.png", "--size", "4"], "--size must be in [8, 16384], got 4"),
    "weight": (
        ["two tigers", "photo.png", "--lora", "a.safetensors:much"],
        "--lora a.safetensors:much: 'much' must be",
    ),
    "lora missing": (["two tigers", "photo.png", "--lora", "a.safetensors"], "lora a.safetensors is not a file"),
    "depth missing": (["two tigers", "photo.png", "--depth", "d.png"], "depth d.png is not a file"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line_and_status_1(place, tiny_folder, capsys, case):
    (place / "text.png").write_text("no picture")
    arguments, message = FAILURES[case]
    model = [] if "--model" in arguments else ["--model", str(tiny_folder)]
    assert main([*arguments, *model]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("depthdiff")]) == 1
    assert "Traceback" not in error
    assert sorted(path.name for path in place.iterdir()) == ["photo.png", "text.png"]


def test_traceback_with_v(place, tiny_folder, capsys):
    assert main([*command(tiny_folder), "--strength", "2", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["only a prompt"], ["a", "b", "--steps", "many"], ["a", "b", "--nothing"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: depthdiff" in capsys.readouterr().err


def test_help_and_module(capsys):
    for action in build_parser()._actions:
        assert action.help, action.option_strings
    command = [sys.executable, "-m", "depthdiff", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    assert "PROMPT" in done.stdout


def test_adapters(place, tiny_folder, pipe, small_photo):
    """`--lora FILE:WEIGHT` and `--embedding FILE:WORD`, several times each, do what the library does."""
    import torch
    from safetensors.torch import save_file

    width = pipe.text_encoder.config.hidden_size
    channels = pipe.unet.conv_in.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        down, up = torch.rand(2, 5, 3, 3, generator=generator), torch.rand(channels, 2, 1, 1, generator=generator)
        save_file({"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}, f"{name}.safetensors")
    save_file({"emb_params": torch.rand(2, width, generator=generator)}, "style.safetensors")
    more = ["--lora", "one.safetensors:0.5", "--lora", "two.safetensors", "--embedding", "style.safetensors:<word>"]
    arguments = ["a <word>", "photo.png", "--model", str(tiny_folder), "--steps", "3", "--seed", "3", "-o", "a.png"]
    assert main([*arguments, *more, "--dtype", "float32"]) == 0
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights("one.safetensors", "one")
    pipe.load_lora_weights("two.safetensors", "two")
    pipe.set_adapters(["one", "two"], [0.5, 1.0])
    pipe.load_textual_inversion("style.safetensors", "<word>")
    expected = pipe("a <word>", small_photo, num_inference_steps=3, generator=torch.Generator().manual_seed(3)).images[
        0
    ]
    with Image.open("a.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
        assert json.loads(picture.text["depthdiff"])["lora"] == ["one.safetensors:0.5", "two.safetensors"]


def test_a_photo_keeps_its_size_whatever_the_config_says(place, tiny_folder, photo, capsys):
    """The published UNet's config names half of the size that it was trained on, so that no size is read off it."""
    photo.save("large.png")
    assert main(["two tigers", "large.png", "--model", str(tiny_folder), "--steps", "2", "-o", "a.png"]) == 0
    assert "resized" not in capsys.readouterr().err


def test_size(place, tiny_folder, capsys):
    assert main(command(tiny_folder, "--size", 64, "-o", "a.png")) == 0
    assert "photo resized from 120x88 to 87x64" in capsys.readouterr().err
    with Image.open("a.png") as picture:
        assert picture.size == (80, 64)


def test_example_script(place, tiny_folder):
    """`scripts/depth2img.py`, the library's use in one file, runs as it is written."""
    from depth2img import main as example

    example(str(tiny_folder), "photo.png", "two tigers", "result.png")
    with Image.open("result.png") as picture:
        assert picture.size == (120, 88)


def test_tf32_is_for_cuda_alone(tmp_path, monkeypatch):
    """It is a switch of the whole process, which only the command may turn."""
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr("depthdiff.cli.load", lambda options, dtype: 1 / 0)
    monkeypatch.setattr("depthdiff.command_checks.check_device", lambda argument, name: None)
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    for device, expected in (("cpu", []), ("cuda", ["high"])):
        assert main(["a cup", str(tmp_path / "photo.png"), "--tf32", "--device", device]) == 1
        assert asked == expected


def test_the_processor_works_in_what_it_has_in_hardware(place, tiny_folder, monkeypatch):
    """By default bfloat16 or float32, never float16; the picture says which."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command(tiny_folder, "--seed", 5, "-o", "a.png")) == 0
    assert main(command(tiny_folder, "--seed", 5, "-o", "b.png", "--dtype", "auto")) == 0
    fast = torch.cpu._is_avx512_bf16_supported()
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert json.loads(a.text["depthdiff"])["dtype"] == ("bfloat16" if fast else "float32")
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_words_that_are_not_read_are_named(place, tiny_folder, capsys):
    """Of both prompts, once each; a prompt of the full length is read whole."""
    words = " ".join(["cup"] * 75)
    assert main(command(tiny_folder, "-o", "a.png", "-n", f"{words} red blue")) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "not read" in line]
    assert line == "depthdiff: the negative prompt is longer than 75 tokens; not read: red blue"
    arguments = command(tiny_folder, "-o", "a.png", "-n", words)
    assert main([f"{words} green", *arguments[1:]]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "not read" in line]
    assert line == "depthdiff: the prompt is longer than 75 tokens; not read: green"


@pytest.mark.parametrize("name", ["ddim", "pndm", "lms"])
def test_a_chosen_scheduler_wins_over_an_unknown_one(name, place, tiny_folder, capsys):
    """Its settings count, as far as the chosen one has them; without the option the checkpoint is refused."""
    folder = place / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = "EDMEulerScheduler"
    (folder / "model_index.json").write_text(json.dumps(index))
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    settings |= {"_class_name": "EDMEulerScheduler", "beta_end": 0.02, "final_sigmas_type": "zero"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    assert main(command(folder, "-o", "a.png")) == 1
    assert "scheduler is a EDMEulerScheduler; implemented here" in capsys.readouterr().err
    assert main(command(folder, "-o", "a.png", "--scheduler", name, "--seed", 1)) == 0
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder)
    kind = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "lms": LMSDiscreteScheduler}[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, beta_end=0.02)
    pipe.save_pretrained(place / "own")
    assert main(command(place / "own", "-o", "b.png", "--seed", 1)) == 0
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))


@pytest.mark.parametrize("device", ["mps", "cuda", "cuda:99", "xpu", "gpu"])
def test_a_device_that_is_not_here_is_one_short_line(device, place, tiny_folder, capsys):
    if (device == "mps" and torch.backends.mps.is_available()) or (device == "cuda" and torch.cuda.is_available()):
        pytest.skip("it is here")
    assert main(command(tiny_folder, "--device", device)) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("depthdiff: error: --device must be") and len(line) < 200
