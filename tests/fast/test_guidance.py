"""Guidance's two halves are computed once up to the first attention to a prompt; only where nothing can tell."""

import copy

import pytest
import torch
from random_checkpoint import GEOMETRIES
from torch import nn

from depthdiff import UNet2DConditionModel, fast
from depthdiff.fast import guidance
from depthdiff.models.attention import AttnProcessor
from tests.fast.conftest import distance

bf16, f32 = torch.bfloat16, torch.float32


@pytest.fixture
def shared(spy):
    """List the calls in which the halves were computed once."""
    return spy(guidance, "share_transformer")


@pytest.fixture
def unet():
    return UNet2DConditionModel.from_config(GEOMETRIES["tiny"]["unet"]).eval().requires_grad_(False)


def inputs_of(unet, rows=4, size=(12, 16), dtype=f32):
    half = torch.randn(rows // 2, unet.config.in_channels, *size)
    context = torch.randn(rows, 7, unet.config.cross_attention_dim)
    return half.repeat(2, 1, 1, 1).to(dtype), torch.tensor(501), context.to(dtype)


def compare(unet, inputs, **options):
    """Compute the noise with the fast computations and without them."""
    results = []
    for switch in (fast.enable, fast.disable):
        switch(unet)
        results.append(unet(*inputs, **options, return_dict=False)[0])
    return results


@pytest.mark.parametrize(("rows", "dtype", "bound"), [(2, f32, 2e-6), (6, f32, 2e-6), (4, bf16, 2e-2)])
def test_both_halves_at_once_equal_each(rows, dtype, bound, unet, shared):
    """Observed: 1e-6 and 1.2e-2, of bfloat16's own error."""
    mine, plain = compare(unet.to(dtype), inputs_of(unet, rows, dtype=dtype))
    assert distance(mine, plain) <= bound
    assert [len(call[1]) for call in shared] == [rows // 2]


def test_in_every_form_of_a_call(unet, shared):
    """A number as timestep, a record, and the arguments of the pipeline."""
    fast.enable(unet)
    sample, timestep, context = inputs_of(unet)
    expected = unet._call_impl(sample, timestep, context).sample
    options = {"encoder_hidden_states": context, "cross_attention_kwargs": None}
    for result in (
        unet(sample, 501, **options).sample,
        unet(sample=sample, timestep=timestep[None], **options, return_dict=False)[0],
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)  # observed: 1e-6
    assert len(shared) == 2


def test_rows_that_hooks_see(unet, shared):
    """After the first attention to a prompt all rows, as without it; a hook before it has all computed plainly."""
    seen, inputs = [], inputs_of(unet, 4)
    unet.down_blocks[1].register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    unet.down_blocks[0].downsamplers[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    compare(unet, inputs)
    assert len(shared) == 1
    assert [len(args[0]) for args in seen[0::2]] == [4, 4]
    assert [(len(kwargs["hidden_states"]), len(kwargs["temb"])) for kwargs in seen[1::2]] == [(4, 4)] * 2


def other_half(sample, timestep, context):
    sample[-1, 0, 0, 0] += 1e-3
    return sample, timestep, context


INPUTS = {
    "different halves": other_half,
    "an odd number of rows": lambda sample, timestep, context: (sample[:3], timestep, context[:3]),
    "an odd size": lambda sample, timestep, context: (sample[..., :-1], timestep, context),
    "a timestep for each row": lambda sample, timestep, context: (sample, torch.tensor([501, 301, 501, 301]), context),
    "more prompts": lambda sample, timestep, context: (sample[:2], timestep, context),
    "NaN": lambda sample, timestep, context: (sample * torch.nan, timestep, context),
}


def test_other_inputs_are_computed_row_by_row(unet, shared):
    """Observed: 1e-6."""
    for change, apply in INPUTS.items():
        mine, plain = compare(unet, apply(*inputs_of(unet)))
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5, equal_nan=True, msg=change)
        assert not shared, change


def hook(module):
    module.register_forward_hook(lambda *_: None)


def transformer_of(unet):
    return unet.down_blocks[0].attentions[0]


class Doubled(nn.Module):
    """Stands in the place of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def wrap_first(unet):
    unet.conv_in = Doubled(unet.conv_in)


def patch(name):
    """Put another function of the same form in the place of a method of one layer."""

    def change(unet):
        module = unet.get_submodule(name.rpartition(".")[0])
        method = getattr(module, name.rpartition(".")[2])
        setattr(module, name.rpartition(".")[2], lambda *args, **kwargs: method(*args, **kwargs))

    return change


def drop(unet):
    transformer_of(unet).transformer_blocks[0].attn1.to_out[1].train().p = 0.5


def adapt(unet):
    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    unet.requires_grad_(False)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CHANGES = {
    "a hook on the unet": hook,
    "a hook on the first convolution": lambda unet: hook(unet.conv_in),
    "a hook on the time embedding": lambda unet: hook(unet.time_embedding.linear_1),
    "a hook on the block": lambda unet: hook(unet.down_blocks[0]),
    "a hook on the attention": lambda unet: hook(transformer_of(unet).transformer_blocks[0].attn2),
    "a processor": lambda unet: transformer_of(unet).transformer_blocks[0].attn2.set_processor(AttnProcessor()),
    "another forward": patch(f"{BLOCK}.forward"),
    "another method": patch("get_time_embed"),
    "a feed-forward in chunks": lambda unet: transformer_of(unet).transformer_blocks[0].set_chunk_feed_forward(3, 1),
    "a replaced layer": wrap_first,
    "adapters of PEFT": adapt,
    "training": lambda unet: unet.train(),
    "dropout in one layer": drop,
    "gradients": lambda unet: unet.conv_out.requires_grad_(True),
}


def test_a_unet_that_was_changed_is_called_as_it_is(unet, shared):
    """Observed: 2e-6."""
    for change, apply in CHANGES.items():
        twin = copy.deepcopy(unet)
        apply(twin)
        inputs, results = inputs_of(twin), []
        for switch in (fast.enable, fast.disable):
            switch(twin)
            torch.manual_seed(0)
            results.append(twin(*inputs).sample)
        torch.testing.assert_close(*results, rtol=0, atol=1e-5, msg=change)
        assert not shared, change


def test_other_arguments_are_left_to_the_unet(unet, shared):
    sample, timestep, context = inputs_of(unet)
    for options in ({"encoder_attention_mask": torch.ones(4, 7)}, {"cross_attention_kwargs": {"scale": 1.0}}):
        mine, plain = compare(unet, (sample, timestep, context), **options)
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5)
    fast.enable(unet)
    for wrong in ({"attention_mask": torch.ones(4, 7)}, {"unknown": 1}, {"sample": sample}):
        with pytest.raises((ValueError, TypeError)) as expected:
            unet._call_impl(sample, timestep, context, **wrong)
        with pytest.raises(type(expected.value)) as got:
            unet(sample, timestep, context, **wrong)
        assert str(got.value) == str(expected.value)
    assert not shared


def test_training_with_gradient_checkpointing(unet):
    """Gradients are those of the plain network. Observed: the same."""
    unet.requires_grad_(True).enable_gradient_checkpointing()
    inputs, gradients = inputs_of(unet, 2), []
    for switch in (fast.enable, fast.disable):
        switch(unet)
        unet.zero_grad()
        unet(*inputs).sample.square().sum().backward()
        gradients.append(unet.conv_in.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_a_copied_unet_shares_nothing(unet, shared):
    """Its fast computations are put on again, and work on its own weights."""
    twin = copy.deepcopy(unet)
    twin.conv_in.weight.mul_(2)
    fast.enable(twin), fast.enable(unet)
    inputs = inputs_of(unet)
    assert distance(twin(*inputs).sample, unet(*inputs).sample) > 1e-3
    assert len(shared) == 2
