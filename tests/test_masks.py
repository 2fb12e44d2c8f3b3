"""A mask: what it keeps is the photo, and what it repaints is at the level of every step."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from depthdiff.config import FrozenDict
from depthdiff.masks import feather, latent_mask, read_mask
from depthdiff.registry import make_scheduler
from depthdiff.schedulers.names import SHORT_NAMES

BOX = 40, 24, 80, 64  # left, top, right, bottom of what is repainted, of 120x88
BLUR = 2
RANDOM = ("ddpm", "euler_a", "dpm2_a", "dpmpp_2m_sde", "dpmpp_sde", "lcm", "tcd", "sa_solver")
"""Solvers that add noise of their own."""


@pytest.fixture
def mask():
    image = Image.new("L", (120, 88))
    image.paste(255, BOX)
    return image


@pytest.fixture
def far():
    """Where a pixel is beyond the reach of the feather."""
    left, top, right, bottom = BOX
    away = np.ones((88, 120), bool)
    away[top - 3 * BLUR : bottom + 3 * BLUR, left - 3 * BLUR : right + 3 * BLUR] = False
    return away


def paint(pipe, photo, **options):
    options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), **options}
    return pipe("two tigers", photo, **options).images


def choose(pipe, name):
    config = {**pipe.scheduler.config, "clip_sample": False}
    pipe.scheduler = make_scheduler(name, config, "name")


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("name", SHORT_NAMES)
def test_the_kept_part_is_the_photo(name, strength, pipe, small_photo, mask, far):
    """To the byte, for both pictures of a batch; within the mask hardly anything is as it was."""
    choose(pipe, name)
    options = {"mask_image": mask, "mask_blur": BLUR, "strength": strength, "num_images_per_prompt": 2}
    for picture in paint(pipe, small_photo, **options):
        change = np.abs(np.asarray(picture).astype(int) - np.asarray(small_photo))
        assert change[far].max() == 0
        assert change[24:64, 40:80].mean() > 30


@pytest.mark.parametrize("name", ["pndm", "euler", "dpmpp_2m"])
def test_a_white_mask_changes_nothing(name, pipe, small_photo):
    choose(pipe, name)
    for options in ({}, {"strength": 1.0}, {"strength": 0.3}, {"num_images_per_prompt": 2}, {"strength": 0.0}):
        plain = paint(pipe, small_photo, output_type="np", **options)
        white = Image.new("1", (11, 7), 1)
        assert np.array_equal(paint(pipe, small_photo, output_type="np", mask_image=white, **options), plain)


class TrueNoise(nn.Module):
    """A UNet that knows the noise."""

    def __init__(self, unet, noise):
        super().__init__()
        self.weight, self.noise = nn.Parameter(torch.zeros(1)), noise
        self.config = FrozenDict(in_channels=5, cross_attention_dim=unet.config.cross_attention_dim)

    def forward(self, sample, timestep, **options):
        return (self.noise.repeat(len(sample) // len(self.noise), 1, 1, 1),)


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("name", [name for name in SHORT_NAMES if name not in RANDOM])
def test_the_kept_latents_have_the_level_of_each_step(name, strength, pipe, small_photo, mask):
    """Where the noise is known, every solver stays on the straight path between it and the clean latents.

    So putting back the kept latents changes nothing, if they are at the right level. Observed: 3e-6 of the largest
    latent; with the level of the step before, 3e-2 and more.
    """
    choose(pipe, name)
    if name in ("pndm", "lms") and strength < 1:
        pytest.skip("as in diffusers, these take a wrong first step below strength 1")
    options = {"strength": strength, "num_inference_steps": 10, "generator": torch.Generator().manual_seed(0)}
    run = pipe.prepare("two tigers", small_photo, mask_image=mask, **options)
    kept, run.kept = run.kept, None
    unet, pipe.unet = pipe.unet, TrueNoise(pipe.unet, kept.noise)
    steps = list(pipe.denoise(run))
    assert len(steps) == len(run) > 2
    for step in steps[:-1]:
        level = run.add_noise(kept.clean, kept.noise, step.index + 1)
        assert (step.latents - level).abs().max() < 2e-5 * level.abs().max()
    pipe.unet = unet


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_a_loop_of_one_s_own_does_the_same(name, pipe, small_photo, mask):
    """As published code blends (TEXTure, blended latent diffusion): noised latents put back after each step."""
    choose(pipe, name)
    options = {"strength": 0.8, "num_inference_steps": 4}
    generator = torch.Generator().manual_seed(3)
    masked = pipe.prepare("two tigers", small_photo, mask_image=mask, generator=generator, **options)
    kept, state = masked.kept, generator.get_state()
    for _ in pipe.denoise(masked):
        pass
    run = pipe.prepare("two tigers", small_photo, generator=generator.manual_seed(3), **options)
    generator.set_state(state)
    where = torch.nn.functional.max_pool2d(torch.from_numpy(np.array(mask, np.float32) / 255)[None, None], 8)
    for step in pipe.denoise(run):
        known = run.add_noise(kept.clean, kept.noise, step.index + 1)
        step.latents = where * step.latents + (1 - where) * known
    assert (run.latents - masked.latents).abs().max() < 1e-5  # observed: 0


def test_masks_of_a_batch_are_paired(pipe, small_photo, mask):
    """Each picture has the mask of its place."""
    left = Image.new("L", (120, 88))
    left.paste(255, (0, 0, 60, 88))
    right = Image.eval(left, lambda value: 255 - value)
    first, second = paint(pipe, [small_photo] * 2, mask_image=[left, right], mask_blur=0)
    photo = np.asarray(small_photo)
    assert np.array_equal(np.asarray(first)[:, 60:], photo[:, 60:])
    assert np.array_equal(np.asarray(second)[:, :60], photo[:, :60])
    assert not np.array_equal(np.asarray(first)[:, :60], photo[:, :60])


def test_soft_edges_blend(pipe, small_photo):
    """A pixel that is half white is half the photo."""
    soft = np.full((88, 120), 0.5, np.float32)
    soft[:, 60:] = 0.75
    hard = paint(pipe, small_photo, mask_image=np.ones((88, 120), bool), output_type="np")[0]
    blended = paint(pipe, small_photo, mask_image=soft, mask_blur=0, output_type="np")[0]
    expected = soft[..., None] * hard + (1 - soft[..., None]) * np.asarray(small_photo, np.float32) / 255
    whole = (hard > 0) & (hard < 1)  # the others were clipped
    assert whole.mean() > 0.5 and np.abs(blended - expected)[whole].max() < 1e-5  # observed: 6e-8


def test_content_from_noise_forgets_the_photo(pipe, small_photo, mask):
    """At a low strength the first latents show the photo, unless they start from noise."""
    options = {"strength": 0.3, "num_inference_steps": 10, "mask_image": mask}
    run = pipe.prepare("two tigers", small_photo, generator=torch.Generator().manual_seed(0), **options)
    other = pipe.prepare(
        "two tigers", small_photo, mask_content="noise", generator=torch.Generator().manual_seed(0), **options
    )
    inside = run.kept.mask.expand(1, 4, -1, -1) > 0
    signal = run.kept.clean * run.scheduler.alphas_cumprod[run.timesteps[0]].sqrt()
    noise = run.kept.noise * (1 - run.scheduler.alphas_cumprod[run.timesteps[0]]).sqrt()
    assert (run.latents - signal - noise).abs().max() < 1e-5  # observed: 1e-7
    content = ((other.latents - noise) / run.scheduler.alphas_cumprod[run.timesteps[0]].sqrt())[inside]
    assert abs(content.mean()) < 0.2 and 0.8 < content.std() < 1.2  # of 120 numbers; of the photo: others
    assert abs(torch.corrcoef(torch.stack([content, run.kept.clean[inside]]))[0, 1]) < 0.3
    assert torch.equal(run.latents[~inside], other.latents[~inside])


FORMS = {
    "L": lambda m: m,
    "1": lambda m: m.convert("1"),
    "RGB": lambda m: m.convert("RGB"),
    "RGBA": lambda m: m.convert("RGBA"),
    "P": lambda m: m.convert("P"),
    "16 bit": lambda m: Image.fromarray(np.asarray(m).astype(np.uint16) * 257),
    "F": lambda m: Image.fromarray(np.asarray(m, np.float32) / 255),
    "bool": lambda m: np.asarray(m) > 0,
    "uint8 (H, W, 1)": lambda m: np.asarray(m)[..., None],
    "uint16": lambda m: np.asarray(m).astype(np.uint16) * 257,
    "float64": lambda m: np.asarray(m) / 255.0,
    "tensor (1, 1, H, W)": lambda m: torch.from_numpy(np.array(m) / 255.0)[None, None],
    "half": lambda m: torch.from_numpy(np.array(m) / 255.0).half(),
    "list": lambda m: [m],
    "half as large": lambda m: m.resize((60, 44), Image.Resampling.NEAREST),
    "twice as large": lambda m: m.resize((240, 176), Image.Resampling.NEAREST),
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_every_form(form, pipe, small_photo, mask):
    run = pipe.prepare("a cup", small_photo, mask_image=FORMS[form](mask), mask_blur=0)
    share = torch.zeros(1, 1, 88, 120)
    share[:, :, BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1
    assert (run.kept.share - share).abs().max() < (0.5 if "large" in form else 1e-6)  # resampling softens the edge
    assert torch.equal(run.kept.mask, share[:, :, ::8, ::8])


def test_a_thin_line_is_repainted():
    """A latent counts as soon as one of its pixels is at least half white."""
    line = torch.zeros(1, 1, 64, 48)
    line[:, :, 20] = 0.5
    assert latent_mask(line, 8)[0, 0, 2].eq(1).all() and latent_mask(line, 8).sum() == 6


@pytest.mark.parametrize("blur", [0.5, 2.0])
def test_the_feather_is_a_gaussian(blur):
    """Against SciPy's filter with the same reach. Observed: 1e-7. Beyond the reach it is exactly 0 and 1."""
    ndimage = pytest.importorskip("scipy.ndimage")
    sharp = np.zeros((50, 70), np.float32)
    sharp[20:33, 15:50] = 1
    reach = int(np.floor(3 * blur))
    expected = ndimage.gaussian_filter(sharp.astype(np.float64), blur, mode="nearest", radius=reach)
    found = feather(torch.from_numpy(sharp)[None, None], blur)[0, 0].numpy()
    assert np.abs(found - expected).max() < 1e-6
    assert found[: 20 - reach].max() == 0 and found[20 + reach : 33 - reach, 15 + reach : 50 - reach].min() == 1


