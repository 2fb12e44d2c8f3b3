"""Weights that lie in float8 and work in more: what is cast, what it changes, and what it refuses."""

import copy

import pytest
import torch
from random_checkpoint import build_pipeline
from torch import nn

from depthdiff import UNet2DConditionModel

FLOAT8 = torch.float8_e4m3fn
CALL = {"num_inference_steps": 3, "strength": 0.8, "output_type": "pt"}


def paint(pipe, photo):
    return pipe("a cat", photo, generator=torch.Generator().manual_seed(0), **CALL).images


def layers(network):
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_picture_is_that_of_rounded_weights(pipe, small_photo, dtype):
    """To the bit; and the weights lie in float8 before and after, in a fraction of the memory."""
    pipe.to(dtype)
    rounded = build_pipeline("tiny").to(dtype)
    rounded.set_progress_bar_config(disable=True)
    for layer in layers(rounded.unet).values():
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(FLOAT8).to(dtype)
    plain = paint(pipe, small_photo)
    before = sum(parameter.nbytes for parameter in pipe.unet.parameters())
    pipe.unet.enable_layerwise_casting()
    assert pipe.unet.dtype == dtype
    for _ in range(2):
        picture = paint(pipe, small_photo)
        assert torch.equal(picture, paint(rounded, small_photo))
        assert all(parameter.dtype == FLOAT8 for x in layers(pipe.unet).values() for parameter in x.parameters())
    assert not torch.equal(picture, plain)
    norms = [layer for layer in pipe.unet.modules() if isinstance(layer, (nn.GroupNorm, nn.LayerNorm))]
    assert norms and all(norm.weight.dtype == dtype for norm in norms)
    after = sum(parameter.nbytes for parameter in pipe.unet.parameters())
    assert after < (0.27 if dtype == torch.float32 else 0.52) * before


def test_it_computes_in_what_is_asked_for(pipe, small_photo):
    rounded = copy.deepcopy(pipe)
    pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
    for layer in layers(rounded.unet).values():
        layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(paint(pipe, small_photo), paint(rounded, small_photo))


def test_layers_that_stay_are_named_as_published(pipe):
    pipe.unet.enable_layerwise_casting(skip_modules_pattern=("time_embedding", r"attn2\.to_k"))
    kept = {name for name, layer in layers(pipe.unet).items() if layer.weight.dtype == torch.float32}
    assert len(kept) > 3
    assert {name for name in kept if not name.endswith("cross_attn.to_k")} == {"time_embedding.linear_1", "time_embedding.linear_2"}
    other = build_pipeline("tiny").unet
    other.enable_layerwise_casting(skip_modules_classes=(nn.Conv2d,))
    kinds = {type(layer): layer.weight.dtype for layer in layers(other).values()}
    assert kinds == {nn.Conv2d: torch.float32, nn.Linear: FLOAT8}


def test_what_is_refused(pipe, tmp_path):
    for options, message in (
        ({"storage_dtype": torch.int8}, "storage_dtype must be a floating-point torch dtype, got torch.int8"),
        ({"compute_dtype": "half"}, "compute_dtype must be a floating-point torch dtype, got 'half'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.unet.enable_layerwise_casting(**options)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}
    pipe.unet.enable_layerwise_casting()
    with pytest.raises(ValueError, match="is on already"):
        pipe.unet.enable_layerwise_casting()
    for what in (pipe, pipe.unet):
        with pytest.raises(ValueError, match=r"UNet2DConditionModel lie in float8.*save before"):
            what.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    to_q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    width = build_pipeline("tiny").unet.config.block_out_channels[0]
    lora = {f"{to_q}.lora_A.weight": torch.ones(2, width), f"{to_q}.lora_B.weight": torch.ones(width, 2)}
    with pytest.raises(ValueError, match="unet lie in float8; load adapters first"):
        pipe.load_lora_weights(lora, "style")
    assert pipe.get_list_adapters() == {}


def test_a_network_loaded_anew_is_whole(tiny_folder):
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    expected = copy.deepcopy(unet.state_dict())
    unet.enable_layerwise_casting()
    again = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
