"""The trees of the networks: names, classes, order, first weights, attributes and results, against the references."""

from __future__ import annotations

import inspect

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.parity.geometries import (
    CASES,
    MAIN,
    SIDES,
    build,
    call,
    distance,
    draw,
    pair,
    paths,
    plain,
    text_inputs,
    unet_inputs,
)

TOLERANCE = 1e-5  # relative L2 in float32; observed: at most 2e-6


class Pairs(dict):
    """Pairs of networks by kind and name, built when first asked for."""

    def __missing__(self, case):
        self[case] = pair(*case)
        return self[case]


@pytest.fixture(scope="module")
def pairs():
    """All pairs of networks, built once."""
    return Pairs()


@pytest.mark.parametrize("case", CASES, ids=" ".join)
class TestTree:
    def test_state_dict(self, pairs, case):
        ours, reference = ({plain(k): v.shape for k, v in side.state_dict().items()} for side in pairs[case])
        assert list(ours.items()) == list(reference.items())

    def test_text_model_prefix(self, pairs, case):
        ours = pairs[case][0]
        assert all(key.startswith("text_model.") for key in ours.state_dict()) == (case[0] == "text")

    def test_parameters(self, pairs, case):
        ours, reference = ([plain(key) for key, _ in side.named_parameters()] for side in pairs[case])
        assert ours == reference

    def test_modules(self, pairs, case):
        """Every module has the published path and class name, in the published order."""
        ours, reference = ([(path, kind_name(module, path)) for path, module in paths(n).items()] for n in pairs[case])
        assert ours == reference

    def test_plain_layers(self, pairs, case):
        """Layers with weights are torch's own classes, as tools compare `__class__.__name__`."""
        for path, module in pairs[case][0].named_modules():
            for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.SiLU):
                assert type(module) is kind or not isinstance(module, kind), path

    def test_none_and_absent(self, pairs, case):
        """A child that is None, one that is absent and one that is there are three things."""
        ours, reference = pairs[case]
        names = "attentions resnets downsamplers upsamplers has_cross_attention conv_shortcut time_emb_proj mid_block"
        names += " quant_conv post_quant_conv upsample downsample group_norm cond_proj post_act norm class_embedding"
        mine = paths(ours)
        for path, module in paths(reference).items():
            for name in names.split():
                assert state(mine[path], name) == state(module, name), (path, name)

    def test_outputs(self, pairs, case):
        """The results of a call, every hidden state of the text encoder included."""
        mine, theirs = (call(*case, network) for network in pairs[case])
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert distance(mine[key], theirs[key]) < TOLERANCE, key


def kind_name(module: nn.Module, path: str) -> str:
    """Return a module's class name; the root of the text encoder and its activations are the reference's own."""
    if path.endswith("activation_fn"):
        return "activation"
    return {"CLIPTextTransformer": "CLIPTextModel"}.get(type(module).__name__, type(module).__name__)


def state(module: nn.Module, name: str) -> str:
    if not hasattr(module, name):
        return "absent"
    value = getattr(module, name)
    return "None" if value is None else type(value).__name__


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_first_weights(case):
    """One seed gives the same weights bit for bit, and leaves the random generator at the same place."""
    torch.manual_seed(11)
    reference = build(*case, "reference").state_dict()
    expected = torch.rand(3)
    torch.manual_seed(11)
    ours = build(*case, "ours").state_dict()
    following = torch.rand(3)
    differ = [key for key, value in ours.items() if not torch.equal(value, reference[plain(key)])]
    assert not differ, f"{len(differ)} of {len(ours)}"
    assert torch.equal(following, expected)


@pytest.mark.parametrize("case", MAIN, ids=" ".join)
def test_train_mode(case):
    ours = build(*case, "ours")
    assert all(module.training for module in ours.modules())
    assert all(weight.requires_grad for weight in ours.parameters())


