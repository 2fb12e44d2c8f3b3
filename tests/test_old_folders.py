"""Old forms of a checkpoint: each is generated, loads, and gives the very picture of the form that is written today."""

import json
import shutil

import pytest
import torch
from random_checkpoint import GEOMETRIES, randomize
from safetensors.torch import load_file, save_file

from depthdiff import (
    CheckpointError,
    DPTForDepthEstimation,
    DPTImageProcessor,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
)
from depthdiff.checkpoint.weights import open_pickle
from tests.weights import realigned

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "depth_estimator": "model",
}
PICKLED = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def paint(pipe, photo):
    realigned(pipe).set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipe("a cat", photo, num_inference_steps=2, strength=1.0, generator=generator, output_type="pt").images


def edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def take(folder, name):
    """Return the weights of a component, and remove their file."""
    path = folder / name / f"{STEMS[name]}.safetensors"
    state = load_file(path)
    path.unlink()
    return state


def old_names(folder, dims=0):
    state = take(folder, "vae")
    for key in [key for key in state if "attentions" in key]:
        value = state.pop(key)
        for new, old in OLD.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = value.reshape(*value.shape, *[1] * dims) if value.ndim == 2 else value
    save_file(state, folder / "vae" / "diffusion_pytorch_model.safetensors")


def text_names(folder, prefix):
    state = {key.removeprefix("text_model."): value for key, value in take(folder, "text_encoder").items()}
    state["embeddings.position_ids"] = torch.arange(77)[None]
    save_file({prefix + key: value for key, value in state.items()}, folder / "text_encoder" / "model.safetensors")


def pickles(folder, *, zipped=True, wrap=dict):
    for name, stem in STEMS.items():
        path = folder / name / f"{PICKLED[stem]}.bin"
        torch.save(wrap(take(folder, name)), path, _use_new_zipfile_serialization=zipped)


def parameters(state):
    return {key: torch.nn.Parameter(value) for key, value in state.items()}


def sharded_pickles(folder):
    for name, stem in STEMS.items():
        state, stem = take(folder, name), PICKLED[stem]
        keys, names = sorted(state), [f"{stem}-0000{i}-of-00003.bin" for i in (1, 2, 3)]
        for i, file in enumerate(names):
            torch.save({key: state[key] for key in keys[i::3]}, folder / name / file)
        index = {"metadata": {}, "weight_map": {key: names[i % 3] for i, key in enumerate(keys)}}
        (folder / name / f"{stem}.bin.index.json").write_text(json.dumps(index))


def old_configs(folder):
    """As diffusers 0.10 and transformers 4.26 wrote them."""
    cache = "/home/someone/.cache/huggingface/diffusers/models--stabilityai--stable-diffusion-2-depth/snapshots/x/"
    edit(
        folder / "vae" / "config.json",
        lambda c: {k: v for k, v in c.items() if k not in NEW} | {"_name_or_path": cache},
    )
    for name in ("unet", "text_encoder", "depth_estimator"):
        edit(folder / name / "config.json", lambda c: c | {"_name_or_path": cache, "_commit_hash": "65776c96"})
    edit(folder / "scheduler" / "scheduler_config.json", lambda c: {k: v for k, v in c.items() if k not in NEW})


NEW = ("scaling_factor", "force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
       "timestep_spacing", "rescale_betas_zero_snr")  # fmt: skip


def old_preprocessor(folder, **change):
    """As transformers 4.25 wrote it, where the class had its first name."""
    old = {
        "do_normalize": True, "do_resize": True, "ensure_multiple_of": 1,
        "feature_extractor_type": "DPTFeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "keep_aspect_ratio": False,
        "resample": 3, "size": 64,
    }  # fmt: skip
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(old | change))
    edit(folder / "model_index.json", lambda c: c | {"feature_extractor": ["transformers", "DPTFeatureExtractor"]})


FORMS = {
    "autoencoder before 0.17": old_names,
    "autoencoder before 0.17, as convolutions": lambda f: old_names(f, dims=2),
    "text encoder with prefix": lambda f: text_names(f, "text_model."),
    "text encoder without prefix": lambda f: text_names(f, ""),
    "pickles": pickles,
    "pickles of the time before torch 1.6": lambda f: pickles(f, zipped=False),
    "pickles of parameters": lambda f: pickles(f, wrap=parameters),
    "pickles within a state_dict": lambda f: pickles(f, wrap=lambda state: {"state_dict": state, "epoch": 3}),
    "pickles in parts": sharded_pickles,
    "configs of 2022": old_configs,
    "preprocessor of 2022": old_preprocessor,
    "preprocessor of 2023": lambda f: old_preprocessor(
        f, size={"height": 64, "width": 64}, image_processor_type="DPTImageProcessor", feature_extractor_type=None
    ),
}


