"""The tiny autoencoder against diffusers' of that name: names, first weights, results, files, and in the pipeline."""

import inspect

import diffusers
import pytest
import torch
from random_checkpoint import randomize
from safetensors.torch import save_file

import depthdiff
from depthdiff.config import CheckpointError
from tests.parity.both import load_both, paint

TOLERANCE = 1e-5  # absolute, of numbers around 1; observed: 0, and 3e-7 between tiles and the whole
SIZES = {
    "published": {},
    "narrow": {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [12] * 4},
    "three levels": {
        "encoder_block_out_channels": [8] * 3,
        "decoder_block_out_channels": [12] * 3,
        "num_encoder_blocks": [1, 2, 1],
        "num_decoder_blocks": [2, 1, 3],
        "latent_channels": 5,
        "act_fn": "silu",
        "upsample_fn": "bilinear",
        "latent_magnitude": 2,
        "latent_shift": 0.25,
    },
    "sides that differ": {
        "encoder_block_out_channels": [8] * 3,
        "num_encoder_blocks": [1, 1, 1],
        "decoder_block_out_channels": [12] * 2,
        "num_decoder_blocks": [1, 1],
        "upsampling_scaling_factor": 4,
        "in_channels": 4,
    },
}


def pair(name="narrow"):
    """Build ours and diffusers', each from the same seed."""
    made = []
    for package in (depthdiff, diffusers):
        torch.manual_seed(0)
        made.append(package.AutoencoderTiny(**SIZES[name]).eval())
    return made


def pixels(height, width, channels=3, batch=2):
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(ours, theirs):
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SIZES)
def test_names_and_first_weights(name):
    ours, theirs = pair(name)
    for side in ("named_modules", "named_parameters"):
        mine, published = (list(getattr(one, side)()) for one in (ours, theirs))
        assert [key for key, _ in mine] == [key for key, _ in published]
        if side == "named_modules":
            assert [type(one).__name__ for _, one in mine] == [type(one).__name__ for _, one in published]
        else:
            assert all(torch.equal(one, other) for (_, one), (_, other) in zip(mine, published, strict=True))
    attributes = "use_slicing use_tiling tile_overlap_factor tile_sample_min_size latent_magnitude latent_shift"
    for attribute in f"{attributes} scaling_factor dtype device".split():
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    if name in ("published", "narrow"):  # with other levels, diffusers still takes the factor for 8
        assert (ours.spatial_scale_factor, ours.tile_latent_min_size) == (8, 64)
        assert (theirs.spatial_scale_factor, theirs.tile_latent_min_size) == (8, 64)
    mine, published = ({k: v for k, v in one.config.items() if k[0] != "_"} for one in (ours, theirs))
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in mine.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in published.items()
    }


@pytest.mark.parametrize("method", ["__init__", "encode", "decode", "forward", "scale_latents", "unscale_latents"])
def test_signatures(method):
    ours, theirs = (
        inspect.signature(getattr(package.AutoencoderTiny, method)).parameters for package in (depthdiff, diffusers)
    )
    assert [(name, one.default) for name, one in ours.items()] == [(name, one.default) for name, one in theirs.items()]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [(48, 80), (16, 8)])
@torch.no_grad()
def test_results(
    name,
    size,
):
    ours, theirs = pair(name)
    x = pixels(*size, ours.config.in_channels)
    latents = theirs.encode(x).latents
    close(ours.encode(x).latents, latents)
    assert torch.equal(ours.encode(x, return_dict=False)[0], ours.encode(x)["latents"])
    wide = 4 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))  # where decoder and scale clamp
    for z in (latents, wide):
        close(ours.decode(z).sample, theirs.decode(z).sample)
        close(ours.scale_latents(z), theirs.scale_latents(z))
        close(ours.unscale_latents(z), theirs.unscale_latents(z))
    assert torch.equal(ours.decode(latents, return_dict=False)[0], ours.decode(latents)[0])
    close(ours(x).sample, theirs(x).sample)
    close(ours(x, False)[0], theirs(x, False)[0])


@pytest.mark.parametrize("size", [(160, 192), (128, 96), (200, 256)])
@pytest.mark.parametrize("sliced", [False, True])
@torch.no_grad()
def test_tiles_and_slices(size, sliced):
    both, x = pair(), pixels(*size)
    whole = both[1].encode(x).latents
    for one in both:
        one.tile_sample_min_size, one.tile_latent_min_size = 128, 16
        one.enable_tiling()
        if sliced:
            one.enable_slicing()
    ours, theirs = both
    latents = theirs.encode(x).latents
    close(ours.encode(x).latents, latents)
    close(ours.decode(latents).sample, theirs.decode(latents).sample)
    assert (latents - whole).abs().max() > 1e-4 or max(size) <= 128
    ours.disable_tiling()
    ours.disable_slicing()
    close(ours.encode(x).latents, whole)


@torch.no_grad()
def test_tiles_where_diffusers_cannot():
    """With a factor other than 8, tiles join to what the whole gives far from their edges."""
    ours, x = pair("three levels")[0], pixels(192, 256)
    ours.tile_sample_min_size, ours.tile_latent_min_size = 128, 32
    whole = ours.encode(x).latents, ours.decode(ours.encode(x).latents).sample
    ours.enable_tiling()
    tiled = ours.encode(x).latents, ours.decode(whole[0]).sample
    for one, other in zip(tiled, whole, strict=True):
        assert one.shape == other.shape
        eighth = one.shape[2] // 8
        close(one[:, :, :eighth, :eighth], other[:, :, :eighth, :eighth])
        assert (one - other).abs().mean() < 0.05 * other.std()  # observed: 0.002


