"""Large maps are normed, activated and convolved some rows at a time: the plain results, and only plainly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from depthdiff import AutoencoderKL, fast
from depthdiff.fast import memory, tiled, winograd
from depthdiff.models.resnet import Downsample2D, ResnetBlock2D
from tests.fast.conftest import distance

bf16, f32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make the test's maps large ones, and tiles of two of their rows."""
    monkeypatch.setattr(tiled, "HUGEPAGE_MIN_BYTES", 1)
    monkeypatch.setattr(tiled, "TILE_BYTES", 2 * 8 * 13 * 2)
    for name in ("FEWEST_TILES", "FEWEST_CHANNELS", "FEWEST_PRODUCTS"):
        monkeypatch.setattr(winograd, name, 1)


@pytest.fixture
def used(spy):
    return spy(tiled, "tiled_norm_act_conv")


def image(*shape, dtype=bf16):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def block_of(channels, filters, dtype=bf16, act="silu"):
    options = {"temb_channels": None, "groups": 2, "eps": 1e-3, "non_linearity": act}
    block = ResnetBlock2D(in_channels=channels, out_channels=filters, **options).to(dtype)
    with torch.no_grad():
        for weight in block.parameters():
            weight.uniform_(-0.5, 0.5)
    fast.enable(block)
    return block


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "dtype", "bound", "rows", "channels", "filters", "act"),
    [
        ((11, 13), bf16, 6e-3, 1, 8, 8, "silu"),
        ((11, 13), bf16, 6e-3, 2, 8, 6, "gelu"),
        ((12, 16), bf16, 6e-3, 5, 6, 8, "mish"),
        ((2, 5), bf16, 6e-3, 100, 8, 8, "silu"),
        ((11, 13), f32, 6e-7, 4, 8, 6, "relu"),
        ((11, 13), f32, 6e-7, 100, 6, 8, "silu"),
        ((12, 16), f32, 1e-6, 2, 8, 8, "silu"),
        ((28, 20), f32, 1e-6, 3, 8, 6, "silu"),
    ],
)
def test_a_residual_block(size, dtype, bound, rows, channels, filters, act, spy, monkeypatch):
    """The second half writes over what it reads. In float32, sizes of whole tiles go by Winograd's algorithm.

    Against float64 with weights rounded alike. Observed: 4e-3, 2e-7, 3e-7.
    """
    monkeypatch.setattr(tiled, "TILE_BYTES", rows * 8 * size[1] * dtype.itemsize)
    by_winograd, block = spy(winograd, "winograd_conv3x3"), block_of(channels, filters, dtype, act)
    x = image(2, channels, *size, dtype=dtype) + 3
    before, mine = x.clone(), block(x)
    assert len(by_winograd) == (2 if dtype == f32 and size[0] % 4 == size[1] % 4 == 0 else 0)
    assert torch.equal(x, before)
    assert distance(mine, copy.deepcopy(block).double()(x.double())) <= bound
    assert distance(block(x[1:]), mine[1:]) <= (bound if by_winograd else 0), "a picture must not depend on its company"
    for other in (x.contiguous(), x.flip(3).flip(3), x[:1].expand(2, -1, -1, -1)):
        assert distance(block(other), block(other.clone().contiguous(memory_format=torch.channels_last))) <= bound
    assert block(x[:0]).shape == (0, filters, *size)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "dtype", "bound", "rows"),
    [((12, 16), bf16, 6e-3, 1), ((11, 13), bf16, 6e-3, 3), ((2, 2), f32, 1e-6, 1), ((13, 6), f32, 1e-6, 2)],
)
def test_halving(size, dtype, bound, rows, used, monkeypatch):
    """With a row and a column of zeros below and to the right. Observed: 2e-3 and 2e-7, as without tiles."""
    monkeypatch.setattr(tiled, "TILE_BYTES", rows * 2 * 8 * size[1] * dtype.itemsize)
    layer, x = Downsample2D(8, use_conv=True, padding=0).to(dtype), image(2, 8, *size, dtype=dtype)
    weights = [weight.double() for weight in layer.conv.parameters()]
    fast.enable(layer)
    assert distance(layer(x), F.conv2d(F.pad(x, (0, 1, 0, 1)).double(), *weights, 2)) <= bound
    assert len(used) == 1
    other = Downsample2D(8, use_conv=True, padding=1).to(dtype)
    fast.enable(other)
    other(x, 1.0)
    assert len(used) == 1


