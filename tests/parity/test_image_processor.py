"""The depth estimator's input beside transformers' DPT processor on Pillow: equal bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from depthdiff.image_processor import DPTImageProcessor

SD2 = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ensure_multiple_of": 1,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "DPTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "keep_aspect_ratio": False,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}
SMALL = {"size": {"height": 48, "width": 72}}
CONFIGS = {
    "stable diffusion 2": SD2,
    "defaults": {},
    "a number as size": {"size": 56, "feature_extractor_type": "DPTFeatureExtractor"},
    "aspect ratio": {**SMALL, "keep_aspect_ratio": True},
    "aspect ratio and multiple": {**SMALL, "keep_aspect_ratio": True, "ensure_multiple_of": 14},
    "multiple": {**SMALL, "ensure_multiple_of": 32, "resample": 1},
    "statistics": {**SMALL, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 0},
    "one statistic": {**SMALL, "image_mean": 0.4, "image_std": 0.3},
    "no resize": {"do_resize": False},
    "no rescale": {**SMALL, "do_rescale": False},
    "no normalisation": {**SMALL, "do_normalize": False, "rescale_factor": 1 / 127.5},
}
SIZES = [(70, 101), (101, 33), (48, 72), (400, 600)]


def both(config):
    theirs = {key: value for key, value in config.items() if not key.endswith("_type")}
    return DPTImageProcessor.from_config(config), DPTImageProcessorPil(**theirs)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("height, width", SIZES)
def test_numbers_equal(name, height, width):
    ours, reference = both(CONFIGS[name])
    arrays = np.stack([picture(height, width, seed) for seed in range(2)])
    first = np.moveaxis(arrays, -1, 1)
    pil = [Image.fromarray(array) for array in arrays]
    for images in (pil[0], pil, arrays[0], arrays, list(arrays), first[0], first, torch.from_numpy(first)):
        expected = reference(images, return_tensors="pt").pixel_values
        pixels = ours(images, return_tensors="pt").pixel_values
        assert pixels.dtype == expected.dtype == torch.float32
        assert torch.equal(pixels, expected)
        assert np.array_equal(ours(images, return_tensors="np")["pixel_values"], expected.numpy())


def test_images_of_different_sizes():
    ours, reference = both(SD2)
    images = [Image.fromarray(picture(height, width)) for height, width in SIZES]
    assert torch.equal(ours(images).pixel_values, reference(images, return_tensors="pt").pixel_values)


@pytest.mark.parametrize("name", ["stable diffusion 2", "aspect ratio and multiple"])
def test_float_tensors_are_the_image_they_were_made_of(name):
    ours, reference = both(CONFIGS[name])
    array = picture(70, 101)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None]
    expected = reference(Image.fromarray(array), return_tensors="pt").pixel_values
    for images in (tensor / 255, tensor.double() / 255, tensor / 127.5 - 1, array / 255):
        assert torch.equal(ours(images).pixel_values, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_files_load_on_both_sides(name, tmp_path):
    ours, reference = both(CONFIGS[name])
    image = Image.fromarray(picture(70, 101))
    expected = reference(image, return_tensors="pt").pixel_values
    ours.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        loaded = DPTImageProcessorPil.from_pretrained(folder)
        assert torch.equal(loaded(image, return_tensors="pt").pixel_values, expected)
        assert torch.equal(DPTImageProcessor.from_pretrained(folder)(image).pixel_values, expected)
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "ours")) is DPTImageProcessorPil


def test_depth_estimation_equal():
    ours, reference = both(SD2)
    outputs = SimpleNamespace(predicted_depth=torch.rand(3, 24, 36, generator=torch.Generator().manual_seed(0)))
    sizes = [(70, 101), (24, 36), (12, 9)]
    for targets in (None, sizes, torch.tensor(sizes)):
        theirs = None if targets is None else sizes
        expected = reference.post_process_depth_estimation(outputs, theirs)
        depths = ours.post_process_depth_estimation(outputs, targets)
        for a, b in zip(depths, expected, strict=True):
            assert torch.equal(a["predicted_depth"], b["predicted_depth"])
