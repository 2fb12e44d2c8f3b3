"""Each published layer and block by itself against the reference's."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from tests.parity.geometries import SD2, build, copy_weights, distance, draw, randomize

TOLERANCE = 1e-5  # relative L2 in float32; observed: at most 5e-7
HOMES = {
    "attention": "diffusers.models.attention_processor",
    "unet_blocks": "diffusers.models.unets.unet_2d_blocks",
    "transformer": "diffusers.models.attention",
    "resnet": "diffusers.models.resnet",
    "embeddings": "diffusers.models.embeddings",
}
BESIDE = {"unet_blocks": ("mid_blocks", "vae")}
X = draw(2, 16, 6, 10)
TEMB = draw(2, 32, seed=1)
PROMPT = draw(2, 7, 20, seed=2)
TOKENS = draw(2, 15, 16, seed=3)
BIAS = torch.tensor([[[0.0] * 7], [[0.0] * 4 + [-10000.0] * 3]])
SKIPS = (draw(2, 12, 6, 10, seed=4), draw(2, 16, 6, 10, seed=5))
SIZE = torch.Size((11, 19))
EMPTY = torch.empty(0)

RESNET = {"in_channels": 16, "temb_channels": 32, "groups": 4}
BLOCK = {"temb_channels": 32, "num_layers": 2, "resnet_eps": 1e-5, "resnet_act_fn": "silu", "resnet_groups": 4}
CROSS = {**BLOCK, "num_attention_heads": 2, "cross_attention_dim": 20}
UP = {"in_channels": 12, "prev_output_channel": 16}
VAE = {"in_channels": 16, "num_layers": 2, "resnet_groups": 4, "resnet_act_fn": "silu"}
TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 8, "norm_num_groups": 4}
DOWN_CALL = {"hidden_states": X, "temb": TEMB}
CROSS_CALL = {**DOWN_CALL, "encoder_hidden_states": PROMPT}
MASKED_CALL = {**CROSS_CALL, "attention_mask": None, "cross_attention_kwargs": None, "encoder_attention_mask": BIAS}
UP_CALL = {"hidden_states": X, "res_hidden_states_tuple": SKIPS, "temb": TEMB}
TRANSFORMER_CALL = {"hidden_states": X, "encoder_hidden_states": PROMPT}
MAIN_CALL = {"hidden_states": TOKENS, "attention_mask": None, "encoder_hidden_states": PROMPT}

# file, class, arguments of the constructor, arguments of the call in the published order
LAYERS = [
    ("resnet", "ResnetBlock2D", RESNET, {"input_tensor": X, "temb": TEMB}),
    ("resnet", "ResnetBlock2D", {**RESNET, "out_channels": 24, "eps": 1e-3}, {"input_tensor": X, "temb": TEMB}),
    ("resnet", "ResnetBlock2D", {**RESNET, "temb_channels": None}, {"input_tensor": X, "temb": None}),
    ("resnet", "Upsample2D", {"channels": 16, "use_conv": True}, {"hidden_states": X}),
    ("resnet", "Upsample2D", {"channels": 16, "use_conv": True}, {"hidden_states": X, "output_size": SIZE}),
    ("resnet", "Upsample2D", {"channels": 16, "use_conv": True, "out_channels": 8}, {"hidden_states": X}),
    ("resnet", "Downsample2D", {"channels": 16, "use_conv": True, "name": "op"}, {"hidden_states": X}),
    ("resnet", "Downsample2D", {"channels": 16, "use_conv": True, "padding": 0, "name": "op"}, {"hidden_states": X}),
    (
        "resnet",
        "Downsample2D",
        {"channels": 16, "use_conv": True, "out_channels": 8, "name": "op"},
        {"hidden_states": X},
    ),
    (
        "embeddings",
        "Timesteps",
        {"num_channels": 16, "flip_sin_to_cos": True, "downscale_freq_shift": 0},
        {"timesteps": torch.tensor([3, 500])},
    ),
    (
        "embeddings",
        "Timesteps",
        {"num_channels": 17, "flip_sin_to_cos": False, "downscale_freq_shift": 1},
        {"timesteps": torch.tensor([0.0, 2.5])},
    ),
    ("embeddings", "TimestepEmbedding", {"in_channels": 16, "time_embed_dim": 32}, {"sample": draw(2, 16)}),
    ("transformer", "GEGLU", {"dim_in": 16, "dim_out": 24}, {"hidden_states": TOKENS}),
    ("transformer", "FeedForward", {"dim": 16}, {"hidden_states": TOKENS}),
    ("transformer", "FeedForward", {"dim": 16, "dim_out": 12, "mult": 2}, {"hidden_states": TOKENS}),
    ("attention", "Attention", {"query_dim": 16, "heads": 2, "dim_head": 6}, {"hidden_states": TOKENS}),
    (
        "attention",
        "Attention",
        {"query_dim": 16, "cross_attention_dim": 20, "heads": 3, "dim_head": 4, "bias": True, "upcast_attention": True},
        {"hidden_states": TOKENS, "encoder_hidden_states": PROMPT, "attention_mask": BIAS},
    ),
    (
        "attention",
        "Attention",
        {"query_dim": 16, "heads": 1, "dim_head": 16, "bias": True, "norm_num_groups": 4, "residual_connection": True}
        | {"upcast_softmax": True, "eps": 1e-6, "_from_deprecated_attn_block": True},
        {"hidden_states": X},
    ),
    ("transformer", "BasicTransformerBlock", {"dim": 16, "num_attention_heads": 2, "attention_head_dim": 8}, "tokens"),
    (
        "transformer",
        "BasicTransformerBlock",
        {"dim": 16, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 20},
        {**MAIN_CALL, "encoder_attention_mask": BIAS, "timestep": None, "cross_attention_kwargs": None},
    ),
    (
        "transformer",
        "Transformer2DModel",
        {**TRANSFORMER, "in_channels": 16, "cross_attention_dim": 20, "num_layers": 2, "use_linear_projection": True},
        TRANSFORMER_CALL,
    ),
    (
        "transformer",
        "Transformer2DModel",
        {**TRANSFORMER, "in_channels": 16, "cross_attention_dim": 20},
        TRANSFORMER_CALL,
    ),
    ("unet_blocks", "DownBlock2D", {**BLOCK, "in_channels": 16, "out_channels": 24}, DOWN_CALL),
    (
        "unet_blocks",
        "DownBlock2D",
        {**BLOCK, "in_channels": 16, "out_channels": 16, "add_downsample": False},
        DOWN_CALL,
    ),
    ("unet_blocks", "CrossAttnDownBlock2D", {**CROSS, "in_channels": 16, "out_channels": 24}, MASKED_CALL),
    (
        "unet_blocks",
        "CrossAttnDownBlock2D",
        {
            **CROSS,
            "in_channels": 16,
            "out_channels": 24,
            "use_linear_projection": True,
            "transformer_layers_per_block": 2,
        }
        | {"add_downsample": False},
        {**MASKED_CALL, "additional_residuals": draw(2, 24, 6, 10, seed=7)},
    ),
    ("unet_blocks", "UNetMidBlock2DCrossAttn", {**CROSS, "in_channels": 16}, MASKED_CALL),
    ("unet_blocks", "UNetMidBlock2D", {**BLOCK, "in_channels": 16, "attention_head_dim": 8}, DOWN_CALL),
    ("unet_blocks", "UNetMidBlock2D", {**BLOCK, "in_channels": 16, "add_attention": False}, DOWN_CALL),
    ("unet_blocks", "UpBlock2D", {**BLOCK, **UP, "out_channels": 16}, {**UP_CALL, "upsample_size": SIZE}),
    ("unet_blocks", "UpBlock2D", {**BLOCK, **UP, "out_channels": 16, "add_upsample": False}, UP_CALL),
    (
        "unet_blocks",
        "CrossAttnUpBlock2D",
        {**CROSS, **UP, "out_channels": 16},
        {**UP_CALL, "encoder_hidden_states": PROMPT, "cross_attention_kwargs": None, "upsample_size": SIZE}
        | {"attention_mask": None, "encoder_attention_mask": BIAS},
    ),
    ("unet_blocks", "DownEncoderBlock2D", {**VAE, "out_channels": 24, "downsample_padding": 0}, {"hidden_states": X}),
    ("unet_blocks", "UpDecoderBlock2D", {**VAE, "out_channels": 24}, {"hidden_states": X, "temb": None}),
]


def classes(file: str, name: str) -> tuple[type, type]:
    """Return (ours, reference) of a published class; ours may be imported from a file next to the one named."""
    home = "diffusers.models.transformers.transformer_2d" if name == "Transformer2DModel" else HOMES[file]
    modules = [importlib.import_module(f"depthdiff.models.{one}") for one in (file, *BESIDE.get(file, ()))]
    ours = next(getattr(module, name) for module in modules if hasattr(module, name))
    return ours, getattr(importlib.import_module(home), name)


def layer_pair(file: str, name: str, config: dict) -> tuple:
    torch.manual_seed(0)
    ours, reference = (kind(**config) for kind in classes(file, name))
    copy_weights(ours, randomize(reference))
    return ours.eval(), reference.eval()


def flat(value) -> list[Tensor]:
    """Return the tensors of a layer's result in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in (value.values() if isinstance(value, dict) else value) for tensor in flat(item)]


