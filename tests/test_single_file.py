"""Single files: tensors and pictures of their folder twins, key lists one to one, partial files, what is refused."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from depthdiff import (
    AutoencoderKL,
    CheckpointError,
    CLIPTextModel,
    DDIMScheduler,
    DPTForDepthEstimation,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
)
from depthdiff.checkpoint.geometry import INFER, Shapes
from depthdiff.checkpoint.ldm import IGNORED, IGNORED_PREFIXES, KEPT, PREFIXES, TABLES, TABLES_LDM
from depthdiff.checkpoint.loading import build
from depthdiff.checkpoint.single_file import find_single_file, open_single_file
from depthdiff.inspect_checkpoint import inspect
from depthdiff.registry import CLASSES
from tests.ldm import FULL, SMALL, key_lists, random_twins
from tests.weights import realigned

DATA = Path(__file__).parent / "data"
NETWORKS = tuple(CLASSES)


def stored(layout):
    """Read the key lists of the published checkpoint: key -> shape, the keys of a folder with their component."""
    with gzip.open(DATA / f"keys_{layout}.txt.gz", "rt") as file:
        lines = [line.split() for line in file]
    return {key: tuple(map(int, sizes)) for key, *sizes in lines}


def published(layout, component):
    prefix = PREFIXES[component] if layout == "ldm" else f"{component}/"
    return {k.removeprefix(prefix): shape for k, shape in stored(layout).items() if k.startswith(prefix)}


def test_the_independent_writer_gives_the_stored_key_lists():
    """Counts and sizes are the published ones: 686, 248, 372 + 1 and 414 tensors, a file of 5.71 GB."""
    single, folder = key_lists(FULL)
    assert single == stored("ldm")
    assert {f"{part}/{key}": shape for part, keys in folder.items() for key, shape in keys.items()} == stored("folder")
    assert {name: len(folder[name]) for name in NETWORKS} == dict(zip(NETWORKS, (686, 248, 373, 414), strict=True))
    sizes = {name: sum(torch.Size(shape).numel() for shape in folder[name].values()) for name in NETWORKS}
    assert sizes == dict(zip(NETWORKS, (865_913_604, 83_653_863, 340_387_840 + 77, 122_377_985), strict=True))
    assert round(sum(torch.Size(shape).numel() for shape in single.values()) * 4 / 1e9, 2) == 5.71


PUBLISHED = {  # configs of the published folder, as far as they say more than the defaults
    "unet": {
        "in_channels": 5, "attention_head_dim": (5, 10, 20, 20), "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024, "layers_per_block": 2, "use_linear_projection": True, "sample_size": 64,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 256,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "text_encoder": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
        "hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    },
    "depth_estimator": {
        "is_hybrid": True, "image_size": 384, "neck_hidden_sizes": (256, 512, 768, 768), "neck_ignore_stages": (0, 1),
        "reassemble_factors": (1, 1, 1, 0.5), "backbone_out_indices": (2, 5, 8, 11), "num_attention_heads": 12,
        "backbone_featmap_shape": (1, 1024, 24, 24),
    },
}  # fmt: skip


@pytest.mark.parametrize("component", NETWORKS)
def test_both_tables_cover_the_published_keys_one_to_one(component):
    """Every key has one row or a reason, every tensor of ours one key in each layout, and the way back is the same."""
    cls, ldm = CLASSES[component], published("ldm", component)
    inferred = INFER[component](Shapes("file", ldm))
    model = build(cls, inferred, "file")
    expected = build(cls, PUBLISHED[component], "published").config
    apart = ("backbone_config", "_use_default_values")
    assert {k: v for k, v in model.config.items() if k not in apart} == {
        k: v for k, v in expected.items() if k not in apart
    }
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for table, keys in (
        (TABLES_LDM[cls.__name__](model.config), ldm),
        (TABLES[cls.__name__], published("folder", component)),
    ):
        cut = table.cut(keys)
        pairs = table.assign("list", cut, wanted)
        assert pairs.keys() == wanted.keys()
        ignored = [key for key in cut if table.ours(key) is None]
        assert len(pairs) + len(ignored) == len(cut)
        for ours, key in pairs.items():
            assert table.ours(key) == ours
            if "mid_block.attentions.0" not in key or component == "unet":  # the autoencoder's older names are aliases
                assert table.published(ours) == key
    backbone = getattr(model.config, "backbone", None)
    assert backbone is None or (backbone.depths, backbone.widths) == ((3, 4, 9), (256, 512, 1024))


def test_everything_else_in_the_file_has_a_reason():
    rest = [key for key in stored("ldm") if not key.startswith(tuple(PREFIXES.values()))]
    assert len(rest) == 13
    assert all(key in IGNORED for key in rest)
    assert all(len(reason) > 10 for reason in (*IGNORED.values(), *IGNORED_PREFIXES.values()))
    for name, make in TABLES_LDM.items():
        component = next(c for c, cls in CLASSES.items() if cls.__name__ == name)
        table = make(build(CLASSES[component], PUBLISHED[component], "published").config)
        assert all(len(reason) > 10 for reason in table.ignored.values())
    assert all(key in TABLES["DPTForDepthEstimation"].ignored for key in KEPT)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The same random weights as a single file and as a folder, with known configs: (file, folder, tensors)."""
    place = tmp_path_factory.mktemp("twins")
    single, folder = random_twins(SMALL)
    save_file(single, place / "single.safetensors")
    pipe = StableDiffusionDepth2ImgPipeline.from_single_file(place / "single.safetensors")
    pipe.save_pretrained(place / "folder")  # for configs and tokenizer: all weights are overwritten
    for name, tensors in folder.items():
        stem = "diffusion_pytorch_model" if name in ("unet", "vae") else "model"
        save_file(tensors, place / "folder" / name / f"{stem}.safetensors")
    configs = {
        "unet": {"block_out_channels": [64, 128, 192], "attention_head_dim": [1, 2, 3], "in_channels": 5},
        "text_encoder": {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 128, "hidden_act": "gelu"},
        "depth_estimator": {"num_attention_heads": 2, "backbone_out_indices": [2, 2, 2, 4], "image_size": 64},
        "vae": {"block_out_channels": [32, 64, 64, 96], "scaling_factor": 0.18215},
    }
    for name, values in configs.items():
        found = json.loads((place / "folder" / name / "config.json").read_text())
        assert {key: found[key] for key in values} == values
    return place / "single.safetensors", place / "folder", (single, folder)


