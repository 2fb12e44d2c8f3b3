"""Depth without a photo, and the start from noise."""

import numpy as np
import pytest
import torch

from depthdiff.registry import make_scheduler

DEPTH = np.linspace(0, 1, 64 * 96, dtype=np.float32).reshape(64, 96) ** 2


def paint(pipe, *args, **options):
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 4, "output_type": "np", "generator": generator, **options}
    return pipe("two tigers", *args, **call).images


@pytest.mark.parametrize("name", ["pndm", "ddim", "dpmpp_2m"])
def test_diffusers_fed_with_noise(name, tiny_folder):
    """diffusers cannot start without an image; with its first latents replaced by noise, it paints the same.

    Observed: 2e-5.
    """
    both = pytest.importorskip("tests.parity.both")
    ours, theirs = both.load_both(tiny_folder)
    ours.scheduler = make_scheduler(name, {**ours.scheduler.config, "clip_sample": False}, "name")
    kind = getattr(pytest.importorskip("diffusers"), type(ours.scheduler).__name__)
    theirs.scheduler = kind.from_config(dict(ours.scheduler.config))
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    theirs.prepare_latents = lambda *args, **kwargs: noise
    call = {"num_inference_steps": 4, "strength": 1.0, "output_type": "np"}
    black, depth = torch.zeros(2, 3, 64, 96), torch.from_numpy(DEPTH).expand(2, -1, -1)
    expected = theirs(["two tigers"] * 2, image=black, depth_map=depth, **call).images
    found = paint(ours, depth_map=DEPTH, num_images_per_prompt=2)
    assert np.abs(found - expected).max() < 1 / 255


@pytest.mark.parametrize("name", ["pndm", "ddim", "euler", "euler_a", "heun", "lms", "dpmpp_sde"])
def test_a_loop_of_one_s_own(name, pipe):
    """Pure noise of the scheduler's own deviation, then its steps. Observed: 2e-6."""
    pipe.scheduler = make_scheduler(name, {**pipe.scheduler.config, "clip_sample": False}, "name")
    generator = torch.Generator().manual_seed(0)
    found = paint(pipe, depth_map=DEPTH, generator=generator, output_type="latent")
    generator.manual_seed(0)
    run = pipe.prepare("two tigers", depth_map=DEPTH, num_inference_steps=4, generator=torch.Generator())
    scheduler = run.scheduler
    latents = torch.randn(1, 4, 8, 12, generator=generator) * scheduler.init_noise_sigma
    more = {"generator": generator} if name in ("euler_a", "dpmpp_sde", "euler") else {}
    for timestep in scheduler.timesteps:
        x = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        with torch.no_grad():
            x = torch.cat([x, run.depth], dim=1)
            uncond, cond = pipe.unet(x, timestep, encoder_hidden_states=run.prompt_embeds).sample.chunk(2)
        latents = scheduler.step(uncond + 7.5 * (cond - uncond), timestep, latents, **more).prev_sample
    assert (found - latents).abs().max() < 1e-4 * latents.abs().max()


def test_sizes(pipe):
    sizes = [
        ({}, (64, 96)),
        ({"height": 32}, (32, 48)),
        ({"width": 48}, (32, 48)),
        ({"height": 96, "width": 64}, (96, 64)),
        ({"height": 48, "width": 48, "resize_mode": "pad"}, (48, 48)),
    ]
    for options, size in sizes:
        assert paint(pipe, depth_map=DEPTH, num_inference_steps=1, **options).shape[1:3] == size
    assert paint(pipe, depth_map=DEPTH[:61, :90], num_inference_steps=1).shape[1:3] == (56, 88)


def test_strength_does_not_count(pipe):
    default, low = (paint(pipe, depth_map=DEPTH, **more) for more in ({}, {"strength": 0.1}))
    assert np.array_equal(default, low)


def test_several_maps(pipe):
    """One picture for each, as each alone. Observed: 1e-6."""
    both = pipe("a cup", depth_map=[DEPTH, DEPTH[::-1].copy()], num_inference_steps=2, output_type="np",
                generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)]).images  # fmt: skip
    for i, depth in enumerate((DEPTH, DEPTH[::-1].copy())):
        alone = pipe("a cup", depth_map=depth, num_inference_steps=2, output_type="np",
                     generator=torch.Generator().manual_seed(i)).images  # fmt: skip
        assert np.abs(both[i] - alone[0]).max() < 1e-4


def test_no_colour_of_the_photo_is_left(pipe, small_photo):
    """From noise, two photos with one depth map give one picture; as in diffusers, from the image they do not."""
    depth = np.asarray(small_photo.convert("L"))
    other = small_photo.transpose(1)
    for start, same in (("noise", True), ("image", False)):
        first, second = (paint(pipe, photo, depth, strength=1.0, start=start) for photo in (small_photo, other))
        assert np.array_equal(first, second) is same


def test_a_pipeline_without_a_depth_net(pipe):
    pipe.depth_estimator = pipe.feature_extractor = None
    assert paint(pipe, depth_map=DEPTH, num_inference_steps=1).shape == (1, 64, 96, 3)


def test_neither_photo_nor_depth(pipe):
    with pytest.raises(ValueError, match="pass the image to start from, or a depth_map alone"):
        paint(pipe)
    with pytest.raises(ValueError, match="`depth_map` must be at least 8x8, got 4x96"):
        paint(pipe, depth_map=DEPTH[:4])
