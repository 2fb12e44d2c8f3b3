"""Depth of any convention to disparity: inversion, ranges, the sky; scales of several maps; functions as estimators."""

from __future__ import annotations

import copy
import json
import logging
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoint import build_pipeline
from torch import nn

from depthdiff import StableDiffusionDepth2ImgPipeline
from depthdiff.conditioning import fit_depth, normalize_depth
from depthdiff.depth_maps import check_depth_options, depth_preview, disparity_ends, read_disparity
from depthdiff.image import read_depth

NAN, INF = math.nan, math.inf
METRES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 5.0, 3.0]])
LEVELS = torch.tensor([[0.0, 3.0, 7.0], [9.0, 255.0, 40.0]])


def ranks(x):
    """Number the values by size; equal ones alike."""
    return torch.unique(x, return_inverse=True)[1].reshape(x.shape)


def test_without_options_maps_stay_as_they_are():
    for given in (LEVELS, -METRES, METRES[None].half(), LEVELS.numpy().astype(np.uint16)):
        assert torch.equal(read_disparity(given), read_depth(given))
    assert torch.equal(read_disparity(METRES, False, None), METRES[None])


def test_distances_become_their_inverse():
    disparity = read_disparity(METRES, invert=True)
    assert torch.equal(disparity, 1 / METRES[None])
    assert torch.equal(ranks(disparity), ranks(-METRES[None]))
    assert torch.equal(read_disparity(METRES.numpy(), invert=np.True_), disparity)


def test_flipped_pictures_keep_their_spacing():
    """The map that a call sees is the one of 255 - v, up to rounding (observed: equal)."""
    flipped = read_disparity(LEVELS, invert="flip")
    assert torch.equal(ranks(flipped), ranks(-LEVELS[None]))
    expected = normalize_depth(255 - LEVELS[None, None])
    torch.testing.assert_close(normalize_depth(flipped[None]), expected, atol=1e-6, rtol=0)
    assert torch.equal(read_disparity(read_disparity(LEVELS, invert="flip"), invert="flip"), LEVELS[None])


@pytest.mark.parametrize("invert, near, far", [(False, 200, 5), (True, 2, 5), ("flip", 5, 200)])
def test_what_is_beyond_the_range_counts_as_its_end(invert, near, far):
    given = METRES if invert is True else LEVELS
    clamped = given.clamp(min(near, far), max(near, far))
    found = read_disparity(given, invert=invert, depth_range=(near, far))
    assert torch.equal(found, read_disparity(clamped, invert=invert))
    low, high = disparity_ends(invert, (near, far))
    assert low < high
    assert math.isclose(float(found.min()), low, rel_tol=1e-6)
    assert math.isclose(float(found.max()), high, rel_tol=1e-6)
    scaled = normalize_depth(found[None], (low, high))
    assert scaled.max() == 1 and scaled.min() == -1
    nearest = given == (given.max() if not invert else given.min())
    assert torch.equal(scaled[0, 0] == 1, (given >= near) if not invert else (given <= near))
    assert scaled[0, 0][nearest].min() == 1
    assert disparity_ends(invert, None) is None


SKIES = {
    "NaN in disparities": (False, NAN, None, 1.0),
    "minus infinity": (False, -INF, None, 1.0),
    "NaN in distances": (True, NAN, None, 1 / 8),
    "infinity in distances": (True, INF, None, 1 / 8),
    "NaN in a picture": ("flip", NAN, None, -8.0),
    "infinity in a picture": ("flip", INF, None, -8.0),
    "NaN and a range": (False, NAN, (6, 0.5), 0.5),
    "NaN in distances and a range": (True, NAN, (0.25, 64), 1 / 64),
    "infinity and a range": ("flip", INF, (0.25, 64), -64.0),
}