def draw(pipe, photo):
    realigned(pipe).set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("two tigers!", photo, num_inference_steps=3, generator=generator, output_type="pt").images


def test_a_file_holds_the_tensors_and_makes_the_picture_of_its_folder_twin(twins, small_photo):
    file, folder, _ = twins
    single = StableDiffusionDepth2ImgPipeline.from_single_file(file)
    twin = StableDiffusionDepth2ImgPipeline.from_pretrained(folder)
    for name in NETWORKS:
        one, two = single.networks[name].state_dict(), twin.networks[name].state_dict()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
        assert not single.networks[name].training
    configs = [{k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"} for pipe in (single, twin)]
    assert configs[0] == configs[1]
    image = draw(single, small_photo)
    assert image.isfinite().all() and image.std() > 0.01
    assert torch.equal(image, draw(twin, small_photo))


def test_a_pickled_file_is_the_same(twins, tmp_path):
    """With and without `state_dict`, in torch's formats of today and before 1.6; the averaged UNet is left alone."""
    file, _, (tensors, _) = twins
    ema = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int32)}
    ema["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(3)
    contents = {
        "state_dict.ckpt": ({"state_dict": {**tensors, **ema}, "global_step": 7}, True),
        "plain.pt": ({**tensors, **ema}, True),
        "old.ckpt": ({"state_dict": tensors}, False),
    }
    expected = UNet2DConditionModel.from_single_file(file).state_dict()
    for name, (content, zipped) in contents.items():
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        found = UNet2DConditionModel.from_single_file(tmp_path / name).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto", None])
def test_dtypes(twins, dtype):
    text_encoder = CLIPTextModel.from_single_file(twins[0], torch_dtype=dtype)
    assert text_encoder.dtype == {None: torch.float32, "auto": torch.float32}.get(dtype, dtype)
    wide = CLIPTextModel.from_single_file(twins[0]).encoder.layers[1].self_attn.k_proj.weight
    assert torch.equal(text_encoder.encoder.layers[1].self_attn.k_proj.weight, wide.to(text_encoder.dtype))


@pytest.mark.parametrize("start", [b"\x80", b"\x80\x02"])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, start):
    """One header in 32 has a length that begins with the byte of a pickle; its file is read like the others."""
    tensors = part_of(random_twins(SMALL)[0], "vae")
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    longer = next(n for n in range(length, length + 2**17) if n.to_bytes(8, "little").startswith(start))
    path = tmp_path / "x.safetensors"
    path.write_bytes(longer.to_bytes(8, "little") + data[8 : 8 + length].ljust(longer) + data[8 + length :])
    assert inspect(path).form == "safetensors"
    vae = AutoencoderKL.from_single_file(path)
    assert torch.equal(vae.quant_conv.bias, tensors["first_stage_model.quant_conv.bias"])


