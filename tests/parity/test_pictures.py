"""Whole pictures against diffusers' pipeline: same checkpoint, same arguments, same generator."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoint import build_pipeline

import depthdiff
from tests.parity.both import load_both

TOLERANCE = 2e-3  # of full range; observed: at most 2e-5
STEPS = 6


@pytest.fixture(scope="module", params=["tiny", "small"])
def pair(request, tmp_path_factory):
    """One checkpoint, written by us, loaded by both."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    build_pipeline(request.param).save_pretrained(folder)
    pipes = load_both(folder)
    # diffusers 0.42 looks for the final norm, which clip_skip needs, where transformers 4 had it
    pipes[1].text_encoder.__dict__["text_model"] = pipes[1].text_encoder
    return pipes


def generators(count):
    return [torch.Generator().manual_seed(10 + i) for i in range(count)]


def random_depth(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 30


def embeds(pipe, batch):
    width = pipe.unet.config.cross_attention_dim
    return torch.randn(batch, 77, width, generator=torch.Generator().manual_seed(2))


def tensor_image(small_photo, count=1):
    array = np.stack([np.asarray(small_photo)] * count).astype(np.float32) / 255
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def mirrored(image):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


# Each case: (arguments that need the photograph and a pipeline, name of the scheduler or None)
CASES = {
    "defaults": lambda photo, pipe: {},
    "strength 1": lambda photo, pipe: {"strength": 1.0},
    "strength 0.3": lambda photo, pipe: {"strength": 0.3},
    "strength 0.5, 20 steps": lambda photo, pipe: {"strength": 0.5, "num_inference_steps": 20},
    "one step": lambda photo, pipe: {"num_inference_steps": 1, "strength": 1.0},
    "50 steps": lambda photo, pipe: {"num_inference_steps": 50},
    "no guidance": lambda photo, pipe: {"guidance_scale": 1.0},
    "guidance below one": lambda photo, pipe: {"guidance_scale": 0.5},
    "strong guidance": lambda photo, pipe: {"guidance_scale": 15},
    "negative prompt": lambda photo, pipe: {"negative_prompt": "blurry, bad anatomy"},
    "negative prompt without guidance": lambda photo, pipe: {"negative_prompt": "blurry", "guidance_scale": 1.0},
    "two pictures a prompt": lambda photo, pipe: {"num_images_per_prompt": 2},
    "two prompts": lambda photo, pipe: {"prompt": ["two tigers", "a cup of coffee!"]},
    "two prompts, two negative ones": lambda photo, pipe: {
        "prompt": ["two tigers", "a cup of coffee!"],
        "negative_prompt": ["blurry", ""],
    },
    "two prompts, two pictures each": lambda photo, pipe: {
        "prompt": ["two tigers", "a cup of coffee!"],
        "num_images_per_prompt": 2,
    },
    "two prompts, two images": lambda photo, pipe: {
        "prompt": ["two tigers", "a cup of coffee!"],
        "image": [photo, mirrored(photo)],
    },
    "list of two generators": lambda photo, pipe: {"num_images_per_prompt": 2, "generator": generators(2)},
    "list of one generator": lambda photo, pipe: {"generator": generators(1)},
    "four generators": lambda photo, pipe: {
        "prompt": ["two tigers", "a cup of coffee!"],
        "num_images_per_prompt": 2,
        "generator": generators(4),
    },
    "two images, a generator each": lambda photo, pipe: {
        "prompt": ["two tigers", "a cup of coffee!"],
        "image": [photo, mirrored(photo)],
        "generator": generators(2),
    },
    "long prompt": lambda photo, pipe: {"prompt": "an oil painting of the old harbour at night, " * 20},
    "empty prompt": lambda photo, pipe: {"prompt": ""},
    "clip_skip 1": lambda photo, pipe: {"clip_skip": 1},
    "clip_skip 2": lambda photo, pipe: {"clip_skip": 2},
    "prompt_embeds": lambda photo, pipe: {"prompt": None, "prompt_embeds": embeds(pipe, 1)},
    "both embeds": lambda photo, pipe: {
        "prompt": None,
        "prompt_embeds": embeds(pipe, 2),
        "negative_prompt_embeds": embeds(pipe, 2).flip(1),
    },
    "depth map": lambda photo, pipe: {"depth_map": random_depth(1, 50, 70)},
    "depth map of one byte": lambda photo, pipe: {"depth_map": random_depth(1, 88, 120).to(torch.uint8)},
    "two depth maps": lambda photo, pipe: {
        "prompt": ["two tigers", "a cup of coffee!"],
        "image": [photo, mirrored(photo)],
        "depth_map": random_depth(2, 30, 20),
    },
    "size that is no multiple of 8": lambda photo, pipe: {"image": photo.resize((101, 70))},
    "upright size": lambda photo, pipe: {"image": photo.resize((64, 96))},
    "tensor image": lambda photo, pipe: {"image": tensor_image(photo), "depth_map": random_depth(1, 50, 70)},
    "tensor image in [-1, 1]": lambda photo, pipe: {
        "image": tensor_image(photo) * 2 - 1,
        "depth_map": random_depth(1, 50, 70),
    },
    "list of tensors": lambda photo, pipe: {"image": list(tensor_image(photo)), "depth_map": random_depth(1, 50, 70)},
    "square array": lambda photo, pipe: {
        "image": np.asarray(photo.resize((64, 64)))[None].astype(np.float32) / 255,
        "depth_map": random_depth(1, 50, 70),
    },
    "latent output": lambda photo, pipe: {"output_type": "latent"},
    "tensor output": lambda photo, pipe: {"output_type": "pt"},
    "PIL output": lambda photo, pipe: {"output_type": "pil"},
    "DDIM": lambda photo, pipe: {"scheduler": "DDIMScheduler"},
    "DDIM, eta 0.7": lambda photo, pipe: {"scheduler": "DDIMScheduler", "eta": 0.7},
    "DDIM, eta 1, a generator each": lambda photo, pipe: {
        "scheduler": "DDIMScheduler",
        "eta": 1.0,
        "num_images_per_prompt": 2,
        "generator": generators(2),
    },
    "DDIM, strength 0.3": lambda photo, pipe: {"scheduler": "DDIMScheduler", "strength": 0.34},
    "DDIM, trailing": lambda photo, pipe: {"scheduler": "DDIMScheduler", "spacing": "trailing"},
    "LMS": lambda photo, pipe: {"scheduler": "LMSDiscreteScheduler"},
    "LMS, strength 1": lambda photo, pipe: {"scheduler": "LMSDiscreteScheduler", "strength": 1.0},
    "PNDM with the Runge-Kutta start": lambda photo, pipe: {"scheduler": "PNDMScheduler", "runge_kutta": True},
    "tuple": lambda photo, pipe: {"return_dict": False},
}


def call(package, pipe, photo, case):
    arguments = {
        "prompt": "two tigers on a wooden table",
        "image": photo,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
        **CASES[case](photo, pipe),
    }
    published = pipe.scheduler
    config = {"timestep_spacing": arguments.pop("spacing")} if "spacing" in arguments else {}
    if arguments.pop("runge_kutta", False):
        config["skip_prk_steps"] = False
    name = arguments.pop("scheduler", None)
    if name is not None:
        pipe.scheduler = getattr(package, name).from_config(pipe.scheduler.config, **config)
    try:
        result = pipe(**arguments)
    finally:
        pipe.scheduler = published
    return result[0] if arguments.get("return_dict") is False else result.images


def as_array(images):
    if isinstance(images, list):
        return np.stack([np.asarray(image) for image in images]).astype(np.float64) / 255
    return images.numpy() if isinstance(images, torch.Tensor) else images


@pytest.mark.parametrize("case", CASES)
def test_same_picture(pair, small_photo, case):
    mine, theirs = (
        call(package, pipe, small_photo, case) for package, pipe in zip((depthdiff, diffusers), pair, strict=True)
    )
    assert type(mine) is type(theirs)
    ours, reference = as_array(mine), as_array(theirs)
    assert ours.shape == reference.shape
    assert reference.std() > 0.01, "a flat picture proves nothing"
    limit = 1.01 / 255 if isinstance(mine, list) else TOLERANCE * max(1.0, np.abs(reference).max())
    assert np.abs(ours - reference).max() <= limit


def test_encode_prompt(pair):
    """Observed: at most 1e-6."""
    results = []
    for pipe in pair:
        results.append(pipe.encode_prompt(["two tigers", "a cup"], "cpu", 2, True, ["blurry", "dark"], clip_skip=1))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert pair[0].encode_prompt("two tigers", "cpu", 1, False)[1] is None


def test_callbacks_see_and_change_the_same(pair, small_photo):
    """A callback that changes latents, depth and prompt, and turns guidance off half way, as diffusers' guides do."""
    pictures, traces = [], []
    for pipe in pair:
        trace = []

        def at_step(pipeline, index, timestep, tensors, trace=trace):
            trace.append((index, int(timestep), {name: tuple(x.shape) for name, x in tensors.items()}))
            changed = {"latents": tensors["latents"] * 0.99}
            if index == 2:
                pipeline._guidance_scale = 0.0
                changed["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
                changed["depth_mask"] = tensors["depth_mask"].chunk(2)[-1]
            return changed

        picture = pipe(
            "two tigers",
            small_photo,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            callback_on_step_end=at_step,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "depth_mask"],
        ).images
        pictures.append(picture)
        traces.append(trace)
    assert traces[0] == traces[1]
    assert np.abs(pictures[0] - pictures[1]).max() <= TOLERANCE


@pytest.mark.parametrize("in_place", [True, False])
def test_a_callback_may_give_each_half_of_guidance_its_depth(pair, small_photo, in_place):
    """Observed: at most 4e-6; the change of depth moves pixels by up to 0.1."""

    def at_step(pipeline, index, timestep, tensors):
        depth = tensors["depth_mask"] if in_place else tensors["depth_mask"].clone()
        assert len(depth) == 2
        if index == 1:
            depth[:1].mul_(-1)
        return {} if in_place else {"depth_mask": depth}

    options = {"num_inference_steps": STEPS, "strength": 1.0, "output_type": "np"}
    pictures = [
        pipe(
            "two tigers",
            small_photo,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=at_step,
            callback_on_step_end_tensor_inputs=["depth_mask"],
            **options,
        ).images
        for pipe in pair
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= TOLERANCE
    plain = pair[0]("two tigers", small_photo, generator=torch.Generator().manual_seed(0), **options).images
    assert np.abs(pictures[0] - plain).max() > 10 * TOLERANCE


def test_legacy_callback(pair, small_photo):
    calls = []
    for pipe in pair:
        seen = []
        pipe(
            "two tigers",
            small_photo,
            num_inference_steps=STEPS,
            callback=lambda i, t, latents, seen=seen: seen.append((i, int(t), tuple(latents.shape))),
            callback_steps=2,
        )
        calls.append(seen)
    assert calls[0] == calls[1]
    assert len(calls[0]) > 1


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_folders_go_back_and_forth(writer, pair, small_photo, tmp_path):
    """A folder written by either is read by either, with identical weights and the same picture."""
    pair[0 if writer == "ours" else 1].save_pretrained(tmp_path)
    mine = depthdiff.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path)
    reference = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path)
    for pipe in (mine, reference):
        pipe.set_progress_bar_config(disable=True)
    ours = call(depthdiff, mine, small_photo, "defaults")
    theirs = call(diffusers, reference, small_photo, "defaults")
    assert np.abs(ours - theirs).max() <= TOLERANCE
    assert np.abs(ours - call(depthdiff, pair[0], small_photo, "defaults")).max() == 0
    for key, value in pair[0].unet.state_dict().items():
        assert torch.equal(mine.unet.state_dict()[key], value), key
