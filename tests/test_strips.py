"""Large maps are convolved in strips of rows: the same numbers, and only where nothing but plain computing goes on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from depthdiff import AutoencoderKL
from depthdiff.models import layers, strips
from depthdiff.models.convolution import Conv3x3
from depthdiff.models.strips import striped_conv3x3, strips_are_faster

bf16 = torch.bfloat16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make the test's maps large ones, and strips of two of their rows."""
    monkeypatch.setattr(strips, "LARGE_BYTES", 1)
    monkeypatch.setattr(strips, "STRIP_BYTES", 2 * 8 * 13 * 2)


def relative(mine, expected):
    return ((mine.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 11, 100])
@pytest.mark.parametrize("act", [None, nn.SiLU(), nn.GELU()])
@pytest.mark.parametrize("added", [False, True])
def test_strips_equal_the_whole(rows, act, added, monkeypatch):
    """11 rows, which most strips do not go into; against float64 with weights rounded alike. Observed: at most 3e-3."""
    monkeypatch.setattr(strips, "STRIP_BYTES", rows * 8 * 13 * 2)
    x = torch.randn(2, 8, 11, 13).to(bf16).contiguous(memory_format=torch.channels_last)
    conv, plus = Conv3x3(8, 6).to(bf16), torch.randn(2, 6, 11, 13).to(bf16) if added else None
    calls = []
    monkeypatch.setattr(F, "conv2d", lambda *a, conv2d=F.conv2d, **k: calls.append(1) or conv2d(*a, **k))
    mine = striped_conv3x3(x, conv, act, plus)
    assert len(calls) == 2 * -(-11 // rows)
    wide = x.double() if act is None else act(x).double()
    expected = F.conv2d(wide, conv.weight.double(), conv.bias.double(), padding=1)
    expected = expected if plus is None else expected + plus.double()
    assert mine.is_contiguous(memory_format=torch.channels_last)
    assert relative(mine, expected) <= 5e-3
    alone = striped_conv3x3(x[1:], conv, act, None if plus is None else plus[1:])
    assert torch.equal(mine[1:], alone), "a picture must not depend on its company"


def layer(**options):
    return Conv3x3(8, 6, **options).to(bf16)


def other_forward():
    conv = layer()
    conv.forward = lambda x: x
    return conv


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


class Wrapped(Conv3x3):
    """What an adapter may put in a layer's place."""


NOT = {
    "another stride": {"conv": layer(stride=2)},
    "no border": {"conv": layer(padding=0)},
    "other size": {"conv": nn.Conv2d(8, 6, 1).to(bf16)},
    "another kind": {"conv": Wrapped(8, 6).to(bf16)},
    "wide weights": {"conv": Conv3x3(8, 6)},
    "hooked": {"conv": hooked(layer())},
    "another forward": {"conv": other_forward()},
    "circular": {"conv": nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular").to(bf16)},
    "groups": {"conv": nn.Conv2d(8, 6, 3, padding=1, groups=2).to(bf16)},
    "many channels": {"conv": nn.Conv2d(8, 2**14, 3, padding=1).to(bf16)},
    "an activation that is not element by element": {"act": nn.Softmax(1)},
    "hooked activation": {"act": hooked(nn.SiLU())},
    "activation in place": {"act": nn.SiLU(inplace=True)},
    "float32": {"x": torch.randn(2, 8, 11, 13), "conv": Conv3x3(8, 6)},
    "not a map": {"x": torch.randn(8, 11, 13).to(bf16)},
    "without data": {"x": torch.empty(2, 8, 11, 13, dtype=bf16, device="meta")},
}


@torch.no_grad()
@pytest.mark.parametrize("why", NOT)
def test_strips_are_not_used_otherwise(why):
    usual = {"x": torch.randn(2, 8, 11, 13).to(bf16), "conv": layer(), "act": nn.SiLU()}
    assert strips_are_faster(**usual)
    assert not strips_are_faster(**{**usual, **NOT[why]})


def test_strips_are_not_used_in_training_nor_for_small_maps(monkeypatch):
    x, conv = torch.randn(2, 8, 11, 13).to(bf16), layer()
    assert not strips_are_faster(x, conv)
    with torch.no_grad():
        assert strips_are_faster(x, conv)
        with torch.autocast("cpu", bf16):
            assert not strips_are_faster(x, conv)
        monkeypatch.setattr(strips, "LARGE_BYTES", x[:1].nbytes)
        assert strips_are_faster(x, conv)
        monkeypatch.setattr(strips, "LARGE_BYTES", x[:1].nbytes + 1)
        assert not strips_are_faster(x, conv), "the size of the batch must not count"


@pytest.mark.parametrize("trained", ["conv_shortcut", "conv2", "norm1"])
def test_a_part_of_a_block_can_be_trained(trained):
    """As without strips. Observed: the same."""
    block = layers.ResnetBlock2D(8, 6, None, groups=2, eps=1e-5, act_fn="silu").to(bf16).requires_grad_(False)
    getattr(block, trained).requires_grad_(True)
    x, gradients = torch.randn(2, 8, 11, 13).to(bf16), []
    for large in (1, 2**60):
        strips.LARGE_BYTES = large  # the fixture brings the old one back
        block.zero_grad()
        block(x).float().square().sum().backward()
        gradients.append(next(getattr(block, trained).parameters()).grad.clone())
    assert gradients[0].abs().sum() > 0
    assert relative(*gradients) <= 1e-2


@torch.no_grad()
def test_the_autoencoder_in_strips(monkeypatch):
    """Every 3x3 convolution after a norm, and those after repeating pixels. Observed: at most 4e-3."""
    config = {"block_out_channels": [8, 16], "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 2}
    net = AutoencoderKL.from_config({**config, "up_block_types": ["UpDecoderBlock2D"] * 2}).to(bf16)
    for weight in net.parameters():
        weight.uniform_(-0.2, 0.2)
    x, z = (torch.randn(2, *shape).to(bf16) for shape in ((3, 24, 40), (4, 12, 20)))
    wide, shapes = copy.deepcopy(net).float(), []

    def watched(x, conv, act=None, plus=None):
        shapes.append((act is not None, plus is not None))
        return striped_conv3x3(x, conv, act, plus)

    monkeypatch.setattr(layers, "striped_conv3x3", watched)
    mine = net.encode(x).latent_dist.mode(), net.decode(z).sample
    blocks = [module for module in net.modules() if isinstance(module, layers.ResnetBlock2D)]
    assert shapes.count((True, True)) == len(blocks), "the second of a block, with the short cut"
    assert shapes.count((True, False)) == len(blocks) + 1, "the first of a block, and the decoder's last"
    assert shapes.count((False, False)) == 1, "the decoder's one step up"
    monkeypatch.setattr(strips, "LARGE_BYTES", 2**60)
    plain = net.encode(x).latent_dist.mode(), net.decode(z).sample
    exact = wide.encode(x.float()).latent_dist.mode(), wide.decode(z.float()).sample
    for striped, whole, true in zip(mine, plain, exact, strict=True):
        assert relative(striped, whole) <= 1e-2
        assert relative(striped, true) <= 2e-2