@torch.no_grad()
def test_statistics_of_groups_with_means_far_from_zero(monkeypatch):
    """Observed against float64: 3e-8 of the deviation, 4e-8 of the variance; over 300 seeds 1.7e-7 and 2.4e-7."""
    x = (image(1, 12, 40, 50) * torch.arange(1, 13)[:, None, None] + 20 * torch.randn(12, 1, 1)).to(bf16)
    monkeypatch.setattr(tiled, "TILE_BYTES", 7 * 12 * 50 * 2)  # 40 rows in six parts, the last of five
    mean, variance = tiled.GroupNormStats().take_in(x).of_groups(4)
    groups = x.double().reshape(4, -1)
    expected = groups.mean(1).repeat_interleave(3), groups.var(1, correction=0).repeat_interleave(3)
    assert ((mean - expected[0]) / expected[1].sqrt()).abs().max() <= 3e-7
    assert (variance / expected[1] - 1).abs().max() <= 4e-7


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(bf16, 1e-2), (f32, 2e-6)])
def test_the_autoencoder(dtype, bound, used):
    """Every 3x3 convolution after a norm, the first ones, and the one that halves. Observed: 5e-3 and 5e-7."""
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL.from_config({"block_out_channels": [8, 16], "norm_num_groups": 4, **levels}).to(dtype)
    for weight in vae.parameters():
        weight.uniform_(-0.2, 0.2)
    x, z = (torch.randn(2, *shape).to(dtype) for shape in ((3, 24, 40), (4, 12, 20)))
    plain = vae.encode(x).latent_dist.mode(), vae.decode(z).sample
    fast.enable(vae)
    mine = vae.encode(x).latent_dist.mode(), vae.decode(z).sample
    blocks = sum(isinstance(module, ResnetBlock2D) for module in vae.modules())
    assert len(used) == 2 * blocks + 4, "encoder: first, last and the step down; decoder: last"
    assert max(map(distance, mine, plain)) <= bound
    vae.encoder.conv_out.register_forward_hook(lambda *_: None)
    vae.encoder.mid_block.register_forward_hook(lambda *_: None)
    assert distance(vae.encode(x).latent_dist.mode(), plain[0]) <= bound
    vae.enable_tiling(), vae.enable_slicing()
    mine = vae.encode(x).latent_dist.mode(), vae.decode(z).sample
    fast.disable(vae)
    assert max(map(distance, mine, (vae.encode(x).latent_dist.mode(), vae.decode(z).sample))) <= bound


class Wrap(nn.Module):
    """Stands in the place of a layer, as an adapter's module does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def hook(layer):
    layer.register_forward_hook(lambda *_: None)


def drop(block):
    block.dropout.p = 0.5
    block.train()


CHANGES = {
    "a hook on a convolution": lambda block: hook(block.conv1),
    "a hook on the block": hook,
    "a hook on a norm": lambda block: hook(block.norm2),
    "a hook on the activation": lambda block: hook(block.nonlinearity),
    "a hook on the shortcut": lambda block: hook(block.conv_shortcut),
    "a hook on the dropout": lambda block: hook(block.dropout),
    "a wrapped convolution": lambda block: setattr(block, "conv2", Wrap(block.conv2)),
    "a wrapped shortcut": lambda block: setattr(block, "conv_shortcut", Wrap(block.conv_shortcut)),
    "no norm": lambda block: setattr(block, "norm1", nn.Identity()),
    "another norm": lambda block: setattr(block, "norm1", nn.BatchNorm2d(8).to(bf16).eval()),
    "a norm without weights": lambda block: setattr(block, "norm1", nn.GroupNorm(2, 8, affine=False)),
    "an activation across channels": lambda block: setattr(block, "nonlinearity", nn.Softmax(1)),
    "an activation in place": lambda block: setattr(block, "nonlinearity", nn.SiLU(inplace=True)),
    "circular padding": lambda block: setattr(block.conv1, "padding_mode", "circular"),
    "groups": lambda block: setattr(block, "conv1", nn.Conv2d(8, 6, 3, padding=1, groups=2).to(bf16)),
    "float64": lambda block: block.double(),
    "dropout in training": drop,
}


@torch.no_grad()
def test_a_block_that_was_changed_is_called_as_it_is(used):
    for change, apply in CHANGES.items():
        block = block_of(8, 6)
        block.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
        apply(block)
        x, results = image(2, 8, 11, 13, dtype=block.conv1.weight.dtype), []
        for switch in (fast.enable, fast.disable):
            switch(block)
            torch.manual_seed(0)
            results.append(block(x))
        assert torch.equal(*results), change
        assert not used, change


@pytest.mark.parametrize("trained", ["conv_shortcut", "conv2", "norm1"])
def test_a_part_of_a_block_can_be_trained(trained, used):
    """Without tiles."""
    block, x, gradients = block_of(8, 6).requires_grad_(False), torch.randn(2, 8, 11, 13).to(bf16), []
    getattr(block, trained).requires_grad_(True)
    for switch in (fast.enable, fast.disable):
        switch(block)
        block.zero_grad()
        block(x).float().square().sum().backward()
        gradients.append(next(getattr(block, trained).parameters()).grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    assert not used


@torch.no_grad()
def test_errors_are_those_of_the_layers():
    block = block_of(8, 6)
    for wrong in (image(2, 4, 11, 13), image(2, 8, 11, 13, dtype=f32), torch.randn(8, 1).to(bf16)):
        with pytest.raises((RuntimeError, ValueError)) as plain:
            block._call_impl(wrong)
        with pytest.raises(type(plain.value)) as mine:
            block(wrong)
        assert str(mine.value) == str(plain.value)
    with pytest.raises(ValueError, match=r"x must have 8 channels, got 4, shape \(1, 4, 11, 13\)"):
        tiled.tiled_norm_act_conv(image(1, 4, 11, 13), block.conv1)


@torch.no_grad()
def test_maps_are_asked_for_in_large_pages(monkeypatch, spy):
    asked = spy(memory, "advise_hugepage")
    room = memory.empty_map(torch.empty(2, 3, 5, 7, dtype=bf16), 4, 6, 8)
    assert [call[0].shape for call in asked] == [(2, 6, 8, 4)]
    assert room.shape == (2, 4, 6, 8) and room.dtype == bf16
    assert room.is_contiguous(memory_format=torch.channels_last)
