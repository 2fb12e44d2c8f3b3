"""The depth estimator's input alone: configs that are refused, wrong calls, the rule of the sizes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from depthdiff.config import CheckpointError
from depthdiff.image_processor import DPTImageProcessor


def test_grey_stays_grey():
    processor = DPTImageProcessor.from_config({"size": {"height": 40, "width": 24}, "image_mean": 0.25})
    for image in (Image.new("L", (7, 9), 51), Image.new("I;16", (7, 9), 51 * 257), torch.full((3, 9, 7), 0.2)):
        pixels = processor(image).pixel_values
        assert pixels.shape == (1, 3, 40, 24)
        torch.testing.assert_close(pixels, torch.full_like(pixels, (0.2 - 0.25) / 0.5), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "config, size, expected",
    [
        ({"size": 384}, (100, 200), (384, 384)),
        ({"size": 384, "keep_aspect_ratio": True}, (192, 300), (246, 384)),  # 384/300 is nearer to 1 than 2
        ({"size": 384, "keep_aspect_ratio": True, "ensure_multiple_of": 32}, (480, 640), (384, 512)),
        ({"size": {"height": 70, "width": 100}, "ensure_multiple_of": 14}, (5, 5), (70, 98)),
    ],
)
def test_output_size(config, size, expected):
    assert DPTImageProcessor.from_config(config).output_size(*size) == expected


REFUSED = {
    "another processor": ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor'; implemented here"),
    "padding": ({"do_pad": True}, "do_pad is True"),
    "shortest edge": ({"size": {"shortest_edge": 384}}, "positive height and width"),
    "no height": ({"size": {"height": 0, "width": 3}}, "positive height and width"),
    "filter": ({"resample": 9}, "resample"),
    "multiple": ({"ensure_multiple_of": 0}, "ensure_multiple_of"),
    "statistics": ({"image_mean": [0.5, 0.5]}, "image_mean"),
    "type": ({"do_resize": "yes"}, "do_resize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configs(case, tmp_path):
    config, message = REFUSED[case]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        DPTImageProcessor.from_pretrained(tmp_path)


def test_damaged_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        DPTImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        DPTImageProcessor.from_pretrained(tmp_path)


def test_wrong_calls():
    processor = DPTImageProcessor()
    with pytest.raises(ValueError, match=r"return_tensors .* got 'tf'"):
        processor(Image.new("RGB", (8, 8)), return_tensors="tf")
    with pytest.raises(ValueError, match="images must hold at least one"):
        processor([])
    with pytest.raises(TypeError, match="images must be PIL"):
        processor(["photo.png"])
    with pytest.raises(ValueError, match="images must be in"):
        processor(np.full((8, 8, 3), 200.0))
    varied = DPTImageProcessor.from_config({"size": 64, "keep_aspect_ratio": True})
    with pytest.raises(ValueError, match="64x32, 64x64"):
        varied([Image.new("RGB", (64, 32)), Image.new("RGB", (64, 64))])
    with pytest.raises(ValueError, match="0x64"):
        varied(Image.new("RGB", (1, 640)))
    with pytest.raises(ValueError, match="2 pairs"):
        processor.post_process_depth_estimation(SimpleNamespace(predicted_depth=torch.zeros(2, 8, 8)), [(4, 4)])
