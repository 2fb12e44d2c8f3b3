"""diffusers loads the folder of the bundled model, and makes the same picture from it."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import depthdiff
from depthdiff.checkpoint.hub import bundled

ROOT = Path(__file__).parent.parent.parent
TOLERANCE = 2e-3  # of full range
PROMPT = "a golden sphere and a blue cube, at sunset"


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("strength", [1.0, 0.8, 0.3])
def test_the_same_picture(scheduler, strength):
    with Image.open(ROOT / "docs" / "scene.png") as file:
        scene = file.resize((160, 128))
    pictures = []
    for package in (depthdiff, diffusers):
        pipe = package.StableDiffusionDepth2ImgPipeline.from_pretrained(
            bundled(), torch_dtype=torch.float32, local_files_only=True
        )
        pipe.scheduler = getattr(package, scheduler).from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        result = pipe(
            PROMPT,
            scene,
            strength=strength,
            num_inference_steps=10,
            negative_prompt="a red ball",
            num_images_per_prompt=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        pictures.append(result.images)
    assert np.abs(pictures[0] - pictures[1]).max() <= TOLERANCE