def test_each_network_alone(twins):
    for cls in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, DPTForDepthEstimation):
        assert cls.from_single_file(twins[0]).num_parameters() > 0


def test_overrides_prediction_type_and_config(twins):
    file, folder, _ = twins
    scheduler = DDIMScheduler()
    pipe = StableDiffusionDepth2ImgPipeline.from_single_file(file, scheduler=scheduler, depth_estimator=None)
    assert pipe.scheduler is scheduler and pipe.depth_estimator is None
    pipe = StableDiffusionDepth2ImgPipeline.from_single_file(file, prediction_type="v_prediction")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe = StableDiffusionDepth2ImgPipeline.from_single_file(file, config=folder)
    assert pipe.feature_extractor.config.size == {"height": 64, "width": 64}
    with pytest.raises(ValueError, match="give one of them"):
        StableDiffusionDepth2ImgPipeline.from_single_file(file, scheduler=scheduler, prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type is 'eps'; implemented here"):
        StableDiffusionDepth2ImgPipeline.from_single_file(file, prediction_type="eps")
    with pytest.raises(TypeError, match="did you mean 'scheduler'"):
        StableDiffusionDepth2ImgPipeline.from_single_file(file, schedular=scheduler)


def part_of(tensors, component, prefix=True):
    stem = PREFIXES[component]
    chosen = {key: tensor for key, tensor in tensors.items() if key.startswith(stem)}
    return chosen if prefix else {key.removeprefix(stem): tensor for key, tensor in chosen.items()}


def test_partial_files_load_into_a_pipeline(twins, tmp_path):
    """UNet and autoencoder, with and without prefix, safetensors and `.vae.pt`, also in the folder's names."""
    _, folder, (_, _) = twins
    other, other_folder = random_twins(SMALL, seed=1)
    loss = {"loss.logvar": torch.zeros(())}
    save_file(part_of(other, "unet"), tmp_path / "unet.safetensors")
    save_file(part_of(other, "unet", prefix=False), tmp_path / "bare.safetensors")
    torch.save({"state_dict": part_of(other, "vae", prefix=False) | loss}, tmp_path / "x.vae.pt")
    save_file(part_of(other, "vae"), tmp_path / "vae.safetensors")
    save_file(other_folder["unet"], tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(other_folder["vae"], tmp_path / "vae_of_a_folder.safetensors")
    names = {"unet": ("unet.safetensors", "bare.safetensors", "diffusion_pytorch_model.safetensors")}
    names["vae"] = ("x.vae.pt", "vae.safetensors", "vae_of_a_folder.safetensors")
    expected = {"unet": other["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"]}
    expected["vae"] = other["first_stage_model.encoder.down.0.block.0.conv1.weight"]
    for component, files in names.items():
        for file in files:
            pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
            before = pipe.text_encoder
            assert pipe.load_single_file(tmp_path / file) == [component]
            loaded = getattr(pipe, component)
            blocks = loaded.down_blocks if component == "unet" else loaded.encoder.down_blocks
            assert torch.equal(blocks[0].resnets[0].conv1.weight, expected[component].bfloat16()), file
            assert pipe.text_encoder is before
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder)
    rest = {name: part for name, part in pipe.components.items() if name not in ("unet", "scheduler")}
    again = StableDiffusionDepth2ImgPipeline.from_single_file(tmp_path / "bare.safetensors", **rest)
    assert again.vae is pipe.vae
    with pytest.raises(CheckpointError, match=r"holds unet alone; pass the rest as vae=..., text_encoder=..."):
        StableDiffusionDepth2ImgPipeline.from_single_file(tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"no config; name a folder or repository that has it as config="):
        UNet2DConditionModel.from_single_file(tmp_path / "diffusion_pytorch_model.safetensors")
    unet = UNet2DConditionModel.from_single_file(tmp_path / "diffusion_pytorch_model.safetensors", config=folder)
    assert torch.equal(unet.down_blocks[0].resnets[0].conv1.weight, expected["unet"])


def test_nothing_changes_where_a_partial_file_is_refused(twins, tmp_path):
    file, folder, (tensors, _) = twins
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder)
    before = dict(pipe.components)
    broken = dict(tensors)
    del broken["first_stage_model.decoder.conv_out.bias"]
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of \d+ weights missing, first: 'decoder.conv_out.bias'"):
        pipe.load_single_file(tmp_path / "broken.safetensors")
    assert pipe.components == before
    for change, message in (
        (load_a_lora, "unload or unfuse them first"),
        (load_and_fuse_a_lora, "unload or unfuse them first"),
        (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), r"call remove_all_hooks\(\) first"),
    ):
        pipe = StableDiffusionDepth2ImgPipeline(**before)
        change(pipe)
        with pytest.raises(ValueError, match=message):
            pipe.load_single_file(file)
        assert pipe.components == before


