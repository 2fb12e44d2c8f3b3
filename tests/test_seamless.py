"""Seamless pictures: the networks commute with rolling, and nothing of them changes."""

import threading

import numpy as np
import pytest
import torch

from depthdiff import StableDiffusionDepth2ImgPipeline
from depthdiff.seamless import seamless
from tests.test_guidance import TWO


def rolled(x, axes, count):
    for axis, dim in (("y", -2), ("x", -1)):
        x = x.roll(count, dim) if axis in axes else x
    return x


def unet_of(pipe, axes, x):
    embeds = torch.randn(len(x), 77, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    return seamless(pipe.unet, axes)(x, torch.tensor(500), encoder_hidden_states=embeds)[0]


@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_networks_commute_with_rolling(axes, pipe):
    """Attention and normalisation have no places; convolutions that wrap around neither. Observed: 1e-5 relative.

    Rolled by whole cells of the coarsest level; a plain network differs by 1e-2 and more.
    """
    torch.manual_seed(0)
    latents, pixels = torch.randn(2, 5, 24, 16), torch.randn(2, 3, 48, 64)
    works = {
        "unet": (lambda x, axes: unet_of(pipe, axes, x), latents, 8, 8),
        "encode": (lambda x, axes: seamless(pipe.vae, axes).encode(x).latent_dist.mean, pixels, 16, 2),
        "decode": (lambda x, axes: seamless(pipe.vae, axes).decode(x)[0], latents[:, :4], 3, 24),
    }
    with torch.no_grad():
        for name, (work, x, count, moved) in works.items():
            expected = rolled(work(x, axes), axes, moved)
            scale = expected.abs().max()
            assert (work(rolled(x, axes, count), axes) - expected).abs().max() < 1e-4 * scale, name
            plain = (work(rolled(x, axes, count), "") - rolled(work(x, ""), axes, moved)).abs().max()
            assert plain > 1e-3 * scale, name
            if len(axes) == 1:  # along the other one there is a border as before
                other = "xy".replace(axes, "")
                assert (work(rolled(x, other, count), axes) - rolled(work(x, axes), other, moved)).abs().max() > (
                    1e-3 * scale
                )


def test_networks_of_diffusers(pipe, tiny_folder):
    """They wrap around as ours. Observed: 1e-6."""
    diffusers = pytest.importorskip("diffusers")
    ours = StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        for kind, name, shape in (("UNet2DConditionModel", "unet", (1, 5, 16, 24)), ("AutoencoderKL", "vae", None)):
            theirs = getattr(diffusers, kind).from_pretrained(tiny_folder, subfolder=name)
            if shape:
                options = torch.tensor(3), torch.randn(1, 77, ours.text_encoder.config.hidden_size)
                x = torch.randn(shape)
                found, expected = (seamless(net, "xy")(x, *options)[0] for net in (theirs, ours.unet))
            else:
                x = torch.randn(1, 3, 32, 48)
                found, expected = (seamless(net, "xy")(x)[0] for net in (theirs, ours.vae))
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def paint(pipe, photo, **options):
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 3, "output_type": "np", "generator": generator, **options}
    return pipe("a cup", photo, **call).images


@pytest.mark.parametrize("fast", [True, False])
def test_it_is_off_afterwards(fast, pipe, small_photo):
    pipe = StableDiffusionDepth2ImgPipeline(**pipe.components, fast=fast)
    pipe.set_progress_bar_config(disable=True)
    before = paint(pipe, small_photo)
    wrapped = [paint(pipe, small_photo, seamless=axes) for axes in (True, "x", "y")]
    assert np.array_equal(paint(pipe, small_photo), before)
    assert all(np.abs(one - before).max() > 1e-3 for one in wrapped)
    assert np.array_equal(paint(pipe, small_photo, seamless=False), before)
    assert not any("_conv_forward" in vars(module) for module in pipe.unet.modules())


def test_threads_do_not_see_each_other(pipe, small_photo):
    """Two at a time, one seamless and one not, each with the picture that it gives alone."""
    ways = [False, True, "x", False, "y"]
    alone = [paint(pipe, small_photo, seamless=way) for way in ways]
    found = {}
    works = [
        threading.Thread(target=lambda i=i: found.update({i: paint(pipe, small_photo, seamless=ways[i])}))
        for i in range(len(ways))
    ]
    for work in works:
        work.start()
    for work in works:
        work.join()
    assert all(np.array_equal(found[i], alone[i]) for i in range(len(ways)))


def test_with_everything_else(pipe, small_photo):
    """Beside what else makes a UNet of its own for a call: the approximations and an adapter's scale."""
    more = {"deep_cache": 2, "token_merging": 0.5, "num_images_per_prompt": 2, "prompt": None}
    more.pop("prompt")
    first, second = (paint(pipe, small_photo, seamless=True, **more) for _ in range(2))
    assert np.array_equal(first, second)


def border(picture, axis):
    """Compare the step across the border with the steps inside: mean over a line, and all of those inside."""
    lines = np.moveaxis(picture, axis, 0)
    steps = np.abs(np.diff(lines, axis=0)).mean(axis=(1, 2))
    return np.abs(lines[0] - lines[-1]).mean(), steps


def test_no_seam_in_a_picture(pipe):
    """With the bundled model: across the border of a wrapped picture the change is one of those inside.

    Observed: 0.6 to 1.0 of the largest inside; without wrapping 2 to 4 times.
    """
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained("mini")
    pipe.set_progress_bar_config(disable=True)
    depth = np.zeros((128, 128), np.float32)
    call = {"num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "np", "depth_map": depth}
    for seed in range(2):
        wrapped = pipe(TWO[1], generator=torch.Generator().manual_seed(seed), seamless=True, **call).images[0]
        for axis in (0, 1):
            across, inside = border(wrapped, axis)
            assert across <= inside.max() * 1.05
