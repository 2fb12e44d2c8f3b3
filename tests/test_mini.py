"""The bundled model does what depth-to-image is for: words repaint, the geometry stays.

Scenes and captions are of seeds never trained on. Bounds lie below the figures of `scripts/mini/evaluate.py` over 200
scenes (weights/mini/README.md), by about three standard errors of so few.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate import Evaluation, geometry_scores
from picture import SCENE
from PIL import Image
from safetensors import safe_open
from scenes import random_scene, render

from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from depthdiff.checkpoint.hub import bundled
from depthdiff.cli import main

ROOT = Path(__file__).parent.parent
SCENES = 12


@pytest.fixture(scope="module")
def evaluation():
    """Some scenes, rendered, and the pipeline."""
    return Evaluation(bundled(), SCENES)


@pytest.fixture(scope="module")
def painted(evaluation):
    """Every scene repainted at strength 1."""
    return evaluation.paint(1.0, 3.0, evaluation.captions)


@pytest.fixture(scope="module")
def scene():
    """The scene of the README: a sphere, a cube and a cone."""
    with Image.open(ROOT / "docs" / "scene.png") as image:
        return image.copy()


@pytest.fixture(scope="module")
def places():
    """Where its objects are: shape -> (H, W), bool."""
    known = random_scene(SCENE)
    mask = render([known]).mask[0]
    return {body.shape: mask == k + 1 for k, body in enumerate(known.bodies)}


def test_the_name_is_found_and_the_default(caplog):
    named = StableDiffusionDepth2ImgPipeline.from_pretrained("mini")
    assert not caplog.text
    unnamed = StableDiffusionDepth2ImgPipeline.from_pretrained()
    assert "no model is named, so the small one that comes with the package is used: 'mini'" in caplog.text
    assert named.name_or_path == unnamed.name_or_path == "mini"
    for mine, its in zip(named.unet.parameters(), unnamed.unet.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert type(named.vae).from_pretrained("mini", subfolder="vae").config == named.vae.config


def test_a_folder_of_that_name_is_another(tmp_path, monkeypatch):
    """An unrelated folder called mini does not get in the way; it is reached by a path."""
    (tmp_path / "mini").mkdir()
    monkeypatch.chdir(tmp_path)
    StableDiffusionDepth2ImgPipeline.from_pretrained("mini")
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        StableDiffusionDepth2ImgPipeline.from_pretrained("./mini")


def test_at_most_24_megabytes_in_half_precision():
    files = [path for path in bundled().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_parts(evaluation):
    """The autoencoder keeps pictures, the depth net sees objects. Observed over 200 scenes: see the model card."""
    figures = evaluation.parts()
    assert figures["psnr"] > 31
    assert figures["depth"] > 0.88


def test_words_repaint_and_geometry_stays(evaluation, painted):
    figures = evaluation.scores(painted)
    assert figures["geometry"] > 0.80
    assert figures["outline"] > 0.75
    assert figures["colours"] > 0.54  # that is what the caption's colours on any of the objects would give


def test_controls_are_much_worse(evaluation, painted):
    """The same pictures, held against another scene's geometry and another caption's colours."""
    readings = evaluation.read_depth(painted)
    other = [geometry_scores(readings[s], evaluation.shown, (s + 1) % SCENES)[0] for s in range(SCENES)]
    assert np.mean(other) < 0.4
    wrong = evaluation.captions[1:] + evaluation.captions[:1]
    colours = evaluation.scores(evaluation.paint(1.0, 3.0, wrong))["colours"]
    assert colours < min(0.4, evaluation.scores(painted)["colours"])


def paint(pipe, scene, prompt, **more):
    more = {"strength": 1.0, "num_inference_steps": 20, "guidance_scale": 2.0, "output_type": "pt"} | more
    return pipe(prompt, scene, generator=torch.Generator().manual_seed(3), **more).images[0]


def redness(image, place):
    """How far the red of some pixels lies above their blue."""
    return (image[0] - image[2])[place].mean().item()


def test_only_the_object_named_changes_its_colour(evaluation, scene, places):
    """Red to blue for the ball turns the ball blue, and the box keeps what the words say of it."""
    red = paint(evaluation.pipe, scene, "a red ball, a yellow box and a green cone")
    blue = paint(evaluation.pipe, scene, "a blue ball, a yellow box and a green cone")
    assert redness(red, places["sphere"]) > 0.2
    assert redness(blue, places["sphere"]) < -0.2
    for picture in (red, blue):
        assert redness(picture, places["cube"]) > 0.2


def test_more_strength_leads_farther_from_the_input(evaluation, scene):
    source = torch.from_numpy(np.asarray(scene.convert("RGB"))).movedim(2, 0) / 255
    prompt = "a red ball, a white box and a black cone at night"
    results = [paint(evaluation.pipe, scene, prompt, strength=s) for s in (0.2, 0.5, 0.8, 1.0)]
    distances = [(result - source).square().mean() for result in results]
    assert distances == sorted(distances)


def test_guidance_leads_to_the_prompt_and_away_from_the_negative_one(evaluation, scene, places):
    """Without words the ball is of any colour; more guidance brings it no farther from red; red can be unwanted."""
    pipe, ball, words = evaluation.pipe, places["sphere"], "a red ball, a red box and a red cone"
    conditional = redness(paint(pipe, scene, words, guidance_scale=1.0), ball)
    assert redness(paint(pipe, scene, words), ball) > conditional - 0.02
    assert redness(paint(pipe, scene, words), ball) > redness(paint(pipe, scene, ""), ball) + 0.1
    plain = paint(pipe, scene, "a ball, a box and a cone", negative_prompt=words)
    assert redness(paint(pipe, scene, words), ball) > redness(plain, ball) + 0.05


def test_the_command_without_a_model(scene, tmp_path, monkeypatch, capsys):
    scene.save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    assert main(["a golden sphere and a blue cube, at sunset", "scene.png", "--seed", "1", "--steps", "10"]) == 0
    assert "no --model named" in capsys.readouterr().err
    with Image.open("scene-depthdiff.png") as picture:
        assert picture.size == (128, 128)


def test_a_photo_far_too_large_is_shrunk(photo, tmp_path, monkeypatch, capsys):
    """A photograph of 600x400 comes out with the side the model was trained for, unless another is named."""
    photo.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    assert main(["a red cylinder", "photo.png", "--steps", "2", "-o", "a.png"]) == 0
    assert "photo resized from 600x400 to 192x128" in capsys.readouterr().err
    assert main(["a red cylinder", "photo.png", "--steps", "2", "-o", "b.png", "--size", "64"]) == 0
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert (a.size, b.size) == ((192, 128), (96, 64))


def test_the_wheel_carries_the_model(tmp_path):
    """Built, unpacked, and used from elsewhere, without the repository."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import depthdiff; p = depthdiff.StableDiffusionDepth2ImgPipeline.from_pretrained(); print(depthdiff.__file__)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout


def test_scheduler_predicts_velocity():
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained("mini")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
