"""Depth estimators of transformers in our pipeline: the depth is that of calling them directly."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from random_checkpoint import GEOMETRIES, build_pipeline
from transformers import BeitConfig, DepthAnythingConfig, Dinov2Config, DPTConfig, ZoeDepthConfig
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.zoedepth import image_processing_pil_zoedepth as zoe_processing

import depthdiff
from depthdiff.depth_maps import read_disparity
from depthdiff.estimators import cut_padding

STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "reshape_hidden_states": False}
BACKBONE = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40}
NECK = {"neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 12}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def random_weights(net):
    """Those of a fresh net are so small that the depth is constant."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.2 if weight.ndim > 1 else 0.5))
    return net.eval()


def dpt():
    config = DPTConfig(
        is_hybrid=False, image_size=64, patch_size=16, backbone_out_indices=[0, 1, 2, 3], **BACKBONE, **NECK
    )
    return transformers.DPTForDepthEstimation(config), DPTImageProcessorPil(size={"height": 64, "width": 64})


def depth_anything():
    backbone = Dinov2Config(image_size=56, patch_size=14, apply_layernorm=True, **BACKBONE, **STAGES)
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=24, head_hidden_size=8, **NECK
    )
    size = {"height": 56, "width": 56}
    processor = DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14, **IMAGENET)
    return transformers.DepthAnythingForDepthEstimation(config), processor


def zoe_depth():
    config = ZoeDepthConfig(
        backbone_config=BeitConfig(image_size=64, patch_size=16, use_relative_position_bias=True, **BACKBONE, **STAGES),
        bottleneck_features=16,
        num_attractors=[4, 2, 2, 1],
        bin_embedding_dim=8,
        num_relative_features=8,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.5, "max_depth": 10.0}],
        **{**NECK, "fusion_hidden_size": 16},
    )
    processor = zoe_processing.ZoeDepthImageProcessorPil(size={"height": 64, "width": 96}, ensure_multiple_of=32)
    return transformers.ZoeDepthForDepthEstimation(config), processor


ESTIMATORS = {"DPT": dpt, "Depth Anything": depth_anything, "ZoeDepth": zoe_depth}


@pytest.fixture(params=ESTIMATORS)
def estimator(request):
    net, processor = ESTIMATORS[request.param]()
    return random_weights(net), processor


@pytest.fixture
def zoe_reference(monkeypatch):
    """ZoeDepth's own way to cut its padding, which resizes by torchvision; without that, by the same call of torch."""

    def resize(x, size, interpolation, antialias):
        assert not antialias
        return F.interpolate(x[None], size=size, mode=interpolation, align_corners=False)[0]

    stand_in = SimpleNamespace(resize=resize, InterpolationMode=SimpleNamespace(BICUBIC="bicubic"))
    if not hasattr(zoe_processing, "tvF"):
        monkeypatch.setattr(zoe_processing, "tvF", stand_in, raising=False)


def swapped(net, processor):
    pipe = build_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    pipe.register_modules(depth_estimator=net, feature_extractor=processor)
    return pipe


def directly(net, processor, images):
    """(N, H, W), as the documentation of transformers calls an estimator."""
    with torch.no_grad():
        outputs = net(**processor(images=images, return_tensors="pt"))
    if not processor.do_pad:
        return outputs.predicted_depth
    sizes = [(image.height, image.width) for image in images]
    resized = torch.stack([one["predicted_depth"] for one in processor.post_process_depth_estimation(outputs, sizes)])
    return within(resized, outputs.predicted_depth)


def within(resized, predicted):
    """Cut the overshoot of the reference's bicubic resizing, by which metres may become negative near edges."""
    return torch.stack([one.clamp(*other.aminmax()) for one, other in zip(resized, predicted, strict=True)])


