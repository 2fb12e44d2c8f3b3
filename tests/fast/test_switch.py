"""The switches: what they leave as it was, what they reach, and that on equals off."""

import copy
import gc
import inspect
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from depthdiff import StableDiffusionDepth2ImgPipeline, UNet2DConditionModel, fast
from depthdiff.fast import convolution, linear, tiled, winograd
from depthdiff.fast.switch import COMPUTATIONS
from depthdiff.models.transformer import FeedForward
from tests.fast.conftest import distance

bf16, f32 = torch.bfloat16, torch.float32


class AutoencoderTiny(nn.Module):
    """Stands for another package's autoencoder."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)


def paint(pipe, image, prompt="two tigers", **options):
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), **options}
    return pipe(prompt, image, output_type="np", **options).images


def traces(pipe):
    """List all that describes the modules of a pipeline, but for the weights themselves."""
    return [
        (type(module), dict(vars(module)), module.forward, list(module.state_dict()))
        for network in pipe.networks.values()
        for module in network.modules()
    ]


def is_on(network):
    return not fast.report(network)[type(network).__name__].endswith("off")


def test_modules_stay_what_they_are(pipe):
    """Class, attributes, forward, state dict and hooks."""
    fast.disable(pipe)
    before = traces(pipe)
    fast.enable(pipe), fast.enable(pipe)
    during = traces(pipe)
    assert [(kind, forward, keys) for kind, _, forward, keys in during] == [
        (kind, forward, keys) for kind, _, forward, keys in before
    ]
    assert {key for _, has, _, _ in during for key in has} - {key for _, has, _, _ in before for key in has} == {
        "_compiled_call_impl"
    }
    fast.disable(pipe), fast.disable(pipe)
    for (_, now, _, _), (_, then, _, _) in zip(traces(pipe), before, strict=True):
        assert now.keys() == then.keys() and all(now[key] is then[key] for key in now)


def test_computations_name_the_arguments_of_forward():
    """Under any of its names an argument means the same; others are passed on."""
    for kind, compute in COMPUTATIONS.items():
        names = list(inspect.signature(kind.forward).parameters)[1:]
        for name, parameter in list(inspect.signature(compute).parameters.items())[1:]:
            if kind.__name__ == "Attention" and name == "temb":  # one of the keywords of its processor
                continue
            assert name in names, (kind, name)
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                assert names.index(name) == list(inspect.signature(compute).parameters).index(name) - 1


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(f32, 5e-6), (bf16, 4e-2)])
def test_on_equals_off(dtype, bound, pipe, monkeypatch):
    """For every network, laid out or not, with all ways taken at any size. Observed: 2e-6 and 1.8e-2."""
    for module, *names in (
        (tiled, "HUGEPAGE_MIN_BYTES"),
        (winograd, "FEWEST_TILES", "FEWEST_CHANNELS", "FEWEST_PRODUCTS"),
        (convolution, "FEWEST_DOUBLED", "FEWEST_WEIGHTS"),
        (linear, "TOKEN_CHUNK"),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 1)
    pipe.to(dtype)
    unet, vae, text, depth = pipe.unet, pipe.vae, pipe.text_encoder, pipe.depth_estimator
    size = depth.config.image_size
    half, context = torch.randn(1, 5, 12, 16, dtype=dtype), torch.randn(2, 77, 40, dtype=dtype)
    pixels, latents = torch.rand(2, 3, 96, 64, dtype=dtype) * 2 - 1, torch.randn(2, 4, 12, 8, dtype=dtype)
    ids, photo = torch.randint(0, 50, (2, 77)), torch.rand(1, 3, size, size, dtype=dtype)

    def results():
        yield unet(half.repeat(2, 1, 1, 1), 501, context).sample
        yield vae.encode(pixels).latent_dist.mean
        yield vae.decode(latents).sample
        yield text(ids).last_hidden_state
        yield depth(photo).predicted_depth

    fast.disable(pipe)
    plain = list(results())
    fast.enable(pipe)
    assert max(map(distance, results(), plain)) <= bound
    for network in pipe.networks.values():
        fast.lay_out(network)
    assert max(map(distance, results(), plain)) <= bound


def test_pictures_are_the_same(pipe, small_photo):
    """Observed: at most 2e-6."""
    mine = paint(pipe, small_photo)
    fast.disable(pipe)
    np.testing.assert_allclose(paint(pipe, small_photo), mine, rtol=0, atol=2e-5)


def test_an_argument_leaves_them_off(tiny_folder):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder, fast=False)
    assert not any(map(is_on, (pipe.unet, pipe.vae.encoder, pipe.vae.decoder)))
    pipe.unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    assert not is_on(pipe.unet)
    assert not is_on(type(pipe).from_pipe(pipe).unet)
    with pytest.raises(TypeError, match="fast must be True or False"):
        StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder, fast="no")


def test_components_that_are_assigned_later_follow(pipe):
    unet = copy.deepcopy(pipe.unet)
    assert not is_on(unet)
    fast.disable(pipe)
    pipe.unet = unet
    assert not is_on(unet)
    fast.enable(pipe)
    assert is_on(unet)
    pipe.unet = copy.deepcopy(unet)
    assert is_on(pipe.unet)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copies(copied, pipe, small_photo):
    """A copied network is plain; a copied pipeline is as the pipeline, with calls of its own modules."""
    assert not is_on(copied(pipe.unet))
    twin = copied(pipe)
    assert is_on(twin.unet)
    expected = paint(pipe, small_photo)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.zero_()
    np.testing.assert_allclose(paint(twin, small_photo), expected, rtol=0, atol=1e-6)
    fast.disable(twin)
    assert is_on(pipe.unet) and not is_on(copied(twin).unet)


def test_a_network_is_freed_without_the_garbage_collector(pipe):
    conv = nn.Conv2d(3, 4, 3)
    fast.enable(conv)
    gone = weakref.ref(conv)
    gc.disable()
    del conv
    assert gone() is None
    gc.enable()


def test_report(pipe):
    fast.enable(pipe)
    unet = pipe.unet
    assert fast.report(unet)["Attention"] == "14 on"
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.register_forward_hook(lambda *_: None)
    block.attn2.compile(backend="eager")
    block.ff.__class__ = type("Own", (FeedForward,), {})
    found = fast.report(unet)
    assert sorted(found["Attention"].split("; ")) == ["1 not: compiled", "1 not: hooks or another forward", "12 on"]
    assert (found["FeedForward"], found["Own"]) == ("6 on", "1 not: a subclass")
    fast.disable(unet)
    assert fast.report(unet)["FeedForward"] == "6 off"
    fast.enable(unet)
    assert fast.report(unet.to("meta"))["FeedForward"] == "6 not: on meta"


def test_what_they_reach(pipe):
    """Layers, networks within other modules, and pipelines; other packages' modules only where they are given."""
    fast.disable(pipe)
    fast.enable(pipe.unet.down_blocks[0])
    assert fast.report(pipe.unet.down_blocks[0])["ResnetBlock2D"] == "1 on"
    assert not is_on(pipe.unet)
    foreign = nn.Conv2d(3, 4, 3)
    fast.enable(nn.Sequential(pipe.unet))
    assert is_on(pipe.unet)
    pipe.vae = AutoencoderTiny(foreign, pipe.unet.mid_block)
    fast.enable(pipe)
    assert not is_on(foreign)
    fast.enable(foreign)
    assert is_on(foreign)
    for wrong in (3, None, "unet", [pipe.unet]):
        for switch in (fast.enable, fast.disable, fast.report):
            with pytest.raises(TypeError, match="target must be a pipeline of depthdiff or a module"):
                switch(wrong)


