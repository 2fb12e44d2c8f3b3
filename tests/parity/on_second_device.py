"""Both packages on a second device; `test_second_device.py` runs this file in a process of its own."""

import diffusers
import numpy as np
import pytest
import torch

import depthdiff
from tests import second_device
from tests.parity.both import load_both

second_device.install()
CLOSE = 1e-4  # of pictures in [0, 1]; observed: at most 8e-6


@pytest.fixture(scope="module")
def pair(tiny_folder):
    pipes = load_both(tiny_folder)
    for pipe in pipes:
        pipe.to("second")
    return pipes


def change(pipeline, index, timestep, tensors):
    return {"latents": tensors["latents"] * 0.9}


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("PNDMScheduler", {}),
        ("DDIMScheduler", {"eta": 0.5}),
        ("LMSDiscreteScheduler", {"guidance_scale": 1.0, "callback_on_step_end": change}),
        ("DDIMScheduler", {"generator": "second", "num_images_per_prompt": 2, "negative_prompt": "blurry"}),
    ],
    ids=str,
)
def test_same_picture(pair, small_photo, scheduler, options):
    """With a depth map, as diffusers estimates depth within autocast, which this device does not have."""
    pictures = []
    for package, pipe in zip((depthdiff, diffusers), pair, strict=True):
        pipe.scheduler = getattr(package, scheduler).from_config(pipe.scheduler.config)
        generator = torch.Generator(options.get("generator", "cpu")).manual_seed(0)
        arguments = {"num_inference_steps": 3, "output_type": "np", **options, "generator": generator}
        depth = torch.rand(1, 48, 64, generator=torch.Generator().manual_seed(1)).to("second")
        pictures.append(pipe("two tigers", small_photo.resize((64, 48)), depth, **arguments).images)
    assert pictures[1].std() > 0.01, "a flat picture proves nothing"
    assert np.abs(pictures[0] - pictures[1]).max() <= CLOSE