ATTRIBUTES = {
    "Attention": "heads scale inner_dim query_dim cross_attention_dim upcast_attention upcast_softmax "
    "rescale_output_factor residual_connection spatial_norm norm_cross scale_qk dropout sliceable_head_dim "
    "only_cross_attention added_kv_proj_dim out_dim fused_projections _from_deprecated_attn_block is_cross_attention "
    "use_bias norm_q norm_k inner_kv_dim is_causal pre_only",
    "BasicTransformerBlock": "only_cross_attention use_ada_layer_norm use_ada_layer_norm_zero "
    "use_ada_layer_norm_single use_ada_layer_norm_continuous use_layer_norm norm_type num_embeds_ada_norm pos_embed "
    "_chunk_size _chunk_dim dim num_attention_heads attention_head_dim dropout cross_attention_dim activation_fn "
    "attention_bias double_self_attention",
    "Transformer2DModel": "use_linear_projection num_attention_heads attention_head_dim in_channels out_channels "
    "is_input_continuous is_input_vectorized is_input_patches gradient_checkpointing inner_dim dtype device",
    "ResnetBlock2D": "in_channels out_channels pre_norm use_conv_shortcut up down upsample downsample "
    "output_scale_factor time_embedding_norm skip_time_act use_in_shortcut",
    "Downsample2D": "channels out_channels use_conv padding name norm",
    "Upsample2D": "channels out_channels use_conv name norm use_conv_transpose interpolate",
    "CrossAttnDownBlock2D": "has_cross_attention num_attention_heads gradient_checkpointing",
    "CrossAttnUpBlock2D": "has_cross_attention num_attention_heads gradient_checkpointing resolution_idx",
    "UNetMidBlock2DCrossAttn": "has_cross_attention num_attention_heads gradient_checkpointing",
    "DownBlock2D": "gradient_checkpointing",
    "UpBlock2D": "gradient_checkpointing resolution_idx",
    "UpDecoderBlock2D": "resolution_idx",
    "Timesteps": "num_channels flip_sin_to_cos downscale_freq_shift scale",
    "TimestepEmbedding": "cond_proj post_act",
    "UNet2DConditionModel": "sample_size num_upsamplers class_embedding encoder_hid_proj time_embed_act dtype device",
    "AutoencoderKL": "use_slicing use_tiling tile_sample_min_size tile_latent_min_size tile_overlap_factor dtype "
    "device",
    "Encoder": "layers_per_block gradient_checkpointing",
    "Decoder": "layers_per_block gradient_checkpointing",
    "CLIPAttention": "embed_dim num_heads head_dim scale dropout",
    "GroupNorm": "eps num_groups affine",
    "LayerNorm": "eps normalized_shape",
    "Dropout": "p",
    "Conv2d": "kernel_size stride padding padding_mode",
}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_attributes(pairs, case):
    """Every attribute that public code reads has the reference's value, in every module."""
    ours, reference = pairs[case]
    theirs = paths(reference)
    wrong = []
    for path, module in paths(ours).items():
        for name in ATTRIBUTES.get(type(module).__name__, "").split():
            value, expected = getattr(module, name, "absent"), getattr(theirs[path], name)
            exact = isinstance(expected, bool | None) or isinstance(value, bool | None)
            if value != expected or (exact and value is not expected):
                wrong.append((path, name, value, expected))
    assert not wrong


FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.4, "b2": 1.6}


def test_freeu_attributes():
    """Up blocks get the four factors when FreeU is enabled, and keep them as None afterwards."""
    for side in ("ours", "reference"):
        unet = build("unet", "sd2", side)
        assert not any(hasattr(block, name) for block in unet.up_blocks for name in FREEU)
        unet.enable_freeu(**FREEU)
        assert all(getattr(block, name) == value for block in unet.up_blocks for name, value in FREEU.items())
        unet.disable_freeu()
        assert all(getattr(block, name) is None for block in unet.up_blocks for name in FREEU)


