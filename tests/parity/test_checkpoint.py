"""Names, layouts and dtypes of published files, made by diffusers and transformers, against ours."""

import json

import diffusers
import pytest
import torch
import transformers
from random_checkpoint import GEOMETRIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import depthdiff
from depthdiff.checkpoint.ldm import TABLES
from tests.parity.test_networks import DEPTHS, ONE_LEVEL, PLAIN, REFERENCES, UNETS, reference_network, text_config

VAES = {
    "tiny": GEOMETRIES["tiny"]["vae"],
    "small": GEOMETRIES["small"]["vae"],
    "one level, no attention, no quantisation": ONE_LEVEL,
}

CONFIGS = {
    "unet": [GEOMETRIES["full"]["unet"], *UNETS.values()],
    "vae": [GEOMETRIES["full"]["vae"], *VAES.values()],
    "text_encoder": [GEOMETRIES["full"]["text_encoder"]],
    "depth_estimator": [
        GEOMETRIES["full"]["depth_estimator"],
        {**PLAIN, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 384},
        *(config for config, _ in DEPTHS.values()),
    ],
}
PUBLISHED = {"unet": 865_913_604, "vae": 83_653_863, "text_encoder": 340_387_840, "depth_estimator": 122_377_985}


def on_meta(name, config):
    """Build the published network without memory."""
    kind = REFERENCES[name][0]
    with torch.device("meta"):
        if name == "text_encoder":
            return kind(transformers.CLIPTextConfig(**config))
        if name == "depth_estimator":
            return kind(transformers.DPTConfig(**config))
        return kind(**config)


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_cover_the_published_networks_one_to_one(name):
    table = TABLES[REFERENCES[name][0].__name__]
    unused = set(table.rows)
    for config in CONFIGS[name]:
        published = {key: tuple(p.shape) for key, p in on_meta(name, config).state_dict().items()}
        with torch.device("meta"):
            wanted = {k: tuple(p.shape) for k, p in REFERENCES[name][1].from_config(config).state_dict().items()}
        pairs = table.assign(name, published, wanted)
        assert set(pairs) == set(wanted)
        left_out = published.keys() - set(pairs.values())
        assert all(table.ours(key) is None for key in left_out)
        for ours, key in pairs.items():
            prefix = "text_model." if name == "text_encoder" else ""  # which transformers 5 no longer writes
            assert table.published(ours).removeprefix(prefix) == key
        for row in list(unused):
            probe = row.format(i=0, j=0, k=0)
            if any(table.published(key).startswith(_numbered(row, table.published(key), probe)) for key in pairs):
                unused.discard(row)
    assert not unused, f"rows that no network needs: {unused}"
    full = on_meta(name, CONFIGS[name][0]).state_dict()
    assert sum(tensor.numel() for tensor in full.values()) == PUBLISHED[name]


def _numbered(row, key, probe):
    """Put the numbers of `key` into a row, so that they can be compared."""
    parts, segments = row.split("."), key.split(".")
    if len(parts) > len(segments):
        return probe
    return ".".join(s if p.startswith("{") and s.isdigit() else p for p, s in zip(parts, segments, strict=False))


def test_a_dropped_key_of_the_full_unet_is_named():
    published = {key: tuple(p.shape) for key, p in on_meta("unet", GEOMETRIES["full"]["unet"]).state_dict().items()}
    wanted = {TABLES["UNet2DConditionModel"].ours(key): shape for key, shape in published.items()}
    del published["mid_block.attentions.0.transformer_blocks.0.ff.net.2.bias"]
    with pytest.raises(depthdiff.CheckpointError, match=r"1 of 686 weights missing.*ff\.net\.2\.bias"):
        TABLES["UNet2DConditionModel"].assign("unet", published, wanted)


