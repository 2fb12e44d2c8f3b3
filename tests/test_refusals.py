"""Refused at the door, by name: what would otherwise fail in the middle of the work, or empty the pipeline."""

import io
import warnings

import numpy as np
import pytest
import torch
from convert import main as convert
from PIL import Image
from random_checkpoint import build_pipeline

from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from depthdiff.checkpoint.hub import bundled
from depthdiff.image import read_depth, read_images

CONFIG = {"clip_sample": False, "steps_offset": 1}


@pytest.mark.parametrize(
    "target", ["meta", torch.device("meta"), torch.complex64, torch.int8, torch.float8_e4m3fn, "x"]
)
def test_a_pipeline_moves_only_where_something_is_computed(pipe, target):
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=r"must be a|takes a device"):
        pipe.to(target)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())


def test_a_network_on_the_meta_device_is_named_by_the_call(pipe, small_photo):
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match=r"unet must have weights.*meta"):
        pipe("a toy", small_photo)


@pytest.mark.parametrize("settings", [{"foo": 1}, {"iterable": []}, {"disable": np.zeros(2)}, {"bar_format": "{x}"}])
def test_settings_of_the_progress_bar_fail_when_they_are_set(pipe, settings):
    with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
        pipe.set_progress_bar_config(**settings)
    assert pipe._progress_bar_config == {"disable": True}


@pytest.mark.parametrize("name", StableDiffusionDepth2ImgPipeline.NAMES)
def test_a_component_is_refused_when_the_pipeline_is_made(pipe, name):
    for wrong in (object(), 5, torch.nn.Linear(2, 2) if name not in ("feature_extractor",) else "x"):
        with pytest.raises(TypeError, match=name):
            StableDiffusionDepth2ImgPipeline(**{**pipe.components, name: wrong})


@pytest.mark.parametrize(
    "settings",
    [{"set_alpha_to_one": [1000000]}, {"steps_offset": "1"}, {"steps_offset": -1}, {"clip_sample_range": float("nan")}],
)
def test_settings_of_a_scheduler_are_looked_at_when_it_is_made(settings):
    for make in (DDIMScheduler, lambda **given: DDIMScheduler.from_config(given)):
        with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
            make(**{**CONFIG, **settings})


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_first_beta_of_zero_leads_to_the_clean_latents(eta):
    """The noise of the first timestep is 0 there, and 0 / 0 is not what is left to add."""
    scheduler = DDIMScheduler(beta_start=0.0, clip_sample=False)
    plan = scheduler.plan(10, eta=eta)
    clean, noise = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2, 3)
    latents, state = plan.add_noise(clean, noise), plan.init_state()
    for index in range(len(plan)):
        alpha_bar = scheduler.alphas_cumprod[int(plan.timesteps[index])]
        true = (latents - alpha_bar**0.5 * clean) / (1 - alpha_bar).clamp(min=1e-9) ** 0.5
        result = plan.step(true, index, latents, state, torch.Generator().manual_seed(index))
        latents, state = result.prev_sample, result.state
    assert torch.allclose(latents, clean, atol=1e-4)


def test_numbers_of_numpy_and_torch_are_numbers(pipe, small_photo):
    plain = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 2, "eta": 0.0, "return_dict": True}
    others = {
        "strength": np.float64(0.5),
        "num_inference_steps": torch.tensor(4),
        "guidance_scale": np.array(2),
        "eta": np.float32(0),
        "return_dict": np.bool_(True),
    }
    first, second = (
        pipe("a toy", small_photo, output_type="np", generator=torch.Generator().manual_seed(0), **given).images
        for given in (plain, others)
    )
    assert np.array_equal(first, second)
    with pytest.raises(TypeError, match="strength must be a number, got bool"):
        pipe("a toy", small_photo, strength=np.bool_(True))


def test_damaged_pictures_name_their_argument():
    """Cut off and changed, in seven formats, opened but not decoded: read, or refused with a ValueError."""
    rng, refused = np.random.default_rng(0), 0
    pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "ICO", "TGA"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        for _ in range(40):
            data = bytearray(file.getvalue())
            for _ in range(int(rng.integers(1, 6))):
                data[int(rng.integers(8, len(data)))] = int(rng.integers(256))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    image = Image.open(io.BytesIO(bytes(data[: int(rng.integers(len(data) // 2, len(data) + 1))])))
                except Exception:  # not opened at all, by Pillow
                    continue
                for read, name in ((read_images, "image"), (read_depth, "depth_map")):
                    try:
                        read(image)
                    except ValueError as error:
                        assert str(error).startswith(name)
                        refused += 1
    assert refused > 50


def test_conversion_says_what_no_shape_tells(tmp_path, capsys):
    """Heads and groups of the small models are others than those of the published one; the weights tell neither."""
    assert convert([str(bundled()), str(tmp_path / "mini.safetensors")]) == 0
    warning = capsys.readouterr().err
    assert "vae: norm_num_groups" in warning and "unet: attention_head_dim" in warning and "config=" in warning
    pipe = StableDiffusionDepth2ImgPipeline.from_single_file(tmp_path / "mini.safetensors", config=bundled())
    assert pipe.vae.config.norm_num_groups == 8


def test_a_refused_call_changes_nothing_of_the_callback_state(pipe, small_photo):
    pipe("a toy", small_photo, num_inference_steps=1, strength=1.0, guidance_scale=3.0)
    with pytest.raises(TypeError, match="return_dict"):
        pipe("a toy", small_photo, guidance_scale=5.0, return_dict=np.zeros(3))
    assert pipe.guidance_scale == 3.0
    assert build_pipeline("tiny").guidance_scale == 7.5
