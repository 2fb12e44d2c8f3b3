"""Height and width: the photo, its depth map and its mask are cropped, padded or stretched alike."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from depthdiff.sizes import Fit, wanted_size


def ramps(height, width):
    """An image whose red grows to the right and whose green grows downwards."""
    array = np.zeros((height, width, 3), np.float32)
    array[..., 0] = (np.arange(width) + 0.5) / width
    array[..., 1] = ((np.arange(height) + 0.5) / height)[:, None]
    return array


CASES = [((88, 120), (64, 64)), ((88, 120), (96, 48)), ((88, 120), (40, 120)), ((61, 47), (64, 96))]


@pytest.mark.parametrize("own, wanted", CASES)
@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_what_is_shown(own, wanted, mode):
    """Each pixel shows the place of the image that geometry says. Observed: 0.6 % of the image's side."""
    (h, w), (H, W) = wanted, own
    scale = {"crop": max(h / H, w / W), "pad": min(h / H, w / W)}.get(mode)
    scales = (h / H, w / W) if scale is None else (scale, scale)
    y, x = (((np.arange(n) + 0.5) - n / 2) / s / N + 0.5 for n, s, N in zip((h, w), scales, (H, W), strict=True))
    image = ramps(H, W)
    expected = np.stack(np.broadcast_arrays(x[None].clip(0, 1), y[:, None].clip(0, 1)), axis=-1)
    pil = Image.fromarray((image * 255).round().astype(np.uint8))
    for given in ([pil], torch.from_numpy(image).movedim(2, 0)[None]):
        fitted = Fit(own, wanted, mode).images(given)
        array = np.asarray(fitted[0], np.float32) / 255 if isinstance(fitted, list) else fitted[0].movedim(0, 2).numpy()
        assert array.shape == (h, w, 3)
        inner = slice(2, -2)  # resampling has no neighbours beyond the border
        error = np.abs(array[..., :2] - expected)[inner, inner].max()
        assert error < 0.02


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_depth_and_mask_go_with_the_photo(mode, pipe):
    """A photo that is its own depth map, at another resolution, and its own mask, stays so."""
    shape = np.linspace(0, 1, 120)[None].repeat(88, 0) ** 2
    photo = Image.fromarray((shape * 255).round().astype(np.uint8)).convert("RGB")
    large = np.asarray(photo.convert("L").resize((240, 176), Image.Resampling.BILINEAR), np.float32)
    options = {"height": 64, "width": 64, "resize_mode": mode, "mask_image": large / 255, "mask_blur": 0}
    run = pipe.prepare("a cup", photo, large, **options)
    grey = (run.kept.pixels[:, :1] + 1) / 2
    assert (run.kept.share - grey).abs().max() < 0.02  # observed: 0.008
    small = torch.nn.functional.interpolate(grey, size=(8, 8), mode="bicubic")
    small = 2 * (small - small.min()) / (small.max() - small.min()) - 1
    assert (run.depth[:1] - small).abs().max() < 0.06  # observed: 0.03, of 2


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("wanted", [(8, 512), (512, 8)])
def test_extreme_aspects(wanted, mode):
    """Something is left of every map, and nothing is padded beyond reason."""
    fitted = Fit((64, 64), wanted, mode).maps(torch.rand(1, 4, 4))
    assert min(fitted.shape) == 1 if mode == "crop" else min(fitted.shape[1:]) >= 4
    with pytest.raises(ValueError, match="resize_mode must be crop or stretch from 4000x4000 to 16384x8"):
        Fit((4000, 4000), (8, 16384), "pad").maps(torch.rand(1, 1, 1).expand(1, 4000, 4000))


def test_one_side_follows_from_the_other():
    assert wanted_size(64, None, (88, 120), 8) == (64, 88)
    assert wanted_size(None, 64, (88, 120), 8) == (48, 64)
    assert wanted_size(None, None, (89, 127), 8) == (88, 120)
    assert wanted_size(None, 8, (10, 1000), 8) == (8, 8)


def test_nothing_is_done_without_need(pipe, small_photo):
    """The own size as height and width gives the same picture as none."""
    call = {"num_inference_steps": 2, "output_type": "np"}
    first, second = (
        pipe("a cup", small_photo, generator=torch.Generator().manual_seed(0), **call, **size).images
        for size in ({}, {"height": 88, "width": 120})
    )
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    "mode, text",
    [
        ("crop", "120x88 to 64x64: cropped by left 16, right 16"),
        ("pad", "120x88 to 64x64: padded by top 16, bottom 16"),
        ("stretch", "120x88 to 64x64: stretched"),
    ],
)
def test_it_is_said(mode, text, pipe, small_photo, caplog):
    with caplog.at_level(logging.INFO, logger="depthdiff"):
        pipe.prepare("a cup", small_photo, height=64, width=64, resize_mode=mode)
    assert text in caplog.text
