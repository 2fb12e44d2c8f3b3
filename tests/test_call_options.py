"""Options beyond diffusers': any two work together, or one clear error comes before any work; off is off."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from depthdiff import StableDiffusionDepth2ImgPipeline
from depthdiff.call_options import CallOptions, Options

DEPTH = np.linspace(1, 2, 88 * 120, dtype=np.float32).reshape(88, 120)


class StartedError(Exception):
    """Work has begun."""


def options_of(pipe):
    """List the options: name -> arguments."""
    width = pipe.text_encoder.config.hidden_size
    embeds = torch.randn(1, 77, width)
    return {
        "mask": {"mask_image": Image.new("L", (120, 88), 255)},
        "mask blur": {"mask_blur": 2},
        "mask content": {"mask_content": "noise"},
        "size": {"height": 64, "width": 64},
        "resize mode": {"resize_mode": "pad"},
        "start": {"start": "noise"},
        "low strength": {"strength": 0.5},
        "no photo": {"image": None, "depth_map": DEPTH},
        "latents": {"image": torch.randn(1, 4, 11, 15), "depth_map": DEPTH},
        "depth map": {"depth_map": DEPTH},
        "invert": {"depth_invert": True, "depth_map": DEPTH},
        "flip": {"depth_invert": "flip"},
        "range": {"depth_range": (2.0, 1.0)},
        "range of distances": {"depth_range": (1.0, 2.0)},
        "batch": {"depth_normalize": "batch"},
        "aspect": {"depth_keep_aspect": True},
        "syntax": {"prompt_syntax": "a1111"},
        "embeddings": {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": embeds},
        "seamless": {"seamless": True},
        "windows": {"windows": (64, 32)},
        "hires": {"hires": 1.5},
        "hires strength": {"hires_strength": 0.5},
        "scales": {"guidance_scale": [7.5, 3.0]},
        "no guidance": {"guidance_scale": 1.0},
        "rescale": {"guidance_rescale": 0.7},
        "deep cache": {"deep_cache": 2},
        "merging": {"token_merging": 0.5},
        "interval": {"guidance_interval": (0.2, 0.8)},
        "two pictures": {"num_images_per_prompt": 2},
        "clip skip": {"clip_skip": 1},
        "preview": {"preview": lambda index, pictures: None},
        "preview steps": {"preview_steps": 2},
    }


NEEDS = {
    "mask blur": {"mask"},
    "mask content": {"mask"},
    "resize mode": {"size"},
    "hires strength": {"hires"},
    "preview steps": {"preview"},
    "range of distances": {"invert", "flip"},
    "scales": {"two pictures"},
}
CLASHES = {
    frozenset(pair)
    for pair in (
        *(("mask", "no photo"), ("mask", "latents"), ("start", "low strength"), ("size", "latents")),
        *(("aspect", "no photo"), ("aspect", "latents"), ("aspect", "depth map"), ("syntax", "embeddings")),
        *(("seamless", "windows"), ("windows", "deep cache"), ("range", "batch"), ("range", "invert")),
        *(("range", "flip"), ("aspect", "invert")),
    )
}
"""One option of a pair needs the other, or does not go with it."""


def pairs():
    """List the pairs whose arguments differ."""
    names = options_of(StubPipe())
    for first, second in itertools.combinations(names, 2):
        if not names[first].keys() & names[second].keys():
            yield first, second


class StubPipe:
    class text_encoder:  # noqa: N801
        class config:  # noqa: N801
            hidden_size = 8


def is_bad(*pair):
    lonely = [name for name in pair if name in NEEDS and not NEEDS[name] & set(pair)]
    return bool(lonely) or frozenset(pair) in CLASHES


def call(pipe, photo, **options):
    given = {"prompt": "a (cup:1.2)", "image": photo, "strength": 1.0, "num_inference_steps": 2, **options}
    return pipe(generator=torch.Generator().manual_seed(0), output_type="np", **given).images


def test_pairs_before_any_work(pipe, small_photo):
    """About 450 pairs; those that are refused name what is wrong, and no network has worked by then."""

    def start(*args, ends=None, **kwargs):
        raise StartedError

    for network in pipe.networks.values():
        network.register_forward_pre_hook(start)
    pipe.prepare_depth_map = start  # the first work where texts are given as embeddings
    options, refused = options_of(pipe), 0
    for pair in pairs():
        given = {**options[pair[0]], **options[pair[1]]}
        if is_bad(*pair):
            refused += 1
            with pytest.raises(ValueError) as error:
                call(pipe, small_photo, **given)
            words = str(error.value).replace("height and width", "height")
            assert any(name in words for name in given), (pair, words)
        else:
            with pytest.raises(StartedError):
                call(pipe, small_photo, **given)
    assert refused > 100


def test_pairs_that_work(pipe, small_photo):
    """Every other pair paints a picture."""
    options = options_of(pipe)
    for pair in pairs():
        if not is_bad(*pair):
            pictures = call(pipe, small_photo, **options[pair[0]], **options[pair[1]])
            assert np.isfinite(pictures).all() and pictures.ndim == 4, pair


def test_off_is_off(pipe, small_photo):
    """Every option at its default gives the picture without it, bit by bit."""
    plain = call(pipe, small_photo)
    defaults = {field.name: field.default for field in dataclasses.fields(CallOptions)}
    assert np.array_equal(call(pipe, small_photo, **defaults), plain)
    for name, value in defaults.items():
        assert np.array_equal(call(pipe, small_photo, **{name: value}), plain), name


def test_an_override_sees_the_depth_map_as_it_was_given(pipe, small_photo):
    """Where no option changes it; a list of arrays stays one."""
    seen, prepare = [], pipe.prepare_depth_map
    pipe.prepare_depth_map = lambda image, depth_map, *rest: (seen.append(depth_map), prepare(image, depth_map, *rest))[
        1
    ]
    for given in (torch.rand(88, 120), DEPTH, [DEPTH], Image.fromarray(DEPTH), None):
        call(pipe, small_photo, depth_map=given)
        assert seen.pop() is given


def test_both_lists_of_options_agree():
    """The record and the arguments for type checkers."""
    record = {field.name: field.type for field in dataclasses.fields(CallOptions)}
    arguments = {name: value.__forward_arg__ for name, value in Options.__annotations__.items()}
    assert record == arguments


WRONG = {
    "height": [(63, ValueError, "height must be a multiple of 8, got 63"), ("64", TypeError, "height must be an int")],
    "width": [(0, ValueError, "width must be in"), (2**20, ValueError, "width must be in")],
    "resize_mode": [("fill", ValueError, "resize_mode must be 'crop' or 'pad' or 'stretch', got 'fill'")],
    "start": [("zero", ValueError, "start must be 'image' or 'noise', got 'zero'")],
    "mask_blur": [(-1, ValueError, "mask_blur must be in"), ("soft", TypeError, "mask_blur must be a number")],
    "mask_content": [("black", ValueError, "mask_content must be 'original' or 'noise'")],
    "depth_invert": [("yes", ValueError, "depth_invert must be"), (1.5, TypeError, "depth_invert must be")],
    "depth_range": [((1, 1), ValueError, "depth_range"), (3, TypeError, "depth_range must be two numbers")],
    "depth_normalize": [("all", ValueError, "depth_normalize must be one of")],
    "depth_keep_aspect": [("yes", TypeError, "depth_keep_aspect must be True or False")],
    "prompt_syntax": [("compel", ValueError, "prompt_syntax")],
    "seamless": [("z", ValueError, 'seamless must be True, False, "x" or "y", got \'z\''), (2, ValueError, "seamless")],
    "windows": [
        (64, TypeError, "windows must be two numbers, size and stride"),
        ((64, 128), ValueError, "stride <= size"),
        ((60, 20), ValueError, "windows must be multiples of 8"),
        ((64, 0), ValueError, "windows must be in"),
    ],
    "guidance_rescale": [(1.5, ValueError, r"guidance_rescale must be in \[0, 1\]")],
    "mask": [("m.png", TypeError, "unknown argument 'mask'; did you mean 'mask_")],
}


@pytest.mark.parametrize("name, value, error, text", [(name, *case) for name, cases in WRONG.items() for case in cases])
@pytest.mark.parametrize("door", ["call", "prepare"])
def test_wrong_values(door, name, value, error, text, pipe, small_photo):
    pipe.text_encoder.forward = None  # nothing may start
    work = pipe if door == "call" else pipe.prepare
    with pytest.raises(error, match=text):
        work("a cup", small_photo, **{name: value})


def test_the_same_in_a_loop_of_one_s_own(pipe, small_photo):
    """`prepare`, `denoise` and `decode` of a run take every option that a call takes."""
    options = options_of(pipe)
    for name in ("mask", "size", "no photo", "start", "seamless", "windows", "rescale", "flip", "syntax"):
        expected = call(pipe, small_photo, **options[name])
        given = {"prompt": "a (cup:1.2)", "image": small_photo, "strength": 1.0, "num_inference_steps": 2}
        run = pipe.prepare(generator=torch.Generator().manual_seed(0), **{**given, **options[name]})
        for _ in pipe.denoise(run):
            pass
        assert np.array_equal(pipe.decode(run, "np"), expected), name


def test_a_saved_pipeline_knows_nothing_of_options(pipe, small_photo, tmp_path):
    call(pipe, small_photo, seamless=True, windows=None)
    pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.abs(call(again, small_photo) - call(pipe, small_photo)).max() < 1e-5  # observed: 3e-7
