"""The whole circle on the bundled model: pictures, `scripts/train_lora.py`, a file, and the style in a picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
import train_lora
from PIL import Image
from scenes import caption, random_scene, render, to_pictures
from train_lora import LowRank, add_layers

from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline

ROOT = Path(__file__).parent.parent
SEEDS = range(6_000_000, 6_000_006)
STYLE = "blueprint"


def blueprint(picture):
    """Draw a picture (H, W, 3) in white on blue."""
    light = picture.mean(2, keepdims=True) / 255
    return (light * [200, 225, 255] + (1 - light) * [10, 40, 140]).astype(np.uint8)


def blueness(image):
    """How far blue lies above red, on the average of a PIL image."""
    pixels = np.asarray(image).astype(float)
    return (pixels[..., 2] - pixels[..., 0]).mean()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a LoRA that was trained on six pictures for a few steps."""
    folder = tmp_path_factory.mktemp("style")
    scenes = [random_scene(seed) for seed in SEEDS]
    for seed, scene, picture in zip(SEEDS, scenes, to_pictures(render(scenes).image), strict=True):
        Image.fromarray(blueprint(picture)).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(caption(scene, seed))
    train_lora.main([str(folder), str(folder / "lora"), "--prompt", STYLE, "--steps", "60"])
    return folder / "lora"


def test_the_style_is_in_the_picture(trained):
    """Blue with the adapter, as without it once it is unloaded, and in between at half its weight."""
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained("mini")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    with Image.open(ROOT / "docs" / "scene.png") as file:
        scene = file.copy()

    def blue():
        more = {"num_inference_steps": 10, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(0)}
        return blueness(pipe(f"a red ball and a yellow box, {STYLE}", scene, strength=1.0, **more).images[0])

    before = blue()
    pipe.load_lora_weights(trained, "style")
    after = blue()
    pipe.set_adapters("style", 0.5)
    half = blue()
    pipe.unload_lora_weights()
    assert blue() == before
    assert after > before + 40
    assert before < half < after


def test_layers_start_at_nothing(trained):
    """Before the first step the networks are what they were, and only the new layers learn."""
    unet = StableDiffusionDepth2ImgPipeline.from_pretrained("mini").unet
    weights = {key: value.clone() for key, value in unet.state_dict().items()}
    layers = add_layers(unet, 4)
    assert len(layers) > 20
    assert all(isinstance(layer, LowRank) for layer in layers.values())
    learning = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * len(layers)
    for name in layers:
        assert torch.equal(unet.get_submodule(name).weight, weights[f"{name}.weight"])
