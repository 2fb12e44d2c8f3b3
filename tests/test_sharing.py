"""Networks with other weights for one call: what was put on the modules from outside goes with them."""

import copy
from functools import partial
from types import MethodType

import pytest
import torch

from depthdiff.sharing import with_weights


def call(pipe, photo, **options):
    generator = torch.Generator().manual_seed(0)
    how = {"strength": 1.0, "num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0, **options}
    return pipe("two tigers", photo, generator=generator, **how).images


def load(pipe):
    """Load a LoRA into the UNet's attention."""
    torch.manual_seed(1)
    state = {}
    for path, layer in pipe.unet.named_modules():
        name = path.removeprefix("_orig_mod.")
        if name.endswith(("to_q", "to_v")):
            state[f"unet.{name}.lora_A.weight"] = torch.randn(4, layer.in_features)
            state[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, 4)
    pipe.load_lora_weights(state, "style")


def test_a_key_that_no_module_has_is_refused(pipe):
    for key in ("nothing.weight", "conv_in.nothing"):
        with pytest.raises(KeyError, match="UNet2DConditionModel has no"):
            with_weights(pipe.unet, {key: torch.zeros(1)})


@pytest.mark.parametrize("bind", [lambda forward, layer: MethodType(forward, layer), partial])
def test_a_forward_bound_to_its_module_computes_with_the_copys_weights(pipe, small_photo, bind):
    plain = call(pipe, small_photo)
    load(pipe)
    for layer in pipe.unet.modules():
        if type(layer).__name__ == "Attention":
            layer.forward = bind(type(layer).forward, layer)
    assert not torch.equal(call(pipe, small_photo), plain)
    scaled = call(pipe, small_photo, cross_attention_kwargs={"scale": 0.0})
    assert (scaled - plain).abs().max() < 1e-4


def test_a_unets_own_forward_and_deep_cache(pipe, small_photo):
    cached, plain = call(pipe, small_photo, deep_cache=3), call(pipe, small_photo)
    pipe.unet.forward = MethodType(type(pipe.unet).forward, pipe.unet)
    assert (call(pipe, small_photo, deep_cache=3) - cached).abs().max() < 1e-4
    assert not torch.equal(cached, plain)


def test_merged_adapters_below_those_of_peft_take_a_scale(pipe, small_photo):
    peft = pytest.importorskip("peft")
    plain = call(pipe, small_photo)
    load(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))  # whose B is 0
    scaled = call(pipe, small_photo, cross_attention_kwargs={"scale": 0.0})
    assert (scaled - plain).abs().max() < 1e-4


def test_deep_cache_scales_the_adapters_of_peft_at_every_step(pipe, small_photo):
    peft = pytest.importorskip("peft")
    plain = call(pipe, small_photo, deep_cache=2)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "conv_out"], init_lora_weights=False))
    scaled = call(pipe, small_photo, deep_cache=2, cross_attention_kwargs={"scale": 0.0})
    assert (scaled - plain).abs().max() < 1e-4


def test_a_compiled_unet_takes_adapters_scales_and_deep_cache(pipe, small_photo):
    plain, cached = call(pipe, small_photo), call(pipe, small_photo, deep_cache=2)
    pipe.unet = torch.compile(copy.deepcopy(pipe.unet), backend="eager")
    assert (call(pipe, small_photo, deep_cache=2) - cached).abs().max() < 1e-4
    load(pipe)
    assert (call(pipe, small_photo) - plain).abs().max() > 0.1
    scaled = call(pipe, small_photo, cross_attention_kwargs={"scale": 0.0})
    assert (scaled - plain).abs().max() < 1e-4
    pipe.unload_lora_weights()
    assert (call(pipe, small_photo) - plain).abs().max() < 1e-4