@pytest.mark.parametrize("case", SKIES)
def test_the_sky_is_as_far_as_what_is_farthest(case, caplog):
    """By the map's own farthest value, or that of the range; what is known stays, and a warning gives the share."""
    invert, hole, depth_range, expected = SKIES[case]
    holed = METRES.clone()
    holed[0, 1] = hole
    farther = METRES * 2 if invert else METRES / 2
    with caplog.at_level(logging.WARNING):
        found = read_disparity(torch.stack([holed, farther]), invert, depth_range, "sky")
    assert found[0, 0, 1] == expected == found[0].min().item()
    known = METRES.clone()
    known[0, 1] = 8.0 if invert else 1.0
    rest = torch.ones(2, 3, dtype=torch.bool)
    rest[0, 1] = False
    assert torch.equal(found[0][rest], read_disparity(known, invert, depth_range)[0][rest])
    assert torch.equal(found[1:], read_disparity(farther, invert, depth_range))
    assert "sky: 8.33 % of the values are unknown" in caplog.text


def test_no_hole_no_warning(caplog):
    read_disparity(METRES, invert=True, depth_range=(1, 3))
    assert caplog.text == ""


WRONG_MAPS = {
    "zero": ((METRES - 1, True), r"depth_map must hold distances above 0 .* got 0; .*NaN.* invert=\"flip\""),
    "negative": ((-METRES, True), r"distances above 0 .* got -8"),
    "too small": ((METRES * 1e-40, True), "distances above 0"),
    "far infinity in disparities": (
        (METRES / 0, False),
        r"at its near end, got infinity; is it distances, for invert=T",
    ),
    "near infinity in distances": ((METRES / -0.0, True), r"at its near end, got minus infinity; is near large in it"),
    "near infinity in a picture": ((METRES / -0.0, "flip"), r"near end, got minus infinity"),
    "nothing known": ((torch.stack([METRES, METRES * NAN]), False), "must hold finite values, got a map of NaN"),
    "nothing but sky": ((METRES / 0, True), "must hold finite values, got a map of NaN and infinity alone"),
    "beyond float32": ((np.full((2, 3), 1e300), False), "finite in float32 at its near end"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("case", WRONG_MAPS)
def test_wrong_maps(case):
    given, message = WRONG_MAPS[case]
    with pytest.raises(ValueError, match=message) as caught:
        read_disparity(*given)
    assert str(caught.value).startswith("depth_map ")


WRONG_OPTIONS = {
    "a number": ({"invert": 1}, TypeError, "depth_invert must be False, True .* got int 1"),
    "None": ({"invert": None}, TypeError, "depth_invert must be"),
    "another word": ({"invert": "yes"}, ValueError, "depth_invert must be .* got 'yes'"),
    "an array": ({"invert": np.zeros(2)}, TypeError, "depth_invert must be .* array"),
    "one end": ({"depth_range": 3}, TypeError, "two numbers .near, far., got int 3"),
    "three ends": ({"depth_range": (1, 2, 3)}, TypeError, "two numbers .near, far., got 3 values"),
    "text": ({"depth_range": ("1", 2)}, TypeError, "near of depth_range must be a number, got str '1'"),
    "truth values": ({"depth_range": (True, 0)}, TypeError, "near of depth_range must be a number"),
    "NaN": ({"depth_range": (1, NAN)}, ValueError, "far of depth_range must be in"),
    "infinity": ({"depth_range": (INF, 0)}, ValueError, "near of depth_range must be in"),
    "the order of distances": ({"depth_range": (1, 5)}, ValueError, "near above far, .* got 1 and 5; .*invert=True"),
    "the order of disparities": ({"invert": True, "depth_range": (5, 1)}, ValueError, "near below far .* swap them"),
    "the order of a picture": ({"invert": "flip", "depth_range": (5, 1)}, ValueError, "near below far .* swap them"),
    "equal ends": ({"depth_range": (5, 5)}, ValueError, "got 5 and 5"),
    "equal in float32": ({"invert": True, "depth_range": (1.0, 1.0 + 1e-9)}, ValueError, "got 1 and 1"),
    "no distance": ({"invert": True, "depth_range": (0, 5)}, ValueError, "distances above 0, .* got 0 and 5; .*flip"),
    "normalize": ({"normalize": "all"}, ValueError, "depth_normalize must be one of each, batch, got 'all'"),
    "normalize by a number": ({"normalize": 1}, ValueError, "depth_normalize must be one of each, batch, got 1"),
    "two scales": ({"depth_range": (5, 1), "normalize": "batch"}, ValueError, "depth_range fixes the scale already"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_are_refused_before_any_work(case):
    options, error, message = WRONG_OPTIONS[case]
    with pytest.raises(error, match=message):
        check_depth_options(**options)
    if "normalize" not in options:
        for check in (
            partial(read_disparity, object()),
            partial(disparity_ends, **{"invert": False, "depth_range": None}),
        ):
            with pytest.raises(error, match=message):
                check(**options)


def test_options_come_back_as_pythons_own():
    assert check_depth_options() == (False, None, "each")
    invert, depth_range, normalize = check_depth_options(np.True_, np.array([1, 2.5]), "each")
    assert invert is True and depth_range == (1.0, 2.5) and normalize == "each"
    assert [type(end) for end in depth_range] == [float, float]
    assert check_depth_options("flip", torch.tensor([0, 255]))[1] == (0.0, 255.0)
    assert check_depth_options(False, [3, -2], "each")[1] == (3.0, -2.0)
    assert check_depth_options(normalize="batch") == (False, None, "batch")


# scales of several maps


def stretched(disparity, low, high):
    """The published formula, in float64."""
    return (2 * (disparity.double() - low) / (high - low) - 1).float()


def test_each_map_by_its_own_extremes_is_bit_equal_to_the_published_formula():
    maps = torch.rand(3, 1, 7, 9) * torch.tensor([1.0, 50.0, 1e4]).view(3, 1, 1, 1) + 7
    low, high = torch.aminmax(maps.flatten(1), dim=1)
    low, high = low.view(3, 1, 1, 1), high.view(3, 1, 1, 1)
    assert torch.equal(normalize_depth(maps), 2.0 * (maps - low) / (high - low) - 1.0)
    assert torch.equal(normalize_depth(maps, None), normalize_depth(maps))
    assert torch.equal(fit_depth(maps[:, 0], 7, 9), normalize_depth(maps))


def test_a_film_has_one_scale():
    """The same depth is the same number in every frame; alone, each frame would be stretched to both ends."""
    maps = torch.rand(3, 1, 7, 9) * torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1, 1)
    together = normalize_depth(maps, "batch")
    torch.testing.assert_close(together, stretched(maps, maps.min(), maps.max()), atol=1e-6, rtol=0)
    assert together.min() == -1 and together.max() == 1
    assert together[0].max() < 0
    assert torch.equal(normalize_depth(maps[1:2], "batch"), normalize_depth(maps[1:2]))
    assert torch.equal(normalize_depth(torch.full((2, 1, 3, 4), 7.0), "batch"), torch.full((2, 1, 3, 4), -1.0))
    ends = (0.5, 4.0)
    by_range = normalize_depth(maps, ends)
    torch.testing.assert_close(by_range, stretched(maps, *ends).clamp(-1, 1), atol=1e-6, rtol=0)
    for one, alone in zip(by_range, maps, strict=True):  # whatever the other frames are
        assert torch.equal(normalize_depth(alone[None], ends)[0], one)
    assert normalize_depth(torch.tensor(ends).view(1, 1, 1, 2), ends).flatten().tolist() == [-1, 1]


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), "all", 3])
def test_wrong_ends(ends):
    with pytest.raises(ValueError, match="ends must be"):
        normalize_depth(torch.rand(1, 1, 3, 4), ends)