WRONG = {
    "text": ("mask.png", TypeError, "mask_image must be PIL images, arrays or tensors"),
    "numbers beyond white": (np.full((88, 120), 255.0), ValueError, r"mask_image must be in \[0, 1\], got 255"),
    "integers of no range": (np.ones((88, 120), np.int64), TypeError, "mask_image must be bool, uint8.*got int64"),
    "NaN": (np.full((88, 120), np.nan), ValueError, "mask_image must be finite"),
    "black": (Image.new("L", (120, 88)), ValueError, "mask_image must be white where"),
    "three of them": ([Image.new("L", (120, 88), 255)] * 3, ValueError, "Cannot duplicate `image`|`prompt`"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_masks(wrong, pipe, small_photo):
    mask, error, text = WRONG[wrong]
    pipe.text_encoder.forward = None  # nothing may start
    with pytest.raises(error, match=text):
        paint(pipe, [small_photo] * 2, mask_image=mask)


def test_read_mask_keeps_its_numbers():
    soft = torch.rand(2, 5, 7)
    assert torch.equal(read_mask(soft), soft)


def test_each_mask_of_a_list_has_its_own_white(mask):
    both = read_mask([np.asarray(mask).astype(np.uint16) * 257, np.asarray(mask)])
    assert torch.equal(both[0], both[1]) and both.max() == 1


class Painter(StableDiffusionDepth2ImgPipeline):
    """A subclass with diffusers' own arguments."""

    def prepare_latents(self, image, timestep, batch_size, num_images_per_prompt, dtype, device, generator=None):
        return super().prepare_latents(image, timestep, batch_size, num_images_per_prompt, dtype, device, generator)


def test_an_override_that_knows_no_mask(pipe, small_photo, mask):
    painter = Painter(**pipe.components)
    painter.set_progress_bar_config(disable=True)
    assert np.array_equal(paint(painter, small_photo, output_type="np"), paint(pipe, small_photo, output_type="np"))
    for options in ({"mask_image": mask}, {"seamless": True}, {"windows": (64, 32)}):
        with pytest.raises(
            ValueError, match="need an argument vae of prepare_latents, which Painter overrides without"
        ):
            paint(painter, small_photo, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_photo(dtype, pipe, small_photo, mask, far):
    pipe.to(dtype)
    picture = paint(pipe, small_photo, mask_image=mask, mask_blur=BLUR)[0]
    assert np.array_equal(np.asarray(picture)[far], np.asarray(small_photo)[far])


def test_another_package_s_scheduler(pipe, small_photo, mask, far):
    diffusers = pytest.importorskip("diffusers")
    ours = paint(pipe, small_photo, mask_image=mask, output_type="np")
    pipe.scheduler = diffusers.PNDMScheduler.from_config(dict(pipe.scheduler.config))
    assert np.abs(paint(pipe, small_photo, mask_image=mask, output_type="np") - ours).max() < 1e-4  # observed: 1e-6
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
