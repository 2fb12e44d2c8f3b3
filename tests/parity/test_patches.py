"""Patched networks: what others replace, wrap or set counts at once and everywhere, as in the references."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.geometries import call, distance, draw, pair, unet_inputs

TOLERANCE = 1e-5  # relative L2 in float32; observed: at most 2e-6
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def shared():
    """One pair, for patches that are undone."""
    return pair("unet", "short")


@pytest.fixture
def unets(shared):
    """A fresh pair."""
    return copy.deepcopy(shared)


def run(unet: nn.Module, **kwargs):
    with torch.no_grad():
        return unet(**{**unet_inputs("short", height=14, width=10), **kwargs}).sample


def check(unets, patch, **kwargs) -> None:
    """Patch both networks after a first call; the results agree and differ from the first."""
    plain = run(unets[0])
    for unet in unets:
        patch(unet)
    changed = run(unets[0], **kwargs)
    assert distance(changed, run(unets[1], **kwargs)) < TOLERANCE
    assert distance(changed, plain) > 1e-4, "a patch without an effect proves nothing"


class Wrapped(nn.Module):
    """A layer that owns another, as LoRA's do."""

    def __init__(self, layer: nn.Module, factor: float = 0.5) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs) * self.factor


LAYERS = [
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "conv_act",
    "time_embedding.linear_1",
    "time_embedding.act",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.conv2",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.1.resnets.0.time_emb_proj",
    "down_blocks.1.resnets.0.nonlinearity",
    "down_blocks.1.resnets.0.norm1",
    "down_blocks.2.resnets.0.dropout",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.0.downsamplers.0",
    "up_blocks.1.upsamplers.0.conv",
    "up_blocks.1.upsamplers.0",
    "mid_block.attentions.0.proj_in",
    "mid_block.attentions.0.proj_out",
    "mid_block.attentions.0.norm",
    "mid_block.resnets.1",
    "up_blocks.2.attentions.1.transformer_blocks.0",
    *(f"{BLOCK}.{name}" for name in ("norm1", "norm2", "norm3", "attn1", "attn2", "ff", "ff.net.0", "ff.net.0.proj")),
    *(f"{BLOCK}.ff.net.{index}" for index in (1, 2)),
    *(
        f"{BLOCK}.{attn}.{name}"
        for attn in ("attn1", "attn2")
        for name in ("to_q", "to_k", "to_v", "to_out.0", "to_out.1")
    ),
]


@pytest.fixture(scope="module")
def result(shared):
    return run(shared[0])


@pytest.mark.parametrize("path", LAYERS)
def test_wrapped_layer(shared, result, path):
    """A wrapper in a layer's place, and a replaced `forward` of the layer itself."""
    parent, _, name = path.rpartition(".")
    originals = [unet.get_submodule(path) for unet in shared]
    results = []
    for unet, layer in zip(shared, originals, strict=True):
        unet.get_submodule(parent)._modules[name] = Wrapped(layer)
        results.append(run(unet))
        unet.get_submodule(parent)._modules[name] = layer
        layer.forward = halved(layer.forward)
        results.append(run(unet))
        del layer.forward
    assert distance(results[0], results[2]) < TOLERANCE
    assert distance(results[1], results[3]) < TOLERANCE
    assert torch.equal(results[0], results[1])
    assert distance(results[0], result) > 1e-4


def halved(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs) * 0.5


