"""LoRA and learnt words against diffusers and peft: same files, same scales, same pictures."""

import diffusers
import numpy as np
import peft
import pytest
import torch
from random_checkpoint import build_pipeline
from safetensors.torch import load_file, save_file

import depthdiff
from tests.adapters import SPELLINGS, conv_layers, linear_layers, pairs, spell
from tests.parity.both import load_both

TOLERANCE = 2e-3  # of full range


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "checkpoint"
    build_pipeline("tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def pair(folder):
    """Both pipelines, fresh."""
    return load_both(folder)


def picture(pipe, photo, prompt="two tigers", **more):
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt, photo, num_inference_steps=4, generator=generator, output_type="np", **more).images


def compare(pair, photo, **more):
    """Return our picture; it must be theirs."""
    ours, theirs = (picture(pipe, photo, **more) for pipe in pair)
    assert np.abs(ours - theirs).max() <= TOLERANCE
    return ours


def rows(pair, spelling, rank=3, seed=0):
    """Random layers that a spelling can hold, under names that diffusers' networks give them."""
    attention = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    layers = list(linear_layers(pair[1].unet, pair[1].text_encoder))
    if spelling.startswith("attn processor"):
        layers = [row for row in layers if row[1].endswith(attention)]
    if spelling in ("attn processor, no prefix", "raw PEFT"):
        layers = [row for row in layers if row[0] == "unet"]
    else:  # files from the time of transformers 4 have its names
        layers = [(c, n if c == "unet" else f"text_model.{n}", w) for c, n, w in layers]
    return list(pairs(layers, rank, seed))


TWINS = {"attn processor, no prefix": "attn processor, prefix", "raw PEFT": "lora_A"}
"""Spellings that diffusers ignores without a word, and what it is given in their place."""


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_at_several_scales(pair, small_photo, tmp_path, spelling):
    plain = compare(pair, small_photo)
    state = spell(spelling, rows(pair, spelling))
    if spelling == "kohya":
        state |= {key.split(".")[0] + ".alpha": torch.tensor(1.5) for key in list(state)}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    pair[0].load_lora_weights(tmp_path)
    twin = spell(TWINS[spelling], rows(pair, spelling)) if spelling in TWINS else tmp_path
    pair[1].load_lora_weights(twin)
    one = compare(pair, small_photo)
    assert np.abs(one - plain).max() > 0.05
    less = compare(pair, small_photo, cross_attention_kwargs={"scale": 0.4})
    assert np.abs(less - one).max() > 0.02
    ours = picture(pair[0], small_photo, cross_attention_kwargs={"scale": 0.0})
    assert np.array_equal(ours, plain)  # theirs is tested last: its text encoder never leaves a scale of 0
    assert np.abs(picture(pair[1], small_photo, cross_attention_kwargs={"scale": 0.0}) - ours).max() <= TOLERANCE


def test_two_at_once_with_different_weights(pair, small_photo):
    first = spell("lora_A", rows(pair, "lora_A", 3, 1))
    second = spell("kohya", rows(pair, "kohya", 2, 2))
    for pipe in pair:
        pipe.load_lora_weights(dict(first), adapter_name="first")
        pipe.load_lora_weights(dict(second), adapter_name="second")
        assert pipe.get_active_adapters() == ["second"]
    compare(pair, small_photo)
    lists = [pipe.get_list_adapters() for pipe in pair]
    assert lists[0] == lists[1] == {"unet": ["first", "second"], "text_encoder": ["first", "second"]}
    blocks = {"unet": {"down": 0.2, "up": 1.3}, "text_encoder": 0.6}
    for weights in ([0.7, 0.3], 0.5, [blocks, 0.3], None):
        for pipe in pair:
            pipe.set_adapters(["first", "second"], weights)
        assert pair[0].get_active_adapters() == pair[1].get_active_adapters()
        compare(pair, small_photo)
    compare(pair, small_photo, cross_attention_kwargs={"scale": 0.4})
    for pipe in pair:
        pipe.disable_lora()
    off = compare(pair, small_photo)
    for pipe in pair:
        pipe.enable_lora()
        pipe.delete_adapters("second")
    assert pair[0].get_active_adapters() == pair[1].get_active_adapters() == ["first"]
    on = compare(pair, small_photo)
    assert np.abs(on - off).max() > 0.05


def test_fuse_and_unload_keeps_what_is_fused(pair, small_photo):
    state = spell("lora_A", rows(pair, "lora_A"))
    for pipe in pair:
        pipe.load_lora_weights(dict(state), adapter_name="a")
        pipe.fuse_lora(lora_scale=0.7, adapter_names=["a"], safe_fusing=True)
        assert pipe.num_fused_loras == 1
    fused = compare(pair, small_photo)
    for pipe in pair:
        pipe.unload_lora_weights()
    assert np.allclose(compare(pair, small_photo), fused, atol=1e-5)


def test_convolutions(pair, small_photo):
    """LoCon: down has the kernel. Also with the input layer of a UNet that has no depth, where diffusers refuses."""
    state = spell("kohya", pairs(conv_layers(pair[1].unet), 2, strength=0.05))
    for pipe in pair:
        pipe.load_lora_weights(dict(state))
    compare(pair, small_photo)


