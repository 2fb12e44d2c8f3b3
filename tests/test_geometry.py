"""Configs from shapes: whatever geometry makes the shapes of a single file is read off them again."""

import pytest

from depthdiff.checkpoint.geometry import INFER, Shapes
from depthdiff.checkpoint.ldm import PREFIXES, TABLES_LDM, split_part
from depthdiff.checkpoint.loading import build
from depthdiff.registry import CLASSES
from tests.ldm import FULL, SMALL, key_lists

UNET = {
    "sample_size": 64, "in_channels": 5, "block_out_channels": [64, 128, 192], "attention_head_dim": [1, 2, 3],
    "layers_per_block": 1, "cross_attention_dim": 96, "use_linear_projection": True,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
VAE = {
    "block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 256,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
CASES = {
    "unet": ("unet", UNET),
    "unet without depth": ("unet", UNET | {"in_channels": 4}),
    "unet of an upscaler": ("unet", UNET | {"in_channels": 7, "out_channels": 6}),
    "unet that projects by convolution": ("unet", UNET | {"use_linear_projection": False}),
    "unet of two transformers": ("unet", UNET | {"transformer_layers_per_block": 2}),
    "unet of uneven levels": ("unet", UNET | {"layers_per_block": [1, 3, 2]}),
    "unet narrower than a head": ("unet", UNET | {"block_out_channels": [32, 64, 96], "attention_head_dim": [1, 1, 1]}),
    "vae": ("vae", VAE),
    "vae of three layers": ("vae", VAE | {"layers_per_block": 3}),
    "vae of other channels": ("vae", VAE | {"in_channels": 4, "out_channels": 1, "latent_channels": 6}),
    "vae without quant_conv": ("vae", VAE | {"use_quant_conv": False}),
    "vae without post_quant_conv": ("vae", VAE | {"use_post_quant_conv": False}),
    "vae without attention": ("vae", VAE | {"mid_block_add_attention": False}),
}


def shapes_of(model):
    """Spell the shapes of a network as the single file does."""
    table, shapes = TABLES_LDM[type(model).__name__](model.config), {}
    for name, tensor in model.state_dict().items():
        _, whole = split_part(table.published(name))
        shapes[whole] = (table.parts(whole) * tensor.shape[0], *tensor.shape[1:])
    return shapes


@pytest.mark.parametrize("case", CASES)
def test_a_geometry_is_read_off_its_shapes(case):
    component, config = CASES[case]
    model = build(CLASSES[component], config, "config")
    inferred = INFER[component](Shapes("file", shapes_of(model)))
    found, own = (dict(one.config) for one in (build(CLASSES[component], inferred, "file"), model))
    found.pop("_use_default_values", None), own.pop("_use_default_values", None)
    assert found == own


@pytest.mark.parametrize("geometry", [FULL, SMALL], ids=["full", "small"])
@pytest.mark.parametrize("gone", [(), ("logit_scale",), ("text_projection",), ("logit_scale", "text_projection")])
def test_the_last_text_layer_is_left_out_where_there_is_any_sign_of_it(geometry, gone):
    """Signs are what comes after it, and the published number of layers."""
    prefix = PREFIXES["text_encoder"]
    keys = {key.removeprefix(prefix): shape for key, shape in key_lists(geometry)[0].items() if key.startswith(prefix)}
    shapes = Shapes("file", {key: shape for key, shape in keys.items() if key not in gone})
    whole = len(gone) < 2 or geometry is FULL
    assert INFER["text_encoder"](shapes)["num_hidden_layers"] == geometry.text_layers - whole