def test_a_pipeline_passes_the_ends_on(pipe, small_photo):
    maps = torch.rand(2, 22, 30) * torch.tensor([1.0, 4.0]).view(2, 1, 1)
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    for ends in (None, "batch", (0.2, 3.0)):
        depth = pipe.prepare_depth_map([small_photo] * 2, maps, 2, True, ends=ends, **where)
        assert torch.equal(depth, torch.cat([fit_depth(maps, 11, 15, ends)] * 2))
    before = fit_depth(pipe.estimate_depth(small_photo).float(), 11, 15)
    assert torch.equal(pipe.prepare_depth_map(small_photo, None, 1, False, **where), before)


def test_a_pipeline_reads_the_sky(pipe, small_photo):
    """Where `depth_map` has NaN: once refused there, now the farthest, as depth cameras and renderers mean it."""
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    known = torch.rand(22, 30)
    known[:5] = known.min()
    holed = known.clone()
    holed[:4, :7] = NAN
    expected = pipe.prepare_depth_map(small_photo, known, 1, False, **where)
    assert torch.equal(pipe.prepare_depth_map(small_photo, holed, 1, False, **where), expected)


# functions as estimators


def brightness(image):
    """What is dark is far."""
    assert image.mode == "RGB"
    return np.asarray(image.convert("L"), dtype=np.float32)[::2, ::2]


