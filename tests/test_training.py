"""The programs in `examples/` on the bundled model: they learn and go on, and diffusers loads the result."""

# ruff: noqa: E402

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scenes import caption, random_scene, render, to_pictures

pytest.importorskip("accelerate")
pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

import train_dreambooth
import train_lora
import train_text_to_image
import train_textual_inversion

import depthdiff
from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from depthdiff.checkpoint.hub import bundled

ROOT = Path(__file__).parent.parent
SEEDS = range(6_000_000, 6_000_006)
STYLE = "blueprint"
PICTURES = 2e-3  # of full range; observed: 8.3e-6
PROGRAMS = {
    "text to image": (train_text_to_image, ["--prompt", STYLE, "--ema", "0.5", "--rate", "1e-3"]),
    "dreambooth": (
        train_dreambooth,
        ["--prompt", "a sks ball", "--class-prompt", "a ball", "--class-count", "2", "--train-text-encoder"],
    ),
    "lora": (train_lora, ["--prompt", STYLE, "--rate", "5e-3"]),
    "textual inversion": (train_textual_inversion, ["--word", "<toy>", "--like", "ball", "--vectors", "2"]),
}
QUICK = ["--size", "64", "--batch", "2"]


def blueprint(picture):
    """Draw a picture (H, W, 3) in white on blue."""
    light = picture.mean(2, keepdims=True) / 255
    return (light * [200, 225, 255] + (1 - light) * [10, 40, 140]).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of six scenes in one style, with their words."""
    folder = tmp_path_factory.mktemp("photos")
    scenes = [random_scene(seed) for seed in SEEDS]
    for seed, scene, picture in zip(SEEDS, scenes, to_pictures(render(scenes).image), strict=True):
        Image.fromarray(blueprint(picture)).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(caption(scene, seed))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory, photos):
    """The folder and losses of four steps of each program, with a checkpoint after two."""
    results = {}
    for kind, (program, options) in PROGRAMS.items():
        out = tmp_path_factory.mktemp("out") / "result"
        results[kind] = (
            out,
            program.main([str(photos), str(out), *options, *QUICK, "--steps", "4", "--save-every", "2"]),
        )
    return results


def load(package, folder):
    pipe = package.StableDiffusionDepth2ImgPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True
    )
    pipe.scheduler = package.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scene():
    with Image.open(ROOT / "docs" / "scene.png") as file:
        return file.convert("RGB")


def paint(pipe, prompt, **kwargs):
    options = {"strength": 1.0, "num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "np"} | kwargs
    return pipe(prompt, scene(), generator=torch.Generator().manual_seed(0), **options).images[0]


def tensors(folder):
    """Read every tensor below a folder, but those of checkpoints."""
    files = [
        path for path in folder.rglob("*.safetensors") if not path.relative_to(folder).parts[0].startswith("check")
    ]
    return {
        f"{path.relative_to(folder)}:{name}": value for path in sorted(files) for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("kind", PROGRAMS)
def test_both_load_the_result(results, kind):
    """depthdiff and diffusers paint the same with it, and not what they paint without."""
    folder, losses = results[kind]
    assert len(losses) == 4 and np.isfinite(losses).all()
    whole = kind in ("text to image", "dreambooth")
    prompt = "a <toy>" if kind == "textual inversion" else "a sks ball, blueprint"
    pictures = []
    for package in (depthdiff, diffusers):
        pipe = load(package, folder if whole else bundled())
        if kind == "lora":
            pipe.load_lora_weights(str(folder))
        elif kind == "textual inversion":
            pipe.load_textual_inversion(str(folder))
        pictures.append(paint(pipe, prompt))
    assert np.abs(pictures[0] - pictures[1]).max() <= PICTURES
    before = load(depthdiff, bundled())
    assert np.abs(pictures[0] - paint(before, prompt)).max() > 10 * PICTURES


def run_again(results, kind, photos, out, *more):
    """Run a program with the options of `results` and others; return its losses."""
    program, options = PROGRAMS[kind]
    if kind == "dreambooth":
        options = [*options, "--class-photos", str(results[kind][0] / "class")]
    return program.main([str(photos), str(out), *options, *QUICK, *more])


@pytest.mark.parametrize("kind", PROGRAMS)
def test_going_on_from_a_checkpoint(results, photos, tmp_path, kind):
    """The last two steps alone give the weights and losses of all four."""
    folder, losses = results[kind]
    again = run_again(results, kind, photos, tmp_path, "--steps", "4", "--resume", str(folder / "checkpoint-2"))
    assert again == losses[2:]
    expected, found = tensors(folder), tensors(tmp_path)
    assert expected.keys() == found.keys() and expected
    assert all(found[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("kind", PROGRAMS)
def test_computing_layers_again_changes_no_loss(results, photos, tmp_path, kind):
    losses = results[kind][1]
    again = run_again(results, kind, photos, tmp_path, "--steps", "2", "--checkpointing")
    assert again == pytest.approx(losses[:2], abs=1e-6)  # observed: equal


def test_what_is_not_to_learn_stays(results):
    """DreamBooth leaves the autoencoder, textual inversion writes the new rows alone, LoRA both networks' layers."""
    before = tensors(Path(bundled()))
    after = tensors(results["dreambooth"][0])
    kept = [name for name in before if name.startswith(("vae", "depth_estimator"))]
    assert kept and all(after[name].equal(before[name].float()) for name in kept)
    changed = {name.split("/")[0] for name in before if not after[name].equal(before[name].float())}
    assert changed == {"unet", "text_encoder"}
    assert [value.shape for value in tensors(results["textual inversion"][0]).values()] == [(2, 128)]
    assert {name.split(":")[1].split(".")[0] for name in tensors(results["lora"][0])} == {"unet", "text_encoder"}