def test_estimates_are_those_of_the_estimator(estimator, small_photo, zoe_reference):
    """Bit for bit, of several images, from pixels in any form; the depth varies."""
    pipe = swapped(*estimator)
    images = [small_photo, small_photo.transpose(Image.Transpose.ROTATE_180)]
    expected = directly(*estimator, images)
    assert expected.std() > 1e-3 * expected.abs().max()
    arrays = np.stack([np.asarray(image) for image in images])
    tensors = torch.from_numpy(arrays).movedim(3, 1).float() / 255
    for form in (images, arrays, tensors):
        assert torch.equal(pipe.estimate_depth(form), expected)
    assert estimator[0].training is False


def test_pictures_by_the_estimator(estimator, small_photo, tmp_path):
    """A call estimates as `estimate_depth` does; the folder keeps the estimator for those who load it."""
    net, processor = estimator
    pipe = swapped(net, processor)

    def paint(pipe, **options):
        seed = torch.Generator().manual_seed(0)
        return pipe("a cup", small_photo, num_inference_steps=2, generator=seed, output_type="np", **options).images

    expected = paint(pipe, depth_map=pipe.estimate_depth(small_photo))
    assert np.array_equal(paint(pipe), expected)
    flat = paint(pipe, depth_map=torch.ones(8, 8))
    assert np.abs(flat - expected).max() > 1e-3
    pipe.save_pretrained(tmp_path)
    kind = type(net)
    again = depthdiff.StableDiffusionDepth2ImgPipeline.from_pretrained(
        tmp_path, depth_estimator=kind.from_pretrained(tmp_path / "depth_estimator"), feature_extractor=processor
    )
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(paint(again), expected)
    assert pipe.to(torch.float64).depth_estimator.dtype == torch.float64
    assert pipe.estimate_depth(small_photo).dtype in (torch.float64, torch.float32)  # the latter where it is resized