def test_what_the_user_compiled_stays(pipe):
    calls = []
    pipe.unet.compile(backend=lambda graph, inputs: calls.append(graph) or graph)
    compiled = pipe.unet._compiled_call_impl
    fast.enable(pipe)
    assert pipe.unet._compiled_call_impl is compiled
    fast.disable(pipe)
    assert pipe.unet._compiled_call_impl is compiled


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@torch.no_grad()
def test_networks_are_traced_and_exported_plainly(pipe):
    """Whatever size they see later. Observed: 2e-6."""
    levels = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    options = {"in_channels": 5, "block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DConditionModel.from_config({**levels, **options, "cross_attention_dim": 12, "attention_head_dim": 2})
    sides = {axis: torch.export.Dim(f"side{axis}", min=2, max=64) for axis in (2, 3)}
    half, context = torch.randn(1, 5, 16, 24), torch.randn(2, 7, 12)
    fast.enable(unet)
    inputs = half.repeat(2, 1, 1, 1), torch.tensor(501), context

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, *args):
            return self.unet(*args, return_dict=False)[0]

    program = torch.export.export(Sample(), inputs, dynamic_shapes=((sides, None, None),)).module()
    for given in (inputs, (torch.randn(2, 5, 12, 20), torch.tensor(9), context)):
        torch.testing.assert_close(program(*given), unet(*given).sample, rtol=0, atol=2e-5)
    vae = pipe.vae
    traced = torch.jit.trace(vae.decoder, torch.randn(1, 4, 6, 8), check_trace=False)
    other = torch.randn(2, 4, 10, 6)
    torch.testing.assert_close(traced(other), vae.decoder(other), rtol=0, atol=2e-5)


def test_errors_of_a_layer_are_its_own(pipe):
    """A wrong call is refused in the layer's own words."""
    for module in pipe.unet.modules():
        if type(module) in COMPUTATIONS:
            for args, kwargs in (((), {}), ((1,), {}), ((), {"nonsense": 1})):
                with pytest.raises(Exception) as plain:
                    module._call_impl(*args, **kwargs)
                with pytest.raises(type(plain.value)) as mine:
                    module(*args, **kwargs)
                assert str(mine.value) == str(plain.value)