MODEL = (
    "from_pretrained save_pretrained from_config load_config save_config to_json_string to_json_file "
    "register_to_config config config_name dtype device num_parameters enable_xformers_memory_efficient_attention "
    "disable_xformers_memory_efficient_attention _supports_gradient_checkpointing enable_gradient_checkpointing "
    "disable_gradient_checkpointing is_gradient_checkpointing"
)
METHODS = {
    "unet": f"{MODEL} attn_processors set_attn_processor set_default_attn_processor set_attention_slice enable_freeu "
    "disable_freeu add_adapter set_adapter active_adapters disable_adapters enable_adapters delete_adapters "
    "set_adapters enable_lora disable_lora fuse_lora unfuse_lora unload_lora load_attn_procs save_attn_procs "
    "load_lora_adapter save_lora_adapter _hf_peft_config_loaded",
    "vae": f"{MODEL} encode decode forward enable_tiling disable_tiling enable_slicing disable_slicing tiled_decode "
    "tiled_encode blend_v blend_h attn_processors set_attn_processor set_default_attn_processor",
    "text": "from_pretrained save_pretrained config dtype device num_parameters get_input_embeddings "
    "set_input_embeddings resize_token_embeddings gradient_checkpointing_enable gradient_checkpointing_disable "
    "is_gradient_checkpointing supports_gradient_checkpointing embeddings encoder final_layer_norm",
    "attention": "set_processor get_processor head_to_batch_dim batch_to_head_dim get_attention_scores "
    "prepare_attention_mask norm_encoder_hidden_states set_attention_slice "
    "set_use_memory_efficient_attention_xformers",
    "block": "set_chunk_feed_forward",
}


@pytest.mark.parametrize("kind", METHODS)
def test_methods(pairs, kind):
    owners = {
        "attention": lambda: (unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1 for unet in unets),
        "block": lambda: (unet.down_blocks[0].attentions[0].transformer_blocks[0] for unet in unets),
    }
    unets = pairs["unet", "sd2"]
    ours, reference = owners[kind]() if kind in owners else pairs[kind, "sd" if kind == "vae" else "sd2"]
    names = METHODS[kind].split()
    assert not [name for name in names if not hasattr(reference, name)], "the reference has none either"
    assert not [name for name in names if not hasattr(ours, name)]
    assert not [name for name in names if callable(getattr(ours, name)) != callable(getattr(reference, name))]


def test_vae_has_no_slices_of_attention(pairs):
    """The reference's pipeline asks with hasattr which parts can be sliced."""
    assert not hasattr(pairs["vae", "sd"][0], "set_attention_slice")


def test_absent_methods(pairs):
    for case in MAIN:
        with pytest.raises(AttributeError, match=f"'{type(pairs[case][0]).__name__}' object has no attribute 'foo'"):
            pairs[case][0].foo  # noqa: B018


def test_base_class_names(pairs):
    """Public code looks for the name ModelMixin among a network's base classes."""
    for case in (("unet", "sd2"), ("vae", "sd")):
        assert "ModelMixin" in [base.__name__ for base in type(pairs[case][0]).__mro__]


def test_text_model_level(pairs):
    """The level of transformers 4 is a module; the three parts are properties beside it, not registered twice."""
    ours = pairs["text", "sd2"][0]
    assert type(ours.text_model).__name__ == "CLIPTextTransformer"
    for name in ("embeddings", "encoder", "final_layer_norm"):
        assert getattr(ours, name) is getattr(ours.text_model, name)
    assert [name for name, _ in ours.named_children()] == ["text_model"]
    replacement = nn.LayerNorm(24)
    ours = build("text", "sd2", "ours")
    ours.final_layer_norm = replacement
    assert ours.text_model.final_layer_norm is replacement
    assert [name for name, _ in ours.named_children()] == ["text_model"]


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_loads_both_prefixes(pairs, tmp_path, prefix):
    """Files of transformers 4 and 5 load; ours are written with the level."""
    ours, reference = pairs["text", "sd2"]
    reference.save_pretrained(tmp_path)
    save_file(
        {prefix + key: value for key, value in reference.state_dict().items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    loaded = type(ours).from_pretrained(tmp_path)
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), loaded.state_dict().values(), strict=True))
    loaded.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(ours.state_dict())