def test_metric_depth_is_inverted():
    """ZoeDepth's: what is farther has the smaller disparity, which is 1 / metres."""
    net, processor = zoe_depth()
    pipe = swapped(random_weights(net), processor)
    metres = pipe.estimate_depth(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    assert metres.shape == (1, 40, 60)
    assert 0 < metres.min() < metres.max()
    torch.testing.assert_close(read_disparity(metres, invert=True), 1 / metres, atol=0, rtol=0)


@pytest.mark.parametrize("height, width", [(40, 60), (61, 33), (64, 64)])
def test_zoe_depths_border_is_cut_where_it_was_added(height, width, zoe_reference):
    """As the reference's own processor does it; without padding nothing is cut."""
    processor = zoe_depth()[1]
    predicted = torch.rand(2, 64, 96, generator=torch.Generator().manual_seed(0))
    results = processor.post_process_depth_estimation(
        SimpleNamespace(predicted_depth=predicted), source_sizes=[(height, width)] * 2
    )
    expected = within(torch.stack([one["predicted_depth"] for one in results]), predicted)
    assert torch.equal(cut_padding(processor, predicted, height, width), expected)
    processor.do_pad = False
    assert cut_padding(processor, predicted, height, width) is predicted


def published_size(height, width, size=384, multiple=32):
    """The rule of MiDaS' `Resize` with keep_aspect_ratio and the method "minimal", as its documentation has it."""
    by_height, by_width = size / height, size / width
    scale = by_height if abs(by_height - 1) <= abs(by_width - 1) else by_width
    return tuple(int(np.round(scale * side / multiple)) * multiple for side in (height, width))


@pytest.mark.parametrize("height, width", [(480, 640), (640, 480), (600, 400), (384, 384), (1080, 1920), (300, 200)])
def test_the_size_that_keeps_the_aspect(height, width):
    """By our image processor and by transformers', on a network that only notes the size."""
    sizes = []

    class Noting(torch.nn.Module):
        config = None

        def forward(self, pixels):
            sizes.append(tuple(pixels.shape[2:]))
            return SimpleNamespace(predicted_depth=pixels[:, 0])

    image = Image.new("RGB", (width, height))
    for processor in (depthdiff.DPTImageProcessor(), DPTImageProcessorPil()):
        before = repr(processor)
        pipe = swapped(Noting(), processor)
        pipe.estimate_depth(image, keep_aspect=True)
        pipe.estimate_depth(image)
        assert sizes == [published_size(height, width), (384, 384)]
        assert repr(processor) == before
        sizes.clear()
    assert math.isclose(np.divide(*published_size(height, width)), height / width, rel_tol=0.06)


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(64, 96), (96, 32), (48, 80), (160, 64)])
@pytest.mark.parametrize("geometry", ["tiny"])
def test_the_hybrid_net_takes_images_that_are_not_square(geometry, height, width, tmp_path):
    """As transformers' net does where its parts are told to stretch the positions, and what the grid's sides are."""
    mine = depthdiff.DPTForDepthEstimation.from_config(GEOMETRIES[geometry]["depth_estimator"])
    random_weights(mine).save_pretrained(tmp_path)
    reference = transformers.DPTForDepthEstimation.from_pretrained(tmp_path).eval()
    embed, gather = reference.dpt.embeddings.forward, reference.neck.forward
    reference.dpt.embeddings.forward = lambda pixels, **_: embed(pixels, interpolate_pos_encoding=True)
    reference.neck.forward = lambda states, *_: gather(states, height // 16, width // 16)
    pixels = torch.rand(2, 3, height, width) * 2 - 1
    expected, found = reference(pixels).predicted_depth, mine(pixels).predicted_depth
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


def test_keep_aspect_with_the_published_kind(small_photo):
    """120x88 at size 64: the factor nearer to 1 is 64 / 88, so that 87x64 becomes 96x64."""
    pipe = build_pipeline("tiny")
    stretched, kept = pipe.estimate_depth(small_photo), pipe.estimate_depth(small_photo, keep_aspect=True)
    assert stretched.shape == (1, 64, 64)
    assert kept.shape == (1, 64, 96)
    assert pipe.feature_extractor.config.keep_aspect_ratio is False
    a_square = small_photo.resize((64, 64))
    assert torch.equal(pipe.estimate_depth(a_square), pipe.estimate_depth(a_square, keep_aspect=True))


def test_processors_that_cannot_are_refused_by_name(small_photo):
    pipe = swapped(*dpt())
    pipe.feature_extractor = transformers.ViTImageProcessor()
    with pytest.raises(TypeError, match=r"feature_extractor must be able to keep the aspect .* ViTImageProcessor"):
        pipe.estimate_depth(small_photo, keep_aspect=True)
    net, processor = dpt()
    processor.do_pad, processor.size_divisor = True, 16
    with pytest.raises(TypeError, match=r"must not pad, .* DPTImageProcessorPil; set its do_pad to False"):
        swapped(net, processor).estimate_depth(small_photo)
    with pytest.raises(TypeError, match="keep_aspect must be True or False, got int 1"):
        pipe.estimate_depth(small_photo, keep_aspect=1)


def test_the_pages_programs_run(small_photo, monkeypatch):
    """With stand-ins for what is downloaded."""
    page = (Path(__file__).parents[2] / "docs" / "depth.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    made = {"depth-anything/Depth-Anything-V2-Small-hf": depth_anything(), "Intel/zoedepth-nyu-kitti": zoe_depth()}
    auto = transformers.AutoModelForDepthEstimation, transformers.AutoImageProcessor
    for index, kind in enumerate(auto):
        monkeypatch.setattr(kind, "from_pretrained", lambda name, index=index: made[name][index])
    own = build_pipeline("tiny")

    class Quick:
        register_modules, estimate_depth = own.register_modules, own.estimate_depth

        def __call__(self, *arguments, **options):
            return own(*arguments, num_inference_steps=1, strength=1.0, **options)

    def load(name, **parts):
        own.register_modules(**parts)
        return Quick()

    monkeypatch.setattr(depthdiff.StableDiffusionDepth2ImgPipeline, "from_pretrained", load)
    metres = torch.rand(1, 30, 40) * 50 + 0.1
    names = {"photo": small_photo, "metres": metres, "pipe": Quick()}
    names["read_my_sensor"] = lambda image: np.full((5, 7), 2.0)
    exec(first, names)
    assert names["disparity"].max() <= 1 / 0.5
    exec(second, names)
    assert names["metres"].shape == (1, 88, 120)
    assert own.depth_estimator is names["from_my_sensor"]