@pytest.fixture(scope="module")
def expected(tiny_folder):
    cache = {}

    def picture(photo, dtype=torch.float32):
        if dtype not in cache:
            pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder).to(dtype).to(torch.float32)
            cache[dtype] = paint(pipe, photo)
        return cache[dtype]

    return picture


@pytest.mark.parametrize("form", FORMS)
def test_the_same_picture(folder, small_photo, expected, form):
    FORMS[form](folder)
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder)
    assert torch.equal(paint(pipe, small_photo), expected(small_photo))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("form", ["variant", "variant in parts", "branch"])
def test_half_precision(folder, small_photo, expected, form, suffix):
    """A variant beside the full weights, or, as on the branch "fp16", half weights under the plain names."""
    dotted = ".fp16" if form.startswith("variant") else ""
    for name, stem in STEMS.items():
        path = folder / name / f"{stem}.safetensors"
        half = {key: value.half() for key, value in load_file(path).items()}
        stem = PICKLED[stem] if suffix == "bin" else stem
        (folder / name / "other.bin").write_bytes(b"never opened")
        if form == "branch":
            path.unlink()
        write = torch.save if suffix == "bin" else save_file
        if form != "variant in parts":
            write(half, folder / name / f"{stem}{dotted}.{suffix}")
            continue
        names = [f"{stem}.fp16-0000{i}-of-00002.{suffix}" for i in (1, 2)]
        for i, file in enumerate(names):
            write({key: half[key] for key in sorted(half)[i::2]}, folder / name / file)
        index = {"weight_map": {key: names[i % 2] for i, key in enumerate(sorted(half))}}
        (folder / name / f"{stem}.{suffix}.index.fp16.json").write_text(json.dumps(index))
    variant = "fp16" if dotted else None
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder, variant=variant)
    assert torch.equal(paint(pipe, small_photo), expected(small_photo, torch.float16))
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", variant=variant, torch_dtype="auto")
    assert unet.dtype == torch.float16  # of one network, the file's own


def test_which_form_is_read(folder):
    """Safetensors where there are any; the other by asking for it."""
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({key: value + 1 for key, value in state.items()}, folder / "unet" / "diffusion_pytorch_model.bin")
    kind = type(StableDiffusionDepth2ImgPipeline.from_pretrained(folder).unet)
    for choice, offset in ((None, 0), (True, 0), (False, 1)):
        unet = kind.from_pretrained(folder, subfolder="unet", use_safetensors=choice)
        assert torch.equal(unet.conv_in.weight, state["conv_in.weight"] + offset)
    with pytest.raises(
        CheckpointError, match=r"vae has no diffusion_pytorch_model\.bin: .*leave out use_safetensors=False"
    ):
        StableDiffusionDepth2ImgPipeline.from_pretrained(folder, use_safetensors=False)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"leave out use_safetensors=True"):
        StableDiffusionDepth2ImgPipeline.from_pretrained(folder, use_safetensors=True)


def test_pickles_are_mapped(folder):
    """Of torch's present format; tensors that share their memory stay right when they are cast."""
    path = folder / "shared.bin"
    whole = torch.randn(100_000)
    for zipped in (True, False):
        torch.save(
            {"a": whole, "b": whole[:50_000], "c": whole.view(100, -1).T}, path, _use_new_zipfile_serialization=zipped
        )
        content = open_pickle(path)
        assert {source.mapped for source in content.values()} == {zipped}
        assert torch.equal(content["c"].get(), whole.view(100, -1).T)


PLAIN = {
    "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 48,
    "patch_size": 16, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 12, 16, 20],
    "fusion_hidden_size": 12,
}  # fmt: skip