def with_function(function, **parts):
    pipe = build_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    pipe.register_modules(depth_estimator=function, feature_extractor=None, **parts)
    return pipe


def paint(pipe, image, **options):
    seed = torch.Generator().manual_seed(0)
    return pipe("a cup", image, num_inference_steps=2, generator=seed, output_type="np", **options).images


class Sensor:
    """Something whose method gives depth."""

    def read(self, image):
        return torch.from_numpy(brightness(image))[None]


FUNCTIONS = {
    "array": brightness,
    "tensor": lambda image: torch.from_numpy(brightness(image)).to(torch.float64),
    "picture": lambda image: Image.fromarray(brightness(image)),
    "method": Sensor().read,
    "partial": partial(lambda scale, image: brightness(image) * scale, 1),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_estimates(kind, small_photo):
    pipe = with_function(FUNCTIONS[kind])
    estimate = pipe.estimate_depth([small_photo, small_photo.rotate(180)])
    assert estimate.dtype == torch.float32
    assert torch.equal(estimate[0], torch.from_numpy(brightness(small_photo)))
    assert torch.equal(estimate[1], torch.from_numpy(brightness(small_photo.rotate(180))))
    pixels = torch.from_numpy(np.asarray(small_photo).copy()).permute(2, 0, 1) / 255
    assert torch.equal(pipe.estimate_depth(pixels), estimate[:1])
    expected = paint(build_pipeline("tiny"), small_photo, depth_map=estimate[:1])
    assert np.array_equal(paint(pipe, small_photo), expected)


def test_a_pipeline_with_a_function_moves_saves_and_loads(small_photo, tmp_path, caplog):
    pipe = with_function(brightness)
    expected = paint(pipe, small_photo)
    assert "depth_estimator" not in pipe.networks
    assert "depth_estimator: function" in repr(pipe)
    assert pipe.to("cpu", torch.float32) is pipe
    assert np.array_equal(paint(copy.deepcopy(pipe), small_photo), expected)
    assert np.array_equal(paint(StableDiffusionDepth2ImgPipeline.from_pipe(pipe), small_photo), expected)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(paint(pipe, small_photo), expected)
    pipe.remove_all_hooks()
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path)
    assert "the depth_estimator is a function and is not saved; pass it again" in caplog.text
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["depth_estimator"] == index["feature_extractor"] == [None, None]
    assert pipe.config["depth_estimator"] == (None, None)
    again = StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path, depth_estimator=brightness)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(paint(again, small_photo), expected)
    with pytest.raises(ValueError, match="depth_estimator, which depth-to-image needs; pass one as depth_estimator="):
        StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path)