def test_a_style_is_learnt(photos, tmp_path):
    """Blue with the adapter, as without it once it is unloaded, and in between at half its weight."""
    losses = train_lora.main(
        [str(photos), str(tmp_path), "--prompt", STYLE, "--steps", "25", "--rate", "5e-3", "--batch", "2"]
    )
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])  # observed: 0.38
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained("mini")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def blue():
        picture = 255 * paint(pipe, f"a red ball and a yellow box, {STYLE}", num_inference_steps=10)
        return (picture[..., 2] - picture[..., 0]).mean()

    before = blue()
    pipe.load_lora_weights(tmp_path, "style")
    after = blue()
    pipe.set_adapters("style", 0.5)
    half = blue()
    pipe.unload_lora_weights()
    assert blue() == before
    assert after > before + 40  # observed: 99 more
    assert before < half < after


def test_from_the_command_line(photos, tmp_path):
    """As a user runs it, in half precision and with mirrored photos, two batches a step."""
    command = [sys.executable, ROOT / "examples" / "train_text_to_image.py", photos, tmp_path, *QUICK, "--steps", "1"]
    command += ["--precision", "bf16", "--flip", "--accumulate", "2", "--checkpointing"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path)
    assert paint(load(depthdiff, tmp_path), "a ball").shape == (128, 128, 3)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_help(capsys, kind):
    program, _ = PROGRAMS[kind]
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    assert program.__doc__.splitlines()[0] in capsys.readouterr().out


BAD = {
    "no folder": ("text to image", lambda folder: ["none", "out"], "none is not a folder"),
    "no pictures": ("lora", lambda folder: [folder / "empty", "out"], "has no pictures"),
    "not a picture": ("dreambooth", lambda folder: [folder / "broken", "out"], "is not a picture that Pillow reads"),
    "out is a file": ("lora", lambda folder: [folder / "good", folder / "good" / "x.png"], "is a file"),
    "no model": ("lora", lambda folder: [folder / "good", "out", "--model", folder / "empty"], "--model"),
    "no checkpoint": ("lora", lambda folder: [folder / "good", "out", "--resume", "checkpoint-1"], "checkpoint-STEP"),
    "size": (
        "text to image",
        lambda folder: [folder / "good", "out", "--size", "63"],
        "--size must be a multiple of 4",
    ),
    "steps": (
        "text to image",
        lambda folder: [folder / "good", "out", "--steps", "0"],
        "--steps: must be a whole number",
    ),
    "rate": ("lora", lambda folder: [folder / "good", "out", "--rate", "-1"], "--rate: must be a number above 0"),
    "ema": ("text to image", lambda folder: [folder / "good", "out", "--ema", "1"], "--ema must be in [0, 1)"),
    "two tokens": ("textual inversion", lambda folder: [folder / "good", "out", "--like", "red ball"], "single token"),
    "a known word": ("textual inversion", lambda folder: [folder / "good", "out", "--word", "ball</w>"], "is known"),
    "no place": (
        "textual inversion",
        lambda folder: [folder / "good", "out", "--prompt", "a"],
        "--prompt must hold {}",
    ),
    "no kind's pictures": (
        "dreambooth",
        lambda folder: [folder / "good", "out", "--class-photos", folder / "good" / "x.png"],
        "--class-photos",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, monkeypatch, capsys, case):
    """One clear line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "x.png").write_text("no picture")
    scene().save(tmp_path / "good" / "x.png")
    kind, arguments, message = BAD[case]
    program, options = PROGRAMS[kind]
    with pytest.raises(SystemExit) as end:
        program.main([*options, *map(str, arguments(tmp_path))])
    text = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert message in text and "\n" not in text.strip()
    assert not (tmp_path / "out").exists()
