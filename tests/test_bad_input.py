"""Wrong calls: each is refused before the first step, with a message that names argument, value and remedy."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoint import GEOMETRIES, build_pipeline

from depthdiff import (
    AutoencoderKL,
    CheckpointError,
    CLIPTextModel,
    DDIMScheduler,
    DPTForDepthEstimation,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
)

PHOTO = Image.new("RGB", (64, 48), "brown")
PHOTO.putpixel((3, 5), (255, 255, 255))
TENSOR = torch.rand(1, 3, 48, 64)
NAN = torch.full((1, 3, 48, 64), torch.nan)
EMBEDS = torch.randn(1, 77, 40)
LATENTS = torch.randn(1, 4, 6, 8)
G = torch.Generator

CALLS = {
    # prompts
    "no prompt": ({"prompt": None}, ValueError, "`prompt` or `prompt_embeds`"),
    "prompt of numbers": ({"prompt": 5}, ValueError, "`prompt`.*int"),
    "tuple of prompts": ({"prompt": ("a", "b")}, ValueError, "`prompt`.*tuple"),
    "list with a number": ({"prompt": ["a", 3]}, ValueError, "`prompt`"),
    "empty list of prompts": ({"prompt": []}, ValueError, "at least one text"),
    "prompt twice": ({"prompt_embeds": EMBEDS}, ValueError, "both `prompt` and `prompt_embeds`"),
    "negative prompt of numbers": ({"negative_prompt": 5}, ValueError, "`negative_prompt`"),
    "negative prompt twice": (
        {"negative_prompt": "b", "negative_prompt_embeds": EMBEDS},
        ValueError,
        "both `negative_prompt` and",
    ),
    "three negative prompts for one": (
        {"negative_prompt": ["a", "b", "c"]},
        ValueError,
        "batch size 3, but `prompt` 1",
    ),
    "embeds that are no tensor": (
        {"prompt": None, "prompt_embeds": [1.0]},
        TypeError,
        "`prompt_embeds` must be a tensor",
    ),
    "embeds of two dimensions": ({"prompt": None, "prompt_embeds": EMBEDS[0]}, ValueError, r"\(B, L, C\).*\(77, 40\)"),
    "whole-number embeds": ({"prompt": None, "prompt_embeds": EMBEDS.long()}, ValueError, "float tensor"),
    "embeds of another width": ({"prompt": None, "prompt_embeds": EMBEDS[..., :9]}, ValueError, "40 wide.*got 9"),
    "embeds with NaN": ({"prompt": None, "prompt_embeds": EMBEDS * torch.nan}, ValueError, "finite"),
    "embeds of two shapes": (
        {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:, :70]},
        ValueError,
        "same shape",
    ),
    # numbers
    "strength above one": ({"strength": 1.4}, ValueError, r"strength must be in \[0, 1\], got 1.4"),
    "negative strength": ({"strength": -0.1}, ValueError, "strength.*-0.1"),
    "strength as text": ({"strength": "0.8"}, TypeError, "strength must be a number, got str '0.8'"),
    "strength NaN": ({"strength": float("nan")}, ValueError, "strength"),
    "strength True": ({"strength": True}, TypeError, "strength.*bool"),
    "no steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be from 1 to 1000, got 0"),
    "too many steps": ({"num_inference_steps": 1001}, ValueError, "1001"),
    "half a step": ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps must be an int"),
    "a range without numbers": ({"depth_range": torch.empty(2, device="meta")}, TypeError, "depth_range.*meta device"),
    "a sparse range": ({"depth_range": torch.eye(2)[0].to_sparse()}, TypeError, "depth_range.*sparse"),
    "negative guidance": ({"guidance_scale": -1}, ValueError, "guidance_scale"),
    "infinite guidance": ({"guidance_scale": float("inf")}, ValueError, "guidance_scale"),
    "guidance as text": ({"guidance_scale": "high"}, TypeError, "guidance_scale.*str"),
    "no pictures": ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
    "half a picture": ({"num_images_per_prompt": 1.5}, TypeError, "num_images_per_prompt must be an int"),
    "eta above one": ({"eta": 1.5}, ValueError, "eta"),
    "eta as text": ({"eta": "none"}, TypeError, "eta"),
    "clip_skip beyond the layers": ({"clip_skip": 3}, ValueError, r"clip_skip must be in \[0, 2\], got 3"),
    "clip_skip as text": ({"clip_skip": "1"}, TypeError, "clip_skip"),
    # images
    "no image": ({"image": None}, ValueError, "`image` input cannot be undefined"),
    "path instead of an image": ({"image": "photo.png"}, TypeError, "image.*str"),
    "empty list of images": ({"image": []}, ValueError, "image"),
    "list of mixed kinds": ({"image": [PHOTO, TENSOR[0]]}, (TypeError, ValueError), "image"),
    "images of two sizes": ({"image": [PHOTO, PHOTO.resize((32, 48))]}, ValueError, "48.*32|32.*48"),
    "image with NaN": ({"image": NAN}, ValueError, "image.*finite|NaN"),
    "image with infinity": ({"image": TENSOR / 0}, ValueError, "image"),
    "bytes as floats": ({"image": TENSOR * 255}, ValueError, "image"),
    "five channels": ({"image": torch.rand(1, 5, 48, 64)}, ValueError, "image"),
    "five dimensions": ({"image": TENSOR[None]}, ValueError, "image"),
    "whole numbers of 16 bit": ({"image": np.full((48, 64, 3), 700, dtype=np.int64)}, (TypeError, ValueError), "image"),
    "smaller than a latent": ({"image": PHOTO.resize((7, 7))}, ValueError, "7"),
    "no pixel": ({"image": np.zeros((1, 0, 64, 3), dtype=np.uint8)}, ValueError, "image"),
    "latents without depth": ({"image": LATENTS}, ValueError, "`depth_map`"),
    "latents with NaN": ({"image": LATENTS * torch.nan, "depth_map": TENSOR[:, 0]}, ValueError, "finite"),
    # depth
    "depth as text": ({"depth_map": "depth.png"}, TypeError, "depth_map"),
    "depth with NaN": ({"depth_map": NAN[:, 0]}, ValueError, "depth_map"),
    "depth of five dimensions": ({"depth_map": TENSOR[None]}, ValueError, "depth_map"),
    "colour depth tensor": ({"depth_map": torch.rand(1, 3, 48, 64)}, ValueError, "depth_map"),
    "empty depth": ({"depth_map": torch.rand(1, 0, 5)}, ValueError, "depth_map"),
    # pairs
    "three prompts, two images": (
        {"prompt": ["a", "b", "c"], "image": [PHOTO, PHOTO]},
        ValueError,
        "Cannot duplicate `image` of batch size 2 to the 3 of `prompt`",
    ),
    "two prompts, three images": (
        {"prompt": ["a", "b"], "image": [PHOTO] * 3},
        ValueError,
        "Cannot duplicate `prompt`",
    ),
    "two depth maps, three images": (
        {"image": [PHOTO] * 3, "depth_map": torch.rand(2, 48, 64)},
        ValueError,
        "Cannot duplicate `depth_map`",
    ),
    "three generators for two pictures": (
        {"generator": [G(), G(), G()], "num_images_per_prompt": 2},
        ValueError,
        "list of generators of length 3.*effective batch size of 2",
    ),
    "seed instead of a generator": ({"generator": 42}, TypeError, "generator must be a torch.Generator.*int"),
    "list of seeds": ({"generator": [1]}, TypeError, "generator"),
    # the rest
    "unknown output": ({"output_type": "jpg"}, ValueError, "output_type must be one of pil, np, pt, latent, got 'jpg'"),
    "unknown argument": ({"guidance": 3}, TypeError, "'guidance'; did you mean 'guidance_scale'"),
    "attention argument that is no name": ({"cross_attention_kwargs": {1: 1}}, TypeError, "must have texts as keys"),
    "scale of an adapter": ({"cross_attention_kwargs": {"scale": float("nan")}}, ValueError, "scale must be"),
    "scale that is no number": ({"cross_attention_kwargs": {"scale": "1"}}, TypeError, "scale must be"),
    "callback that cannot be called": ({"callback_on_step_end": 5}, TypeError, "callback_on_step_end"),
    "callback tensor that is none": (
        {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
        ValueError,
        "callback_on_step_end_tensor_inputs.*noise",
    ),
    "no callback step": ({"callback": print, "callback_steps": 0}, ValueError, "callback_steps"),
}


@pytest.fixture(scope="module")
def fast():
    """A pipeline whose UNet must not be reached."""
    pipeline = build_pipeline("tiny")
    pipeline.set_progress_bar_config(disable=True)

    def forbidden(*args, **kwargs):
        raise AssertionError("the first step was reached")

    pipeline.unet.register_forward_pre_hook(forbidden)
    return pipeline


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls(fast, case):
    arguments, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        fast(**{"prompt": "two tigers", "image": PHOTO, "num_inference_steps": 3, **arguments})


def damage(name, action):
    return lambda folder: action(folder / name)


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = {
    "no model_index": (damage("model_index.json", lambda p: p.unlink()), "no model_index.json"),
    "model_index that is no JSON": (damage("model_index.json", lambda p: p.write_text("<html>")), "model_index.json"),
    "model_index that is a list": (damage("model_index.json", lambda p: p.write_text("[]")), "JSON object, got list"),
    "component not named": (damage("model_index.json", lambda p: rewrite(p, '"unet"', '"net"')), "has no unet"),
    "component of another class": (
        damage("model_index.json", lambda p: rewrite(p, "PNDMScheduler", "FlowMatchScheduler")),
        "scheduler is a FlowMatchScheduler; implemented here: DDIMInverseScheduler",
    ),
    "folder missing": (damage("vae", shutil.rmtree), r"checkpoint has no folder vae, which its model_index.json names"),
    "key twice in a config": (
        damage("unet/config.json", lambda p: rewrite(p, '"in_channels": 5', '"in_channels": 4, "in_channels": 5')),
        r"unet/config\.json cannot be read: 'in_channels' stands twice",
    ),
    "config missing": (damage("unet/config.json", lambda p: p.unlink()), "unet has no config.json"),
    "config of another network": (
        damage("unet/config.json", lambda p: rewrite(p, "UNet2DConditionModel", "AutoencoderKL")),
        "describes a AutoencoderKL, expected a UNet2DConditionModel",
    ),
    "block that is not implemented": (
        damage("unet/config.json", lambda p: rewrite(p, '"DownBlock2D"', '"AttnDownBlock2D"')),
        "down_block_types is 'AttnDownBlock2D'; implemented here: 'CrossAttnDownBlock2D', 'DownBlock2D'",
    ),
    "config value of a wrong type": (
        damage("unet/config.json", lambda p: rewrite(p, '"in_channels": 5', '"in_channels": "five"')),
        "in_channels must be int, got 'five'",
    ),
    "config that does not fit the weights": (
        damage("unet/config.json", lambda p: rewrite(p, '"cross_attention_dim": 40', '"cross_attention_dim": 48')),
        "wrong shape",
    ),
    "weights missing": (damage(UNET_WEIGHTS, lambda p: p.unlink()), "no diffusion_pytorch_model.safetensors"),
    "weights cut off": (
        damage(UNET_WEIGHTS, lambda p: p.write_bytes(p.read_bytes()[:5000])),
        r"safetensors is cut off: it has 5,000 bytes, its header alone .* download interrupted",
    ),
    "weights that are a web page": (
        damage(UNET_WEIGHTS, lambda p: p.write_text("<!doctype html>" * 9)),
        "is a web page",
    ),
    "weights of another network": (
        lambda folder: shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / UNET_WEIGHTS),
        "keys match no layer",
    ),
    "vocabulary missing": (
        lambda folder: [(folder / "tokenizer" / name).unlink() for name in ("vocab.json", "merges.txt")],
        "vocab|merges|tokenizer",
    ),
    "scheduler with an unknown curve": (
        damage("scheduler/scheduler_config.json", lambda p: rewrite(p, "scaled_linear", "cubic")),
        "beta_schedule.*'cubic'",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_folders(tiny_folder, tmp_path, case):
    action, message = FILES[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    action(folder)
    with pytest.raises(CheckpointError, match=message):
        StableDiffusionDepth2ImgPipeline.from_pretrained(folder)


LOADS = {
    "no such folder": (
        lambda f: StableDiffusionDepth2ImgPipeline.from_pretrained("./nowhere"),
        CheckpointError,
        "neither a folder nor a Hub id",
    ),
    "a file": (
        lambda f: StableDiffusionDepth2ImgPipeline.from_pretrained(f / "model_index.json"),
        CheckpointError,
        "is a file",
    ),
    "empty name": (
        lambda f: StableDiffusionDepth2ImgPipeline.from_pretrained(""),
        CheckpointError,
        "neither a folder nor a Hub id",
    ),
    "three-part name": (lambda f: UNet2DConditionModel.from_pretrained("a/b/c"), CheckpointError, "owner/name"),
    "dtype as text": (
        lambda f: StableDiffusionDepth2ImgPipeline.from_pretrained(f, torch_dtype="half"),
        ValueError,
        "torch_dtype.*'half'",
    ),
    "whole-number dtype": (
        lambda f: UNet2DConditionModel.from_pretrained(f, subfolder="unet", torch_dtype=torch.int8),
        ValueError,
        "torch_dtype",
    ),
    "unknown argument": (
        lambda f: StableDiffusionDepth2ImgPipeline.from_pretrained(f, schedular=DDIMScheduler()),
        TypeError,
        "'schedular'; did you mean 'scheduler'",
    ),
    "misspelt option of the Hub": (
        lambda f: UNet2DConditionModel.from_pretrained(f, subfolder="unet").load_lora_adapter(f, local_file_only=True),
        TypeError,
        "'local_file_only'.*did you mean 'local_files_only'",
    ),
    "name of dots": (
        lambda f: UNet2DConditionModel.from_pretrained("a..b"),
        CheckpointError,
        "neither a folder nor a Hub id",
    ),
    "pickles where there are none": (
        lambda f: StableDiffusionDepth2ImgPipeline.from_pretrained(f, use_safetensors=False),
        CheckpointError,
        "leave out use_safetensors=False",
    ),
    "variant that is not there": (
        lambda f: UNet2DConditionModel.from_pretrained(f, subfolder="unet", variant="fp16"),
        CheckpointError,
        "leave out variant",
    ),
    "another network's folder": (
        lambda f: AutoencoderKL.from_pretrained(f / "unet"),
        CheckpointError,
        "UNet2DConditionModel",
    ),
    "channels that are no multiple": (
        lambda f: UNet2DConditionModel.from_config({**GEOMETRIES["tiny"]["unet"], "block_out_channels": [30, 48, 64]}),
        CheckpointError,
        "multiples of 8 groups, got 30",
    ),
    "too few blocks": (
        lambda f: UNet2DConditionModel.from_config({**GEOMETRIES["tiny"]["unet"], "up_block_types": ["UpBlock2D"]}),
        CheckpointError,
        "up_block_types must name 3 blocks",
    ),
    "heads that do not divide": (
        lambda f: CLIPTextModel.from_config({**GEOMETRIES["tiny"]["text_encoder"], "num_attention_heads": 7}),
        CheckpointError,
        "multiple of 7 heads",
    ),
    "readout that is not implemented": (
        lambda f: DPTForDepthEstimation.from_config({"readout_type": "sum"}),
        CheckpointError,
        "readout_type is 'sum'",
    ),
    "four channels": (
        lambda f: StableDiffusionDepth2ImgPipeline.from_pretrained(
            f, unet=UNet2DConditionModel.from_config({**GEOMETRIES["tiny"]["unet"], "in_channels": 4})
        ),
        ValueError,
        "unet.*5.*got 4",
    ),
    "text too narrow": (
        lambda f: StableDiffusionDepth2ImgPipeline.from_pretrained(
            f, text_encoder=CLIPTextModel.from_config({**GEOMETRIES["tiny"]["text_encoder"], "hidden_size": 20})
        ),
        ValueError,
        "text_encoder.*20.*40",
    ),
    "save over a file": (
        lambda f: build_pipeline("tiny").save_pretrained(f / "model_index.json"),
        OSError,
        "is a file",
    ),
    "save in a form of no name": (
        lambda f: build_pipeline("tiny").save_pretrained(f / "new", safe_serialization="no"),
        TypeError,
        "safe_serialization must be True or False",
    ),
    "attention that does not exist": (lambda f: build_pipeline("tiny").set_attention("flash3"), ValueError, "'flash3'"),
    "slices beyond the heads": (lambda f: build_pipeline("tiny").enable_attention_slicing(9), ValueError, "slice_size"),
    "offload to nothing": (
        lambda f: build_pipeline("tiny").enable_model_cpu_offload(device="cuda:99"),
        (ValueError, RuntimeError),
        "cuda",
    ),
    "scheduler from elsewhere": (
        lambda f: StableDiffusionDepth2ImgPipeline.from_pretrained(f, scheduler=object())("a", PHOTO),
        TypeError,
        "scheduler must be a scheduler or work like one, got object without config",
    ),
}


@pytest.mark.parametrize("case", LOADS)
def test_wrong_loads(tiny_folder, case):
    call, error, message = LOADS[case]
    with pytest.raises(error, match=message):
        call(tiny_folder)


def test_there_are_enough_of_them():
    assert len(CALLS) >= 60
