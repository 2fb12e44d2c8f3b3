"""Previews: the linear map is the least-squares solution, pictures resemble what is decoded, nothing is left behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from depthdiff import AutoencoderTiny, StableDiffusionDepth2ImgPipeline, Step
from depthdiff.cli import main
from depthdiff.config import CheckpointError
from depthdiff.previews import LatentToRGB, load_preview_decoder, preview_pictures, smooth_latents

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mini():
    pipeline = StableDiffusionDepth2ImgPipeline.from_pretrained("mini")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def fitted(mini):
    return LatentToRGB.fit(mini.vae)


def tiny_vae(levels=3, width=8, **settings):
    torch.manual_seed(0)
    sides = {f"{side}_block_out_channels": [width] * levels for side in ("encoder", "decoder")}
    counts = {f"num_{side}_blocks": [1] * levels for side in ("encoder", "decoder")}
    return AutoencoderTiny(**sides, **counts, **settings).eval()


@pytest.mark.parametrize("kind", ["mini", "tiny", "small"])
@torch.no_grad()
def test_the_map_is_the_least_squares_solution(kind, mini, pipe):
    vae = {"mini": mini.vae, "tiny": pipe.vae, "small": tiny_vae()}[kind]
    found = LatentToRGB.fit(vae)
    latents = smooth_latents(vae.config.latent_channels)
    pixels = vae.decode(latents / vae.config.scaling_factor).sample.double().numpy()
    factor = pixels.shape[2] // latents.shape[2]
    batch, _, height, width = latents.shape
    colours = pixels.reshape(batch, 3, height, factor, width, factor).mean(axis=(3, 5))
    colours = torch.from_numpy(colours.transpose(0, 2, 3, 1).reshape(-1, 3).copy())
    features = F.pad(latents.double().permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(features, colours).solution
    mine = torch.cat([found.weight.T, found.bias[None]]).double()
    assert (mine - solution).abs().max() < 1e-6 * solution.abs().max()  # observed: at most 6e-8
    rest = (features @ solution - colours).norm() / (colours - colours.mean(dim=0)).norm()
    assert found.error == pytest.approx(rest.item(), rel=1e-6)
    assert found.factor == factor
    again = LatentToRGB.fit(vae)
    assert torch.equal(again.weight, found.weight) and again.error == found.error


def test_the_fixed_latents_are_smooth_and_of_unit_variance():
    latents = smooth_latents(4)
    assert latents.shape == (32, 4, 8, 8) and torch.equal(latents, smooth_latents(4))
    assert latents.std().item() == pytest.approx(0.9, abs=0.15)
    assert latents.diff(dim=3).abs().mean() < 0.2 * latents.std()


@pytest.mark.parametrize("name", ["docs/scene.png", "tests/data/coffee.png"])
@torch.no_grad()
def test_the_preview_of_an_encoded_photo_resembles_it(name, mini, fitted):
    """Mean distance in shares of full range. Observed: 0.040 and 0.054 for the map, 0.010 and 0.031 for the decoder.

    A grey picture of the photo's own mean colour is 0.185 and 0.176 away.
    """
    photo = Image.open(ROOT / name).convert("RGB").resize((128, 96))
    latents = mini.vae.encode(mini.image_processor.preprocess(photo)).latent_dist.mode()
    latents = latents * mini.vae.config.scaling_factor
    wanted = np.asarray(photo, dtype=np.float64) / 255
    grey = np.abs(wanted - wanted.mean(axis=(0, 1))).mean()
    for decoder, least in ((fitted, 3), (mini.vae, 5)):
        [picture] = preview_pictures(latents, decoder)
        assert picture.size == photo.size
        assert np.abs(np.asarray(picture) / 255 - wanted).mean() * least < grey
    assert fitted.error < 0.2  # observed: 0.176


def test_pictures_of_a_step(mini, fitted):
    """Of the clean latents that it predicts, of its latents where there are none, and of latents; B pictures each."""
    generator = torch.Generator().manual_seed(0)
    latents, clean = torch.randn(2, 2, 4, 8, 12, generator=generator)
    step = Step(0, torch.tensor(1), latents, clean)
    for decoder in (fitted, mini.vae, None):
        pictures = mini.preview(step, decoder)
        assert [picture.size for picture in pictures] == [(48, 32)] * 2
        assert pictures == mini.preview(clean, decoder) != mini.preview(latents, decoder)
        assert mini.preview(Step(0, step.timestep, latents, None), decoder) == mini.preview(latents, decoder)
    assert mini.preview(step) == mini.preview(step, fitted)
    assert mini.preview(clean, mini.vae) == mini.decode(clean)


def test_the_colours_are_enlarged_bilinearly(fitted):
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    colours = torch.tensordot(latents.permute(0, 2, 3, 1).double(), fitted.weight.double().T, 1) + fitted.bias
    pixels = F.interpolate(colours.permute(0, 3, 1, 2), size=(12, 20), mode="bilinear", align_corners=False)
    wanted = (pixels.clamp(-1, 1) + 1) / 2 * 255
    for picture, expected in zip(preview_pictures(latents, fitted), wanted, strict=True):
        found = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert (found - expected).abs().max() <= 0.501


@torch.no_grad()
def test_the_scaling_of_each_autoencoder(pipe):
    """`AutoencoderKL` gets latents divided by its factor, `AutoencoderTiny` as they are."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert pipe.vae.config.scaling_factor != 1
    small = tiny_vae()
    for vae, scaled in ((pipe.vae, latents / pipe.vae.config.scaling_factor), (small, latents)):
        [expected] = pipe.image_processor.postprocess(vae.decode(scaled).sample)
        for [picture] in (preview_pictures(latents, vae), pipe.preview(latents, vae)):
            assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype, fitted):
    """A map fitted on, and fed with, half precision is nearly that of float32."""
    pipeline = StableDiffusionDepth2ImgPipeline.from_pretrained("mini", torch_dtype=dtype)
    half = LatentToRGB.fit(pipeline.vae)
    assert half.weight.dtype == torch.float32
    assert (half.weight - fitted.weight).abs().max() < 0.01  # observed: 2e-4 and 2e-3
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = [
        np.asarray(one[0], dtype=int)
        for one in (pipeline.preview(latents.to(dtype)), preview_pictures(latents, fitted))
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 3  # observed: 1 and 2
    assert pipeline.preview(latents, pipeline.vae)[0].size == (32, 32)


def test_the_global_random_state_is_left_alone(mini):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mini.preview(torch.zeros(1, 4, 4, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_constant_autoencoder_has_no_error(mini):
    vae = tiny_vae()
    for parameter in vae.parameters():
        torch.nn.init.zeros_(parameter)
    found = LatentToRGB.fit(vae)
    assert found.error == 0 and found.weight.abs().max() < 1e-6 and (found.bias + 1).abs().max() < 1e-6


def test_sequential_offload(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipe.preview(latents), pipe.preview(latents, pipe.vae)
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert (pipe.preview(latents), pipe.preview(latents, pipe.vae)) == expected


def test_what_is_refused(mini, fitted):
    latents = torch.zeros(1, 4, 4, 4)
    with pytest.raises(TypeError, match="the decoder must be a LatentToRGB or an autoencoder, got str 'taesd'"):
        mini.preview(latents, "taesd")
    with pytest.raises(ValueError, match="latents must have 4 channels, which the decoder reads, got 3"):
        mini.preview(latents[:, :3], fitted)
    with pytest.raises(TypeError, match="latents must be"):
        mini.preview([latents], fitted)
    with pytest.raises(ValueError, match="latents must be"):
        preview_pictures(latents[0], mini.vae)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        mini.preview(latents * float("nan"), mini.vae)


# The command


def taesd_files(folder, suffix=".safetensors"):
    """Write TAESD's two files with random weights; return the tiny autoencoder that they hold."""
    torch.manual_seed(0)
    vae = AutoencoderTiny()
    files = {"encoder": {}, "decoder": {}}
    for key, value in vae.state_dict().items():
        side, _, place, rest = key.split(".", 3)
        files[side][f"{int(place) + (side == 'decoder')}.{rest}"] = value
    for side, file in files.items():
        save_file(file, folder / f"taesd_{side}{suffix}")
    return vae.eval()


def test_decoders_from_files(tmp_path):
    vae = taesd_files(tmp_path)
    vae.save_pretrained(tmp_path / "folder")
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for place in ("taesd_decoder.safetensors", "taesd_encoder.safetensors", "folder"):
        assert preview_pictures(latents, load_preview_decoder(tmp_path / place)) == preview_pictures(latents, vae)
    (tmp_path / "taesd_encoder.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for place in ("taesd_decoder.safetensors", "elsewhere.safetensors"):
        with pytest.raises(CheckpointError, match="with taesd_encoder of the same type beside it"):
            load_preview_decoder(str(tmp_path / place))


def test_the_command_writes_previews(tmp_path, tiny_folder, small_photo, capsys):
    small_photo.save(tmp_path / "photo.png")
    call = [
        *("two tigers", str(tmp_path / "photo.png"), "--model", str(tiny_folder), "--steps", "4", "--strength", "1"),
        *("--seed", "1", "--num-images", "2"),
    ]
    assert main([*call, "-o", str(tmp_path / "plain.png")]) == 0
    assert main([*call, "-o", str(tmp_path / "out.png"), "--preview", "2"]) == 0
    for number in (1, 2):
        plain, painted, preview = (Image.open(tmp_path / f"{stem}-{number}{end}.png") for stem, end in
                                   (("plain", ""), ("out", ""), ("out", "-preview")))  # fmt: skip
        assert plain.tobytes() == painted.tobytes()
        assert preview.size == painted.size
    names = sorted(path.name for path in tmp_path.glob("out*"))
    assert names == ["out-1-preview.png", "out-1.png", "out-2-preview.png", "out-2.png"]

    pipeline = StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    decoder = tiny_vae(len(pipeline.vae.config.block_out_channels))
    decoder.save_pretrained(tmp_path / "decoder")
    more = ["--preview", "3", "--preview-decoder", str(tmp_path / "decoder")]
    assert main([*call[:-2], "-o", str(tmp_path / "one.png"), *more]) == 0
    run = pipeline.prepare(
        "two tigers", small_photo, strength=1, num_inference_steps=4, generator=[torch.Generator().manual_seed(1)]
    )
    shown = [pipeline.preview(step, decoder) for step in pipeline.denoise(run)]
    wanted = shown[len(shown) - len(shown) % 3 - 1][0]
    difference = np.abs(np.asarray(Image.open(tmp_path / "one-preview.png"), int) - np.asarray(wanted, int))
    assert difference.max() <= 1


REFUSED = {
    "--preview must be at least 1, got 0": ["--preview", "0"],
    "--preview-decoder is for previews; give --preview as well": ["--preview-decoder", "."],
    "nowhere is neither a file nor a folder": ["--preview", "1", "--preview-decoder", "nowhere"],
    "are the same file": ["--preview", "1", "-o", "a-preview.png", "--sheet", "a-preview-preview.png"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_cannot_be(message, tmp_path, small_photo, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_photo.save("photo.png")
    assert main(["two tigers", "photo.png", *REFUSED[message]]) == 1
    assert message in capsys.readouterr().err