def same_tensors(mine, reference):
    table = TABLES[type(mine).__name__]
    published = reference.state_dict()
    prefix = "text_model." if type(mine).__name__ == "CLIPTextModel" else ""
    for name, value in mine.state_dict().items():
        assert torch.equal(value, published[table.published(name).removeprefix(prefix)].reshape(value.shape)), name


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("form", ["sharded", "fp16 variant"])
def test_files_in_parts_and_in_half_precision(name, form, tmp_path):
    config = GEOMETRIES["tiny"][name]
    reference = reference_network(name, text_config(config) if name == "text_encoder" else config)
    options = {"max_shard_size": "100KB"} if form == "sharded" else {"variant": "fp16"}
    if form != "sharded":
        reference.half()
    reference.save_pretrained(tmp_path / "theirs", **options)
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert any("of-" in file or ".fp16." in file for file in files), files
    load = {} if form == "sharded" else {"variant": "fp16", "torch_dtype": "auto"}
    mine = REFERENCES[name][1].from_pretrained(tmp_path / "theirs", **load)
    assert mine.dtype == (torch.float32 if form == "sharded" else torch.float16)
    same_tensors(mine, reference)

    mine.save_pretrained(tmp_path / "ours", **options)
    written = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert [f for f in written if "index" in f or "of-" not in f] == [
        f for f in files if "index" in f or "of-" not in f
    ]
    theirs, ours = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours"))
    kinds = ("_class_name", "architectures", "model_type")  # by which the libraries' auto classes choose
    assert [ours.get(key) for key in kinds] == [theirs.get(key) for key in kinds]
    assert ("_diffusers_version" in ours) == ("_diffusers_version" in theirs)
    for path in (tmp_path / "ours").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}  # without which older transformers refuse the file
    back = REFERENCES[name][0].from_pretrained(
        tmp_path / "ours", **({} if form == "sharded" else {"variant": "fp16", "torch_dtype": torch.float16})
    )
    same_tensors(mine, back)


@pytest.mark.parametrize("form", ["old names", "old names as convolutions", "new names as convolutions"])
def test_old_forms_of_the_autoencoder(form, tmp_path):
    reference = reference_network("vae", VAES["tiny"])
    reference.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    changed = {}
    for key, value in state.items():
        name, tensor = key, value
        if "attentions.0.to_" in key:
            if "convolutions" in form and key.endswith("weight"):
                tensor = value[:, :, None, None]
            if "old" in form:
                for new, old in renames.items():
                    name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        changed[name] = tensor.contiguous()
    assert changed.keys() != state.keys() or form.startswith("new")
    save_file(changed, path)
    same_tensors(depthdiff.AutoencoderKL.from_pretrained(tmp_path), reference)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_old_forms_of_the_text_encoder(prefix, tmp_path):
    reference = reference_network("text_encoder", text_config(GEOMETRIES["tiny"]["text_encoder"]))
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {prefix + key: value for key, value in load_file(path).items()}
    state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, path)
    same_tensors(depthdiff.CLIPTextModel.from_pretrained(tmp_path), reference)


def test_what_is_loaded_is_ready_as_diffusers_leaves_it(tmp_path):
    reference = reference_network("unet", GEOMETRIES["tiny"]["unet"])
    reference.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    mine = depthdiff.UNet2DConditionModel.from_pretrained(tmp_path)
    assert mine.training is theirs.training is False
    assert {p.requires_grad for p in mine.parameters()} == {p.requires_grad for p in theirs.parameters()}
    half = depthdiff.UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    for name, value in half.state_dict().items():
        assert torch.equal(value, mine.state_dict()[name].half())


def test_model_index_is_that_of_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "ours")
    theirs = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, reference = (json.loads((tmp_path / who / "model_index.json").read_text()) for who in ("ours", "theirs"))
    reference["feature_extractor"][1] = reference["feature_extractor"][1].removesuffix("Pil")
    ours.pop("_diffusers_version")
    for key, value in ours.items():
        assert reference[key] == value, key
