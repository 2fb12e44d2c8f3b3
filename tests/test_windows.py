"""Windows: what MultiDiffusion's loop gives, one window at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline, UNet2DConditionModel
from depthdiff.registry import make_scheduler
from depthdiff.windows import over_windows, starts, tiled

ROOT = Path(__file__).parents[1]
WIDE = np.linspace(0, 1, 64 * 160, dtype=np.float32).reshape(64, 160)


def prepare(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 4, "generator": generator, **options}
    return pipe.prepare("two tigers", depth_map=WIDE, **call)


def run_all(pipe, run):
    for _ in pipe.denoise(run):
        pass
    return run.latents


@pytest.mark.parametrize("eta", [0.0])
@pytest.mark.parametrize("windows", [(64, 32), (64, 24), (32, 32), (40, 16)])
def test_multidiffusion(windows, eta, pipe):
    """Against the paper's loop: latents after a DDIM step, averaged over the windows. Observed: 2e-6."""
    pipe.scheduler = DDIMScheduler.from_config({**pipe.scheduler.config, "clip_sample": False})
    run = prepare(pipe, windows=windows)
    latents, (size, stride), cell = run.latents.clone(), windows, 8
    found = run_all(pipe, run)
    lefts = [*range(0, 160 - size, stride), 160 - size]
    tops = [*range(0, max(64 - size, 0), stride), max(64 - size, 0)]
    for timestep in run.timesteps:  # the loop of the paper
        total, count = torch.zeros_like(latents), torch.zeros_like(latents)
        for top in tops:
            for left in lefts:
                part = (..., slice(top // cell, (top + size) // cell), slice(left // cell, (left + size) // cell))
                x = torch.cat([torch.cat([latents[part]] * 2), run.depth[part]], dim=1)
                with torch.no_grad():
                    noise = pipe.unet(x, timestep, encoder_hidden_states=run.prompt_embeds).sample
                uncond, cond = noise.chunk(2)
                guided = uncond + 7.5 * (cond - uncond)
                total[part] += run.scheduler.step(guided, timestep, latents[part]).prev_sample
                count[part] += 1
        latents = total / count
    assert (found - latents).abs().max() < 1e-4 * latents.abs().max()


@pytest.mark.parametrize("name", ["pndm", "euler_a", "dpmpp_2m", "heun", "unipc"])
def test_one_window_is_the_whole(name, pipe):
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config, "name")
    whole, one = (run_all(pipe, prepare(pipe, windows=windows)) for windows in (None, (160, 8)))
    assert (whole - one).abs().max() < 1e-5 * whole.abs().max()  # observed: 0


@pytest.mark.parametrize("length, size, stride", [(20, 8, 4), (21, 8, 4), (8, 8, 3), (5, 8, 8), (64, 9, 9), (30, 7, 1)])
def test_windows_cover_everything(length, size, stride):
    covered = np.zeros(length, int)
    for start in starts(length, size, stride):
        assert 0 <= start <= max(length - size, 0)
        covered[start : start + size] += 1
    assert covered.min() >= 1


def test_a_mean_of_what_each_window_says():
    """A network that returns which window it saw: cells of two windows have their mean."""
    calls = []

    def number(x):
        calls.append(x.shape)
        return torch.full_like(x, float(len(calls)))

    found = over_windows(number, torch.zeros(1, 2, 4, 12), (8, 4))
    assert torch.equal(found[0, 0, 0], torch.tensor([1.0] * 4 + [1.5] * 4 + [2.0] * 4))
    assert calls == [(1, 2, 4, 8)] * 2


def test_the_unet_sees_windows_alone(pipe, monkeypatch):
    """And the autoencoder tiles as large."""
    seen, forward = set(), UNet2DConditionModel.forward

    def watch(self, sample, *args, **kwargs):
        seen.add(tuple(sample.shape[2:]))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watch)
    decoded = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(tuple(args[0].shape[2:])))
    run = prepare(pipe, windows=(64, 32))
    run_all(pipe, run)
    assert seen == {(8, 8)}
    pictures = pipe.decode(run)
    assert pictures[0].size == (160, 64) and max(max(shape) for shape in decoded) == 8
    assert not pipe.vae.use_tiling


def test_tiles_are_those_of_the_autoencoder(pipe):
    """Observed: 0."""
    latents = torch.randn(1, 4, 8, 20)
    found = tiled(pipe.vae, 8, 8).decode(latents)[0]
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 8
    assert torch.equal(found, pipe.vae.decode(latents)[0])


@pytest.mark.parametrize(
    "windows", [(8, 8), (16, 16), (24, 8), (40, 24), (48, 16), (72, 40), (100 // 8 * 8, 48), (512, 64)]
)
def test_pictures_have_their_size(windows, pipe, small_photo):
    """Whatever the tiles of the autoencoder come to, and alike from a photo, a depth map and a masked photo."""
    for given, size in (({"depth_map": WIDE}, (160, 64)), ({"image": small_photo}, (120, 88))):
        picture = pipe("a cup", num_inference_steps=1, windows=windows, **given).images[0]
        assert picture.size == size
    mask = np.ones((88, 120), np.float32)
    assert pipe("a cup", small_photo, num_inference_steps=1, windows=windows, mask_image=mask).images[0].size == (
        120,
        88,
    )


def test_tiles_show_no_seam():
    """With the bundled autoencoder: the change across the tiles' borders is that of the picture decoded as a whole.

    Observed: 0.97 of it, and 0.034 between both pictures, whose pixels are in [-1, 1].
    """
    vae = StableDiffusionDepth2ImgPipeline.from_pretrained("mini").vae
    with Image.open(ROOT / "docs" / "mini.png") as sheet:
        picture = torch.from_numpy(np.array(sheet.convert("RGB").crop((0, 0, 512, 128)), np.float32) / 127.5 - 1)
    with torch.no_grad():
        latents = vae.encode(picture.movedim(2, 0)[None]).latent_dist.mean
        whole, tiles = vae.decode(latents)[0], tiled(vae, 24, 4).decode(latents)[0]
    borders = torch.arange(72, 512, 72)
    across = [(x[..., borders] - x[..., borders - 1]).abs().mean() for x in (tiles, whole)]
    assert across[0] < 1.1 * across[1]
    assert (tiles - whole).square().mean().sqrt() < 0.06


def test_with_a_photo_and_a_mask(pipe, small_photo):
    mask = np.zeros((88, 120), np.float32)
    mask[:, 60:] = 1
    call = {"windows": (64, 32), "mask_image": mask, "mask_blur": 0, "num_inference_steps": 3, "hires": 1.5}
    picture = pipe("a cup", small_photo, **call).images[0]
    assert picture.size == (176, 128)