def test_a_single_file_with_a_function(small_photo, tmp_path):
    from depthdiff.convert import to_single_file

    build_pipeline("tiny").save_pretrained(tmp_path / "folder")
    to_single_file(tmp_path / "folder", tmp_path / "one.safetensors")
    where = {"config": tmp_path / "folder", "depth_estimator": brightness}
    pipe = StableDiffusionDepth2ImgPipeline.from_single_file(tmp_path / "one.safetensors", **where)
    assert torch.equal(pipe.estimate_depth(small_photo)[0], torch.from_numpy(brightness(small_photo)))


def test_holes_of_a_function(small_photo):
    """Its numbers come as they are; a call takes what it does not know for the sky."""

    def holed(image):
        depth = brightness(image)
        depth[:9] = NAN
        return depth

    pipe = with_function(holed)
    assert pipe.estimate_depth(small_photo).isnan().any()
    filled = brightness(small_photo)
    filled[:9] = filled[9:].min()
    expected = paint(pipe, small_photo, depth_map=filled)
    assert np.array_equal(paint(pipe, small_photo), expected)


WRONG_RESULTS = {
    "nothing": (lambda image: None, TypeError, "what depth_estimator returns must be PIL images, arrays or tensors"),
    "colours": (np.asarray, ValueError, r"what depth_estimator returns must be \(H, W\)"),
    "two maps": (lambda image: np.zeros((2, 5, 7)), ValueError, "one map .H, W. for one image, got 2 maps"),
    "text": (lambda image: np.array([["a"]]), TypeError, "real numbers"),
    "other sizes": (lambda image: np.zeros((5, image.getpixel((0, 0))[0] // 2 + 9)), ValueError, "of one size"),
}


@pytest.mark.parametrize("case", WRONG_RESULTS)
def test_wrong_results_of_a_function(case):
    function, error, message = WRONG_RESULTS[case]
    images = [Image.new("RGB", (24, 16), colour) for colour in ("black", "white")]
    with pytest.raises(error, match=message):
        with_function(function).estimate_depth(images)


def test_what_is_no_estimator():
    pipe = build_pipeline("tiny")
    for wrong in (nn.Linear(2, 2), type(pipe.depth_estimator), "midas", 3, pipe.tokenizer):
        with pytest.raises(
            TypeError, match=r"depth_estimator must be a DPTForDepthEstimation .* or be a function, got"
        ):
            pipe.register_modules(depth_estimator=wrong)
    with pytest.raises(ValueError, match="keep_aspect must be False where depth_estimator is a function"):
        with_function(brightness).estimate_depth(Image.new("RGB", (24, 16)), keep_aspect=True)
    with pytest.raises(ValueError, match="the pipeline has no feature_extractor"):
        pipe.feature_extractor = None
        pipe.estimate_depth(Image.new("RGB", (24, 16)))


# the preview


def test_the_preview_is_ordered_by_lightness():
    """Luminance (ITU-R BT.709 of linear light, and Pillow's) rises over 512 steps, from black to white, in colours."""
    preview = depth_preview(torch.linspace(-3, 5, 512).reshape(1, 512))
    assert (preview.mode, preview.size) == ("RGB", (512, 1))
    colours = np.asarray(preview)[0] / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for weights, values in (((0.2126, 0.7152, 0.0722), linear), ((0.299, 0.587, 0.114), colours)):
        luminance = values @ np.array(weights)
        assert (np.diff(luminance) > -0.002).all()  # rounding to 8 bits; observed: -0.0011
        assert (luminance[4:] > luminance[:-4]).all()
    assert colours[0].tolist() == [0, 0, 0] and colours[-1].tolist() == [1, 1, 1]
    assert np.ptp(colours, axis=1).max() > 0.3
    assert np.asarray(depth_preview(torch.full((3, 4), 2.0))).max() == 0
    with pytest.raises(ValueError, match="disparity must be one map, got 2"):
        depth_preview(torch.rand(2, 3, 4))