@pytest.mark.parametrize("file, name, config, arguments", LAYERS, ids=[f"{n}-{row[1]}" for n, row in enumerate(LAYERS)])
def test_layer(file, name, config, arguments):
    """Positionally, by keyword, and as one would call it: the same result, in the same form."""
    ours, reference = layer_pair(file, name, config)
    if arguments == "tokens":
        arguments = {"hidden_states": TOKENS}
    with torch.no_grad():
        expected = reference(**arguments)
        for result in (ours(**arguments), ours(*arguments.values())):
            assert isinstance(result, dict | tuple) == isinstance(expected, dict | tuple)
            assert isinstance(result, tuple) == isinstance(expected, tuple)
            assert len(flat(result)) == len(flat(expected))
            for mine, theirs in zip(flat(result), flat(expected), strict=True):
                assert distance(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("file, name, config", [row[:3] for row in LAYERS], ids=[row[1] for row in LAYERS])
def test_layer_first_weights(file, name, config):
    """A layer built by itself draws the reference's weights, under the same names."""
    states = []
    for kind in classes(file, name):
        torch.manual_seed(3)
        states.append(kind(**config).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_transformer_results():
    """Transformer2DModel gives a tuple with return_dict=False, and otherwise an output with `sample`."""
    config = {**TRANSFORMER, "in_channels": 16, "cross_attention_dim": 20}
    for model in layer_pair("transformer", "Transformer2DModel", config):
        bare = model(X, encoder_hidden_states=PROMPT, return_dict=False)
        assert isinstance(bare, tuple)
        assert torch.equal(model(X, PROMPT).sample, bare[0])
        assert model(X, PROMPT)[0].shape == X.shape


def test_down_block_skips():
    """A down block's last skip is its result."""
    config = {**CROSS, "in_channels": 16, "out_channels": 24}
    for block in layer_pair("unet_blocks", "CrossAttnDownBlock2D", config):
        result, skips = block(**CROSS_CALL)
        assert isinstance(skips, tuple)
        assert len(skips) == 3
        assert skips[-1] is result


def test_up_block_takes_skips_from_the_end():
    """More skips than an up block needs are tolerated."""
    for block in layer_pair("unet_blocks", "UpBlock2D", {**BLOCK, **UP, "out_channels": 16}):
        plain = block(**UP_CALL)
        more = block(X, (draw(2, 3, 4, 5), *SKIPS), TEMB)
        assert torch.equal(plain, more)


def test_dropout():
    """Dropout counts in train mode, with the reference's random numbers."""
    config = {**CROSS, "in_channels": 16, "out_channels": 24, "dropout": 0.3}
    results = []
    for block in layer_pair("unet_blocks", "CrossAttnDownBlock2D", config):
        torch.manual_seed(4)
        results.append(block.train()(**CROSS_CALL)[0])
    assert distance(*results) < TOLERANCE
    assert distance(results[0], block.eval()(**CROSS_CALL)[0]) > 0.01


class TestAttentionMethods:
    """The methods of Attention that processors call."""

    @pytest.fixture
    def layers(self):
        return layer_pair(
            "attention", "Attention", {"query_dim": 16, "cross_attention_dim": 20, "heads": 2, "dim_head": 6}
        )

    def test_heads(self, layers):
        for states, options in ((draw(3, 5, 12), {}), (draw(3, 5, 12), {"out_dim": 4})):
            mine, theirs = (layer.head_to_batch_dim(states, **options) for layer in layers)
            assert torch.equal(mine, theirs)
        rows = draw(6, 5, 6)
        assert torch.equal(*(layer.batch_to_head_dim(rows) for layer in layers))

    @pytest.mark.parametrize("mask", [None, draw(6, 1, 7), draw(6, 5, 7)], ids=["none", "row", "full"])
    @pytest.mark.parametrize("upcast", [False, True])
    def test_scores(self, layers, mask, upcast):
        """Observed: 0 in float32, and 4e-3 in bfloat16, the width of one of its steps."""
        for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.bfloat16, 8e-3)):
            query, key = draw(6, 5, 6).to(dtype), draw(6, 7, 6, seed=1).to(dtype)
            bias = mask if mask is None or upcast else mask.to(dtype)
            scores = []
            for layer in layers:
                layer.upcast_attention = layer.upcast_softmax = upcast
                scores.append(layer.get_attention_scores(query, key, bias))
            assert scores[0].dtype == dtype
            assert distance(*scores) < tolerance

    @pytest.mark.parametrize("shape", [(3, 1, 7), (6, 1, 7)], ids=str)
    @pytest.mark.parametrize("out_dim", [3, 4])
    def test_mask(self, layers, shape, out_dim):
        mine, theirs = (layer.prepare_attention_mask(draw(*shape), 7, 3, out_dim=out_dim) for layer in layers)
        assert torch.equal(mine, theirs)
        assert layers[0].prepare_attention_mask(None, 7, 3) is None

    def test_scale(self, layers):
        """An edited `scale` counts with the classic processor only."""
        from depthdiff.models.attention import AttnProcessor, AttnProcessor2_0

        reference = classes("attention", "AttnProcessor")[1]
        results = {}
        for scale in (layers[0].scale, 1.0):
            for kind in (AttnProcessor, AttnProcessor2_0):
                layers[0].scale, layers[1].scale = scale, scale
                layers[0].set_processor(kind())
                results[kind, scale] = layers[0](TOKENS, PROMPT)
            layers[1].set_processor(reference())
            assert distance(results[AttnProcessor, scale], layers[1](TOKENS, PROMPT)) < TOLERANCE
        assert torch.equal(results[AttnProcessor2_0, 6**-0.5], results[AttnProcessor2_0, 1.0])
        assert distance(results[AttnProcessor, 6**-0.5], results[AttnProcessor, 1.0]) > 0.01