def test_what_diffusers_trains_and_saves(pair, small_photo, tmp_path):
    """peft layers inside diffusers' networks, saved by diffusers' own method, with an alpha in the file's header."""
    pipe = diffusers.StableDiffusionDepth2ImgPipeline(**pair[1].components)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
    pipe.unet.add_adapter(config, "trained")
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers = peft.get_peft_model_state_dict(pipe.unet, adapter_name="trained")
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=pipe.unet.peft_config["trained"].to_dict()
    )
    theirs = picture(pipe, small_photo)
    pair[0].load_lora_weights(tmp_path)
    assert np.abs(picture(pair[0], small_photo) - theirs).max() <= TOLERANCE


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, "LoHa", "LoKr"], ids=str)
def test_raw_peft_folders(pair, small_photo, tmp_path, component, options):
    """`save_pretrained` of a peft model, with adapter_config.json: keys begin with base_model.model."""
    targets = ["to_q", "to_out.0", "conv1"] if component == "unet" else ["q_proj", "fc1"]
    network = getattr(pair[1], component)
    patterns = {"alpha_pattern": {targets[0]: 3}, "rank_pattern": {targets[0]: 2}}
    if isinstance(options, str):
        kind = getattr(peft, f"{options}Config")
        config = kind(r=4, alpha=6, target_modules=targets, init_weights=False, **patterns)
    else:
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **patterns, **options)
    wrapped = peft.get_peft_model(network, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data *= 1.2
    wrapped.save_pretrained(tmp_path)
    theirs = picture(pair[1], small_photo)  # the wrapper changes the network in place
    pair[0].load_lora_weights(tmp_path)
    assert np.abs(picture(pair[0], small_photo) - theirs).max() <= TOLERANCE


def test_our_files_load_in_diffusers(pair, small_photo, tmp_path):
    """kohya -> ours -> diffusers -> ours, and tensors of a training through `save_lora_weights`."""
    state = spell("kohya", rows(pair, "kohya"))
    state |= {key.split(".")[0] + ".alpha": torch.tensor(2.0) for key in list(state)}
    pair[0].load_lora_weights(state, adapter_name="a")
    expected = picture(pair[0], small_photo)
    pair[0].save_lora_adapter("a", tmp_path / "one")
    pair[1].load_lora_weights(tmp_path / "one")
    assert np.abs(picture(pair[1], small_photo) - expected).max() <= TOLERANCE
    layers = load_file(tmp_path / "one" / "pytorch_lora_weights.safetensors")
    parts = [
        {key.removeprefix(f"{name}."): tensor for key, tensor in layers.items() if key.startswith(f"{name}.")}
        for name in ("unet", "text_encoder")
    ]
    depthdiff.StableDiffusionDepth2ImgPipeline.save_lora_weights(tmp_path / "two", *parts)
    diffusers.StableDiffusionDepth2ImgPipeline.save_lora_weights(tmp_path / "three", *parts)
    ours, theirs = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("two", "three"))
    assert ours.keys() == theirs.keys()
    pair[0].unload_lora_weights()
    pair[0].load_lora_weights(tmp_path / "three")
    assert np.abs(picture(pair[0], small_photo) - expected).max() <= TOLERANCE


def embeddings(width, count, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(
    "form", ["diffusers", "diffusers .bin", "automatic1111", "automatic1111 safetensors", "tensor"]
)
def test_textual_inversion(pair, small_photo, tmp_path, form, vectors):
    width = pair[0].text_encoder.config.hidden_size
    value, word = embeddings(width, vectors), "<cat-toy>"
    name, more = "learned_embeds.safetensors", {}
    if form == "diffusers":
        save_file({word: value if vectors > 1 else value[0]}, tmp_path / name)
    elif form == "diffusers .bin":
        name = "learned_embeds.bin"
        torch.save({word: value}, tmp_path / name)
    elif form == "automatic1111":
        name = "style.pt"
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": value}, "name": word}, tmp_path / name)
        more = {"weight_name": name}
    elif form == "automatic1111 safetensors":
        name, more = "style.safetensors", {"weight_name": "style.safetensors", "token": word}
        save_file({"emb_params": value}, tmp_path / name)
    else:
        name, more = "bare.pt", {"weight_name": "bare.pt", "token": word}
        torch.save(value, tmp_path / name)
    for pipe in pair:
        pipe.load_textual_inversion(tmp_path, **more)
    with_word = compare(pair, small_photo, prompt=f"a {word} backpack, {word}!", negative_prompt=f"no {word}")
    without = compare(pair, small_photo, prompt="a backpack")
    assert np.abs(with_word - without).max() > 0.02
    for pipe in pair:
        pipe.unload_textual_inversion()
    compare(pair, small_photo, prompt="a <cat-toy> backpack")


def test_several_words_and_unloading_one(pair, small_photo):
    width = pair[0].text_encoder.config.hidden_size
    words = [{f"<w{n}>": embeddings(width, n, n)} for n in (1, 3, 2)]
    for pipe in pair:
        pipe.load_textual_inversion(words)
    compare(pair, small_photo, prompt="<w2> and <w1>, <w3>")
    for pipe in pair:
        pipe.unload_textual_inversion("<w1>")
    compare(pair, small_photo, prompt="<w2> and <w3>")