def test_gradients_with_and_without_checkpointing():
    """Recomputed gradients are the same; in diffusers 0.42.1 the encoder then reads [-1, 1] instead of [0, 1]."""
    (ours, theirs), x, gradients = pair(), pixels(16, 24), []
    for one, checkpointing in ((theirs, False), (ours, False), (ours, True)):
        if checkpointing:
            one.enable_gradient_checkpointing()
        one.train().zero_grad()
        assert one.is_gradient_checkpointing == checkpointing
        one.decode(one.encode(x).latents).sample.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in one.parameters()])
    for other in gradients[1:]:
        for first, second in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)  # observed: 0


def same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_folders_go_back_and_forth(tmp_path, caplog):
    theirs = pair("three levels")[1]
    theirs.save_pretrained(tmp_path / "theirs")
    ours = depthdiff.AutoencoderTiny.from_pretrained(tmp_path / "theirs")
    assert not caplog.records  # of an item of the config that is not read
    same_weights(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    same_weights(diffusers.AutoencoderTiny.from_pretrained(tmp_path / "ours"), theirs)
    texts = [(tmp_path / side / "config.json").read_text() for side in ("ours", "theirs")]
    assert texts[0] == texts[1].rstrip("\n") + "\n"


def original(vae):
    """Name the weights as TAESD's own two files do: the decoder's sequence has one layer more at its start."""
    files = {"encoder": {}, "decoder": {}}
    for key, value in vae.state_dict().items():
        side, _, place, rest = key.split(".", 3)
        files[side][f"{int(place) + (side == 'decoder')}.{rest}"] = value
    return files


def write(file, path):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in file.items()}, path)
    else:
        torch.save(file, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_two_original_files(suffix, dtype, tmp_path):
    vae = diffusers.AutoencoderTiny()
    randomize(vae, 3)
    for side, file in original(vae).items():
        write(file, tmp_path / f"taesd_{side}{suffix}")
    places = tmp_path / f"taesd_encoder{suffix}", tmp_path / f"taesd_decoder{suffix}"
    loaded = depthdiff.AutoencoderTiny.from_taesd(*places, torch_dtype=dtype)
    assert not loaded.training
    same_weights(loaded, vae if dtype is None else vae.to(dtype))
    with pytest.raises(CheckpointError, match="taesd_decoder"):
        depthdiff.AutoencoderTiny.from_taesd(*places[::-1])


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "not shifted", "no file"])
def test_original_files_are_read_strictly(fault, tmp_path):
    files = original(diffusers.AutoencoderTiny())
    if fault == "missing":
        del files["decoder"]["19.bias"]
    elif fault == "unexpected":
        files["encoder"]["15.weight"] = torch.zeros(3)
    elif fault == "shape":
        files["encoder"]["0.weight"] = torch.zeros(64, 4, 3, 3)
    elif fault == "not shifted":
        files["decoder"] = {f"{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}": v for k, v in files["decoder"].items()}
    for side, file in files.items():
        write(file, tmp_path / f"{side}.safetensors")
    if fault == "no file":
        (tmp_path / "decoder.safetensors").unlink()
    with pytest.raises(CheckpointError):
        depthdiff.AutoencoderTiny.from_taesd(tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors")


def test_single_files_of_stable_diffusion_hold_none(pipe, tmp_path):
    save_file(pipe.vae.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"single files hold no AutoencoderTiny, .* load it with from_pretrained"):
        depthdiff.AutoencoderTiny.from_single_file(tmp_path / "vae.safetensors")


REFUSED = {
    "encoder_block_out_channels must be as many": {"encoder_block_out_channels": [8, 8]},
    "decoder_block_out_channels must all be equal": {"decoder_block_out_channels": [8, 8, 8, 16]},
    "act_fn is 'cubic'": {"act_fn": "cubic"},
    "upsample_fn is 'area'": {"upsample_fn": "area"},
    "latent_magnitude must be positive": {"latent_magnitude": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_built(message):
    with pytest.raises(ValueError, match=message):
        depthdiff.AutoencoderTiny(**REFUSED[message])


def test_as_the_autoencoder_of_a_pipeline(tiny_folder, small_photo, tmp_path):
    """Given to both packages, saved with the pipeline, and loaded again by both."""
    levels = len(depthdiff.AutoencoderKL.load_config(tiny_folder, subfolder="vae")["block_out_channels"])
    widths, counts = [8] * levels, [1] * levels
    pipes = load_both(tiny_folder)
    for pipe, package in zip(pipes, (depthdiff, diffusers), strict=True):
        torch.manual_seed(0)
        pipe.vae = package.AutoencoderTiny(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=counts,
            num_decoder_blocks=counts,
        ).eval()  # fmt: skip
    ours, theirs = (paint(pipe, small_photo) for pipe in pipes)
    assert abs(ours - theirs).max() < 2e-3 and ours.std() > 1e-3  # of full range; observed: 1e-6
    assert pipes[0].config["vae"] == ("diffusers", "AutoencoderTiny")
    pipes[0].save_pretrained(tmp_path)
    for pipe in load_both(tmp_path):
        assert type(pipe.vae).__name__ == "AutoencoderTiny"
        assert abs(paint(pipe, small_photo) - ours).max() < 2e-3  # observed: 1e-6
    report = depthdiff.inspect_checkpoint.inspect(tmp_path)
    assert report.loads and "AutoencoderTiny" in report.text()
    assert depthdiff.inspect_checkpoint.inspect(tmp_path / "vae").loads