NOT_IMPLEMENTED = [
    ("resnet", "ResnetBlock2D", {**RESNET, "output_scale_factor": 2.0}),
    ("resnet", "ResnetBlock2D", {**RESNET, "skip_time_act": True}),
    ("resnet", "ResnetBlock2D", {**RESNET, "up": True}),
    ("resnet", "ResnetBlock2D", {**RESNET, "time_embedding_norm": "scale_shift"}),
    ("resnet", "Upsample2D", {"channels": 16, "use_conv_transpose": True}),
    ("attention", "Attention", {"query_dim": 16, "rescale_output_factor": 2.0}),
    ("attention", "Attention", {"query_dim": 16, "qk_norm": "layer_norm"}),
    ("attention", "Attention", {"query_dim": 16, "cross_attention_norm": "layer_norm"}),
    ("transformer", "FeedForward", {"dim": 16, "activation_fn": "foo"}),
    ("transformer", "Transformer2DModel", {**TRANSFORMER, "in_channels": 16, "patch_size": 2, "sample_size": 8}),
    (
        "unet_blocks",
        "CrossAttnDownBlock2D",
        {**CROSS, "in_channels": 16, "out_channels": 16, "dual_cross_attention": True},
    ),
]


@pytest.mark.parametrize(
    "file, name, config", NOT_IMPLEMENTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_values_not_implemented(file, name, config):
    """A value of a published argument either counts as in the reference, or is refused by the argument's name."""
    try:
        ours = classes(file, name)[0](**config)
    except (ValueError, NotImplementedError) as error:
        assert any(key in str(error) for key in config)
        return
    reference = classes(file, name)[1](**config)
    copy_weights(ours, randomize(reference))
    x = TOKENS if file in ("attention", "transformer") else X
    extra = {"temb": TEMB} if name == "ResnetBlock2D" else {}
    assert distance(ours(x, **extra), reference(x, **extra)) < TOLERANCE


def test_levels_are_the_published_blocks():
    """The UNet's blocks are instances of the published classes."""
    unet = build("unet", "sd2", "ours")
    for index, name in enumerate(["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]):
        assert type(unet.down_blocks[index]) is classes("unet_blocks", name)[0]
    for index, name in enumerate(["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3):
        assert type(unet.up_blocks[index]) is classes("unet_blocks", name)[0]
    assert type(unet.mid_block) is classes("unet_blocks", "UNetMidBlock2DCrossAttn")[0]
    assert len(SD2["block_out_channels"]) == len(unet.down_blocks)