@pytest.mark.parametrize("side", SIDES)
def test_output_forms(pairs, side):
    """Outputs are ordered dicts: len counts what is there, iteration gives the keys, numbers give the values."""
    index = SIDES.index(side)
    unet, vae, text = (pairs[case][index] for case in (("unet", "sd2"), ("vae", "sd"), ("text", "sd2")))
    latents = draw(1, 4, 4, 6)
    outputs = {
        "sample": (unet, lambda **kw: unet(**unet_inputs("sd2", rows=1, height=8, width=8), **kw)),
        "latent_dist": (vae, lambda **kw: vae.encode(draw(1, 3, 16, 24), **kw)),
        "sample ": (vae, lambda **kw: vae.decode(latents, **kw)),
        "sample  ": (vae, lambda **kw: vae(draw(1, 3, 16, 24), **kw)),
    }
    for key, (_, forward) in outputs.items():
        key = key.strip()
        with torch.no_grad():
            output, bare = forward(), forward(return_dict=False)
        assert isinstance(output, dict)
        assert (len(output), list(output), list(output.keys())) == (1, [key], [key])
        assert output[0] is output[key] is getattr(output, key) is output.to_tuple()[0]
        assert isinstance(bare, tuple)
        assert len(bare) == 1
        if key == "sample":
            assert torch.equal(bare[0], output[0])
        setattr(output, key, 3)
        assert output[key] == 3
    output = text(text_inputs())
    assert (len(output), list(output)) == (2, ["last_hidden_state", "pooler_output"])
    assert output[1] is output.pooler_output
    assert output.hidden_states is None
    full = text(text_inputs(), output_hidden_states=True)
    assert (len(full), len(full.hidden_states)) == (3, 4)
    bare = text(text_inputs(), return_dict=False)
    assert isinstance(bare, tuple)
    assert torch.equal(bare[0], output.last_hidden_state)


def test_gaussian(pairs):
    """The posterior has the published attributes; samples are equal for equal seeds."""
    ours, reference = (network.encode(draw(2, 3, 24, 16)).latent_dist for network in pairs["vae", "sd"])
    for name in ("parameters", "mean", "logvar", "std", "var"):
        assert distance(getattr(ours, name), getattr(reference, name)) < TOLERANCE, name
    assert ours.deterministic is reference.deterministic is False
    samples = [posterior.sample(torch.Generator().manual_seed(2)) for posterior in (ours, reference)]
    assert distance(*samples) < TOLERANCE
    assert distance(ours.mode(), reference.mode()) < TOLERANCE
    assert ours.kl().shape == (2,)
    assert distance(ours.kl(), reference.kl()) < TOLERANCE
    assert distance(ours.nll(samples[1]), reference.nll(samples[1])) < TOLERANCE
    others = [network.encode(draw(2, 3, 24, 16, seed=9)).latent_dist for network in pairs["vae", "sd"]]
    assert distance(ours.kl(others[0]), reference.kl(others[1])) < TOLERANCE
    fixed = [type(side)(side.parameters, deterministic=True) for side in (ours, reference)]
    assert torch.equal(fixed[0].sample(), fixed[0].mean)
    assert float(fixed[0].kl()) == float(fixed[1].kl())


@pytest.mark.parametrize("names", ["forward", "encode", "decode", "tiled_decode", "tiled_encode", "blend_v", "blend_h"])
def test_vae_signatures(pairs, names):
    ours, reference = (list(inspect.signature(getattr(vae, names)).parameters) for vae in pairs["vae", "sd"])
    assert ours == reference


def test_unet_signature(pairs):
    ours, reference = (inspect.signature(unet.forward).parameters for unet in pairs["unet", "sd2"])
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in reference.values()]