@pytest.mark.parametrize("form", ["plain, as Intel/dpt-large", "hybrid, as Intel/dpt-hybrid-midas"])
def test_another_depth_net(folder, tmp_path, small_photo, expected, form):
    """A repository of its own: a pickle, a feature extractor of the first name, both beside each other."""
    config = PLAIN if form.startswith("plain") else GEOMETRIES["tiny"]["depth_estimator"]
    net = DPTForDepthEstimation.from_config(config)
    randomize(net, 7)
    net.eval().save_pretrained(tmp_path / "dpt")
    path = tmp_path / "dpt" / "model.safetensors"
    torch.save(load_file(path), tmp_path / "dpt" / "pytorch_model.bin")
    path.unlink()
    (tmp_path / "dpt" / "feature_extractor").mkdir()
    shutil.copy(folder / "model_index.json", tmp_path / "dpt")
    old_preprocessor(tmp_path / "dpt", size=config["image_size"])
    (tmp_path / "dpt" / "feature_extractor" / "preprocessor_config.json").rename(
        tmp_path / "dpt" / "preprocessor_config.json"
    )
    shutil.rmtree(folder / "depth_estimator")
    parts = {
        "depth_estimator": DPTForDepthEstimation.from_pretrained(tmp_path / "dpt"),
        "feature_extractor": DPTImageProcessor.from_pretrained(tmp_path / "dpt"),
    }
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder, **parts)
    picture = paint(pipe, small_photo)
    again = StableDiffusionDepth2ImgPipeline.from_pretrained(
        folder, depth_estimator=net, feature_extractor=parts["feature_extractor"]
    )
    assert torch.equal(picture, paint(again, small_photo))
    assert not torch.equal(picture, expected(small_photo))


OTHERS = {
    "StableDiffusionPipeline, base": (4, 1024, "epsilon", "Stable Diffusion 2 or 2.1 base"),
    "StableDiffusionPipeline, 768": (4, 1024, "v_prediction", "at 768 pixels .*v-prediction"),
    "StableDiffusionPipeline, 1.5": (4, 768, "epsilon", "Stable Diffusion 1"),
    "StableDiffusionXLPipeline": (4, 2048, "epsilon", "Stable Diffusion XL"),
    "StableDiffusionInpaintPipeline": (9, 1024, "epsilon", "an inpainting model"),
    "StableDiffusionUpscalePipeline": (7, 1024, "v_prediction", r"an upscaler \(x4\)"),
    "StableDiffusionInstructPix2PixPipeline": (8, 768, "epsilon", "edits by instruction"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_named(folder, name):
    """Recognised by their small files alone: no weights are there. What would do is said."""
    channels, width, prediction, message = OTHERS[name]
    for stem in STEMS:
        take(folder, stem)
    edit(folder / "unet" / "config.json", lambda c: c | {"in_channels": channels, "cross_attention_dim": width})
    edit(folder / "scheduler" / "scheduler_config.json", lambda c: c | {"prediction_type": prediction})
    without = ("depth_estimator", "feature_extractor")
    edit(
        folder / "model_index.json",
        lambda c: {k: v for k, v in c.items() if k not in without} | {"_class_name": name.split(",")[0]},
    )
    with pytest.raises(
        CheckpointError, match=f"{message}.*{channels} channels, depth-to-image needs 5.*Use a depth-to"
    ):
        StableDiffusionDepth2ImgPipeline.from_pretrained(folder)


def test_the_parts_of_another_model_serve(tiny_folder, folder, small_photo, expected):
    """A text-to-image checkpoint lends its text encoder and autoencoder, where the rest is passed."""
    whole = StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder)
    edit(folder / "unet" / "config.json", lambda c: c | {"in_channels": 4})
    edit(folder / "model_index.json", lambda c: {k: v for k, v in c.items() if not k.startswith(("depth", "feature"))})
    with pytest.raises(CheckpointError, match="4 channels"):
        StableDiffusionDepth2ImgPipeline.from_pretrained(folder)
    given = {name: getattr(whole, name) for name in ("unet", "depth_estimator", "feature_extractor")}
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder, **given)
    assert torch.equal(paint(pipe, small_photo), expected(small_photo))


def test_folders_that_are_no_pipeline(tiny_folder, tmp_path):
    for name, message in {
        "": "did you mean the folder checkpoint",
        "checkpoint/unet": "one component",
        "single": "512-depth-ema.ckpt",
        "nothing": "layout of diffusers",
        "models--owner--name": f"name .*snapshots.{'a' * 40}",
    }.items():
        (tmp_path / name).mkdir(exist_ok=True, parents=True)
        if name == "single":
            (tmp_path / name / "512-depth-ema.ckpt").write_bytes(b"")
        elif name.startswith("models"):
            shutil.copytree(tiny_folder, tmp_path / name / "snapshots" / ("a" * 40))
        elif name == "":
            shutil.copytree(tiny_folder, tmp_path / "checkpoint")
        with pytest.raises(CheckpointError, match=f"has no model_index.json: .*{message}"):
            StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / name)