def load_a_lora(pipe):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = pipe.unet.config.block_out_channels[-1]
    pipe.load_lora_weights(
        {f"{layer}.lora_A.weight": torch.ones(1, width), f"{layer}.lora_B.weight": torch.ones(width, 1)}
    )


def load_and_fuse_a_lora(pipe):
    load_a_lora(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def with_channels(tensors, channels):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return {**tensors, key: torch.zeros(tensors[key].shape[0], channels, 3, 3)}


def altered(tensors, key, change):
    return {**tensors, key: change(tensors[key])}


EXTRA = "model.diffusion_model.middle_block.1.extra.weight"
REFUSED = {
    "four channels": (lambda t: with_channels(t, 4), r"text-to-image.*takes 4 channels.*such as sd2-community/"),
    "nine channels": (lambda t: with_channels(t, 9), r"an inpainting model.*StableDiffusionInpaintPipeline"),
    "unknown layer": (lambda t: {**t, EXTRA: torch.zeros(2)}, r"1 of \d+ keys match no layer.*extra"),
    "unknown part": (
        lambda t: {**t, "lid.weight": torch.zeros(2)},
        r"1 keys belong to no network, first: 'lid.weight'",
    ),
    "sd1": (
        lambda t: {**t, "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(2)},
        "is a Stable Diffusion 1 checkpoint",
    ),
    "lora": (lambda t: {"lora_unet_x.lora_up.weight": torch.zeros(2)}, "is a LoRA; load it.*load_lora_weights"),
    "stack that does not divide": (
        lambda t: altered(t, "depth_model.model.pretrained.model.blocks.0.attn.qkv.weight", lambda x: x[:-1].clone()),
        "match no layer, first: 'pretrained.model.blocks.0.attn.qkv.weight'",
    ),
    "integers": (
        lambda t: altered(t, "first_stage_model.quant_conv.bias", lambda x: x.to(torch.int8)),
        "'quant_conv.bias' is of type I8, expected floats",
    ),
    "no backbone": (
        lambda t: {key: x for key, x in t.items() if "backbone" not in key},
        r"only DPT-Hybrid is read.*Pass another as depth_estimator=",
    ),
    "attention after some layers": (
        lambda t: {key: x for key, x in t.items() if not key.startswith("model.diffusion_model.output_blocks.3.1.")},
        "has attention after some layers only",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(twins, tmp_path, case):
    change, message = REFUSED[case]
    save_file(change(twins[2][0]), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        StableDiffusionDepth2ImgPipeline.from_single_file(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


def test_another_vocabulary_needs_its_tokenizer(twins, tmp_path):
    smaller = altered(twins[2][0], "cond_stage_model.model.token_embedding.weight", lambda x: x[:600].clone())
    save_file(smaller, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"knows 600 tokens.*pass its tokenizer as tokenizer="):
        StableDiffusionDepth2ImgPipeline.from_single_file(tmp_path / "x.safetensors")


NAMES = {
    "owner/name/sub/a.safetensors": ("owner/name", ["sub/a.safetensors"], None),
    "https://huggingface.co/owner/name/resolve/fp16/a.ckpt?download=true": ("owner/name", ["a.ckpt"], "fp16"),
    "https://huggingface.co/owner/name/blob/main/b/a.ckpt": ("owner/name", ["b/a.ckpt"], "main"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_on_the_hub(monkeypatch, tmp_path, name):
    repo_id, files, revision = NAMES[name]
    seen = {}

    def fetch(name, filenames, **where):
        seen.update(where, name=name, filenames=filenames)
        return tmp_path

    monkeypatch.setattr("depthdiff.checkpoint.single_file.fetch", fetch)
    assert find_single_file(name, token="t") == tmp_path / files[0]
    assert {"revision": None, **seen} == {"name": repo_id, "filenames": files, "revision": revision, "token": "t"}


def test_an_address_and_a_revision_must_agree(monkeypatch, tmp_path):
    monkeypatch.setattr("depthdiff.checkpoint.single_file.fetch", lambda name, filenames, **where: tmp_path)
    address = "https://huggingface.co/owner/name/resolve/fp16/a.ckpt"
    assert find_single_file(address, revision="fp16") == tmp_path / "a.ckpt"
    with pytest.raises(ValueError, match="revision is 'main', but the address names 'fp16'"):
        find_single_file(address, revision="main")


BAD_NAMES = {
    "owner/name/../../etc/a.ckpt": "leaves its repository",
    r"owner/name/sub\a.ckpt": "leaves its repository",
    "https://example.com/owner/name/resolve/main/a.ckpt": "is not an address of a known Hub",
    "https://example.com/a.ckpt": "is not a file here",
    "nothing.safetensors": "is not a file here",
    "owner/name": "is not a file here",
    "/no/such/a.safetensors": "is not a file here",
    "": "is not a file here",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_name_no_file(name):
    with pytest.raises(CheckpointError, match=BAD_NAMES[name]):
        StableDiffusionDepth2ImgPipeline.from_single_file(name)


def test_folders_and_files_are_told_apart(tiny_folder, twins):
    with pytest.raises(CheckpointError, match="from_pretrained loads folders"):
        StableDiffusionDepth2ImgPipeline.from_single_file(tiny_folder)
    with pytest.raises(CheckpointError, match="from_single_file loads files"):
        StableDiffusionDepth2ImgPipeline.from_pretrained(twins[0])


def test_the_file_stays_mapped(twins):
    """Weights that keep their dtype are the file's own pages; stacked ones are views of them."""
    pipe = StableDiffusionDepth2ImgPipeline.from_single_file(twins[0])
    size = twins[0].stat().st_size
    begin = min(p.data_ptr() for net in pipe.networks.values() for p in net.parameters())
    end = max(p.data_ptr() + p.nbytes for net in pipe.networks.values() for p in net.parameters())
    assert end - begin < size
    assert open_single_file(twins[0]).unknown == []
