"""The full geometry of Stable Diffusion 2 depth, 1.41 billion weights: network after network, then the command.

Random weights; float32; 64x96 pixels for the networks, the photograph at its own 600x400 for the command.
"""

import gc
import json
import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoint import GEOMETRIES, build_pipeline

from tests.parity.test_networks import TOLERANCE, distance, pair, text_config

pytestmark = pytest.mark.full
FULL = GEOMETRIES["full"]
PARAMETERS = {"unet": 865_913_604, "vae": 83_653_863, "text_encoder": 340_387_840}
"""As published. The depth net's 122,377,985 include layers that are never run; see `test_depth_net`."""


@torch.no_grad()
def test_unet(tmp_path):
    """Observed: 6e-7."""
    mine, reference = pair("unet", FULL["unet"], tmp_path)
    assert mine.num_parameters() == PARAMETERS["unet"]
    x, context = torch.randn(2, 5, 8, 12), torch.randn(2, 77, 1024)
    expected = reference(x, 981, encoder_hidden_states=context).sample
    assert distance(mine(x, 981, context).sample, expected) <= TOLERANCE


@torch.no_grad()
def test_autoencoder(tmp_path):
    """Observed: 5e-7 to encode, 4e-7 to decode."""
    mine, reference = pair("vae", FULL["vae"], tmp_path)
    assert mine.num_parameters() == PARAMETERS["vae"]
    x, z = torch.rand(1, 3, 64, 96) * 2 - 1, torch.randn(1, 4, 8, 12)
    assert distance(mine.encode(x).latent_dist.mode(), reference.encode(x).latent_dist.mode()) <= TOLERANCE
    assert distance(mine.decode(z).sample, reference.decode(z).sample) <= TOLERANCE


@torch.no_grad()
def test_text_encoder(tmp_path):
    """Observed: 1e-6."""
    mine, reference = pair("text_encoder", text_config(FULL["text_encoder"]), tmp_path)
    assert mine.num_parameters() == PARAMETERS["text_encoder"]
    ids = torch.randint(0, 49408, (2, 77))
    assert distance(mine(ids).last_hidden_state, reference(ids).last_hidden_state) <= TOLERANCE


@torch.no_grad()
def test_depth_net(tmp_path):
    """Observed: 2e-6. The published net has 414 tensors; ours leaves out a norm and a unit that are never run."""
    mine, reference = pair("depth_estimator", FULL["depth_estimator"], tmp_path)
    published = reference.state_dict()
    assert sum(tensor.numel() for tensor in published.values()) == 122_377_985
    assert len(published) == 414
    unused = 2 * 768 + 2 * (256 * 256 * 9 + 256)
    assert mine.num_parameters() == 122_377_985 - unused
    x = torch.rand(1, 3, 384, 384) * 2 - 1
    assert distance(mine(x).predicted_depth, reference(x).predicted_depth) <= TOLERANCE


def test_command_on_a_photograph(tmp_path, photo):
    """The photograph at its own size through the command, against diffusers on the same checkpoint, 2 steps.

    Observed: the 8-bit pictures differ by at most 1.
    """
    folder, source, result = tmp_path / "checkpoint", tmp_path / "photo.png", tmp_path / "result.png"
    build_pipeline("full").to(torch.float16).save_pretrained(folder)  # half the disk; read back in float32
    gc.collect()
    photo.save(source)
    command = [sys.executable, "-m", "depthdiff", "two tigers on a table", source, "-o", result, "--model", folder]
    command += ["--steps", "2", "--strength", "1", "--seed", "3", "--device", "cpu", "--dtype", "float32"]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    with Image.open(result) as picture:
        ours = np.asarray(picture).astype(int)
        how = json.loads(picture.text["depthdiff"])
    assert (how["seed"], how["steps"], how["scheduler"]) == (3, 2, "PNDMScheduler")
    pipe = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "two tigers on a table",
        photo,
        strength=1.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    theirs = np.asarray(theirs).astype(int)
    assert ours.shape == theirs.shape == (400, 600, 3)
    assert theirs.std() > 5
    assert np.abs(ours - theirs).max() <= 1