CLASSES = {
    "ResnetBlock2D": lambda forward: (
        lambda self, input_tensor, temb, *args, **kw: forward(self, input_tensor, temb) * 0.9
    ),
    "Attention": lambda forward: (
        lambda self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kw: (
            forward(self, hidden_states, encoder_hidden_states, attention_mask, **kw) * 0.5
        )
    ),
    "BasicTransformerBlock": lambda forward: lambda self, hidden_states, **kw: forward(self, hidden_states, **kw) * 0.9,
    "FeedForward": lambda forward: lambda self, hidden_states, *args, **kw: forward(self, hidden_states) * 0.5,
    "GEGLU": lambda forward: lambda self, hidden_states, *args, **kw: forward(self, hidden_states) * 0.5,
    "Upsample2D": lambda forward: (
        lambda self, hidden_states, output_size=None, *args, **kw: forward(self, hidden_states, output_size) * 0.5
    ),
    "Downsample2D": lambda forward: lambda self, hidden_states, *args, **kw: forward(self, hidden_states) * 0.5,
    "Transformer2DModel": lambda forward: (
        lambda self, hidden_states, **kw: (forward(self, hidden_states, **kw)[0] * 0.5,)
    ),
    "CrossAttnUpBlock2D": lambda forward: lambda self, **kw: forward(self, **kw) * 0.5,
    "UpBlock2D": lambda forward: lambda self, **kw: forward(self, **kw) * 0.5,
    "DownBlock2D": lambda forward: lambda self, **kw: (forward(self, **kw)[0] * 0.5, forward(self, **kw)[1]),
    "UNetMidBlock2DCrossAttn": lambda forward: lambda self, x, temb, **kw: forward(self, x, temb, **kw) * 0.5,
    "TimestepEmbedding": lambda forward: lambda self, sample, condition=None: forward(self, sample, condition) * 0.5,
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_forward(unets, monkeypatch, name):
    """A replaced `forward` of a class counts in all its layers."""

    def patch(unet):
        kinds = {type(module) for module in unet.modules() if type(module).__name__ == name}
        assert len(kinds) == 1
        kind = kinds.pop()
        monkeypatch.setattr(kind, "forward", CLASSES[name](kind.forward))

    check(unets, patch)


def circular(network):
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def sideways(network):
    """Make the convolutions' edges meet left and right only, by their own `_conv_forward`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):

            def forward(x, weight, bias, layer=module):
                x = F.pad(F.pad(x, (layer.padding[1],) * 2 + (0, 0), "circular"), (0, 0) + (layer.padding[0],) * 2)
                return F.conv2d(x, weight, bias, layer.stride)

            module._conv_forward = forward


def subclassed(network):
    """Give a block another class, as token merging does."""
    block = network.get_submodule(BLOCK)

    class Merged(type(block)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 0.5

    block.__class__ = Merged


def changed_weights(network):
    network.get_submodule(BLOCK).attn2.to_k.weight.data.mul_(0.5)
    network.down_blocks[0].resnets[0].conv1.weight.data[0] = 0
    network.time_embedding.linear_2.bias.data.add_(0.1)


def weight_property(network):
    nn.utils.parametrize.register_parametrization(network.get_submodule(BLOCK).attn1.to_q, "weight", Halved())


class Halved(nn.Module):
    def forward(self, weight):
        return weight * 0.5


def set_all(network: nn.Module, kind: str, name: str, value: float) -> None:
    for module in network.modules():
        if type(module).__name__ == kind:
            setattr(module, name, value)


PATCHES = {
    "circular padding": circular,
    "_conv_forward": sideways,
    "another class": subclassed,
    "changed weights": changed_weights,
    "parametrization": weight_property,
    "removed layer": lambda unet: setattr(unet.down_blocks[1].attentions[0], "transformer_blocks", nn.ModuleList()),
    "output_scale_factor": lambda unet: set_all(unet, "ResnetBlock2D", "output_scale_factor", 1.2),
    "rescale_output_factor": lambda unet: set_all(unet, "Attention", "rescale_output_factor", 1.2),
    "chunks": lambda unet: (unet.get_submodule(BLOCK).set_chunk_feed_forward(5, 1), changed_weights(unet)),
    "nonlinearity": lambda unet: setattr(unet.up_blocks[1].resnets[0], "nonlinearity", nn.Tanh()),
    "time_proj": lambda unet: setattr(unet.time_proj, "flip_sin_to_cos", False),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patch(unets, name):
    check(unets, PATCHES[name])


@pytest.mark.parametrize("patch", [circular, sideways], ids=lambda patch: patch.__name__)
def test_vae_patch(patch):
    vaes = pair("vae", "sd")
    with torch.no_grad():
        plain = call("vae", "sd", vaes[0])
        for vae in vaes:
            patch(vae)
        mine, theirs = (call("vae", "sd", vae) for vae in vaes)
    for key in plain:
        assert distance(mine[key], theirs[key]) < TOLERANCE
        assert distance(mine[key], plain[key]) > 1e-4


def test_prompt_layers_are_read_at_every_call(unets):
    """A layer that changes between two calls with one prompt counts at the second."""
    steps = []
    for unet in unets:
        layer = unet.get_submodule(BLOCK).attn2.to_k
        wrapped = unet.get_submodule(BLOCK).attn2.to_k = Wrapped(layer, 1.0)
        results = [run(unet)]
        wrapped.factor = 0.5
        steps.append([*results, run(unet)])
    for mine, theirs in zip(*steps, strict=True):
        assert distance(mine, theirs) < TOLERANCE
    assert distance(steps[0][0], steps[0][1]) > 1e-4


def test_copies_are_apart(unets):
    """A deep copy has its own patches."""
    twin = copy.deepcopy(unets[0])
    circular(twin)
    assert torch.equal(run(unets[0]), run(copy.deepcopy(unets[0])))
    assert distance(run(twin), run(unets[0])) > 1e-4
    assert run(twin, sample=draw(2, 5, 16, 8)).shape == (2, 4, 16, 8)
