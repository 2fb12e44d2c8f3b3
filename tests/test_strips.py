"""Large maps are normed, activated and convolved in strips of rows: the same numbers, and only in plain computing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from depthdiff.models.convolution import Conv3x3
from depthdiff.models.strips import Moments, striped_conv3x3, strips_are_faster
from torch import nn

from depthdiff import AutoencoderKL
from depthdiff.models import layers, pages, strips, winograd

bf16, f32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make the test's maps large ones, and strips of two of their rows."""
    monkeypatch.setattr(strips, "LARGE_BYTES", 1)
    monkeypatch.setattr(strips, "STRIP_BYTES", 2 * 8 * 13 * 2)


def relative(mine, expected):
    return ((mine.double() - expected.double()).norm() / expected.double().norm()).item()


def image(*shape, dtype=bf16):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def group_norm(groups, channels):
    norm = nn.GroupNorm(groups, channels, eps=1e-3)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm.to(bf16)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 11, 100])
@pytest.mark.parametrize("act", [None, nn.SiLU(), nn.GELU()])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("added", [None, nn.Identity(), nn.Conv2d(5, 6, 1).to(bf16)])
def test_strips_equal_the_whole(rows, act, normed, added, monkeypatch):
    """11 rows, which most strips do not go into; against float64 with weights rounded alike. Observed: at most 4e-3."""
    monkeypatch.setattr(strips, "STRIP_BYTES", rows * 8 * 13 * 2)
    x, plus = image(2, 8, 11, 13) + 3, image(2, 5 if isinstance(added, nn.Conv2d) else 6, 11, 13)
    conv, norm = Conv3x3(8, 6).to(bf16), group_norm(2, 8) if normed else None
    calls, packed_conv = [], strips.packed_conv

    def watched(*how):
        convolve = packed_conv(*how)
        return lambda part: calls.append(part.shape) or convolve(part)

    monkeypatch.setattr(strips, "packed_conv", watched)
    extra = {} if added is None else {"plus": plus, "shortcut": added}
    mine = striped_conv3x3(x, conv, norm=norm, act=act, **extra)
    assert len(calls) == 2 * -(-11 // rows)
    wide = x.double()
    if norm is not None:
        wide = F.group_norm(wide, 2, norm.weight.double(), norm.bias.double(), 1e-3)
    expected = F.conv2d(wide if act is None else act(wide), conv.weight.double(), conv.bias.double(), padding=1)
    if added is not None:
        expected = expected + copy.deepcopy(added).double()(plus.double())
    assert mine.is_contiguous(memory_format=torch.channels_last)
    assert relative(mine, expected) <= 6e-3
    alone = striped_conv3x3(x[1:], conv, norm=norm, act=act, **{**extra, **({"plus": plus[1:]} if added else {})})
    assert torch.equal(mine[1:], alone), "a picture must not depend on its company"


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("size", [(12, 16), (12, 14), (11, 13), (12, 13), (2, 2), (3, 5)])
@pytest.mark.parametrize(("dtype", "bound"), [(bf16, 6e-3), (f32, 1e-6)])
def test_halving_in_strips(dtype, bound, rows, size, monkeypatch):
    """With a row and a column of zeros below and to the right. Observed: 2e-3 and 2e-7, as without strips."""
    monkeypatch.setattr(strips, "STRIP_BYTES", rows * 2 * 8 * size[1] * dtype.itemsize)
    for name in ("FEWEST_TILES", "FEWEST_CHANNELS", "FEWEST_PRODUCTS"):
        monkeypatch.setattr(winograd, name, 1)
    block, x = layers.Downsample2D(8, padding=0).to(dtype), image(2, 8, *size, dtype=dtype)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)).double(), block.conv.weight.double(), block.conv.bias.double(), 2)
    seen = []
    monkeypatch.setattr(layers, "striped_conv3x3", lambda *a: seen.append(1) or striped_conv3x3(*a))
    mine = block(x)
    assert seen and mine.shape == expected.shape and relative(mine, expected) <= bound
    other = layers.Downsample2D(8, padding=1).to(dtype)
    assert relative(other(x), F.conv2d(x.double(), *(w.double() for w in other.conv.parameters()), 2, 1)) <= bound


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 4, 100])
@pytest.mark.parametrize(("channels", "filters"), [(8, 8), (8, 6), (6, 8)])
@pytest.mark.parametrize(
    ("size", "dtype", "bound"), [((11, 13), bf16, 6e-3), ((11, 13), f32, 6e-7), ((12, 16), f32, 1e-6)]
)
def test_a_block_in_strips(size, dtype, bound, rows, channels, filters, monkeypatch):
    """The second half writes over what it reads. In bfloat16, in float32, and there by Winograd's algorithm.

    Against float64 with weights rounded alike. Observed: 3e-3, 2e-7, 2e-7.
    """
    monkeypatch.setattr(strips, "STRIP_BYTES", rows * 8 * size[1] * dtype.itemsize)
    for name in ("FEWEST_TILES", "FEWEST_CHANNELS", "FEWEST_PRODUCTS"):
        monkeypatch.setattr(winograd, name, 1)
    monkeypatch.setattr(winograd, "PRODUCT_BYTES", 36 * 4 * size[1] // 4 * 16 * rows)
    block = layers.ResnetBlock2D(channels, filters, None, groups=2, eps=1e-3, act_fn="silu").to(dtype)
    for weight in block.parameters():
        weight.uniform_(-0.5, 0.5)
    x = image(2, channels, *size, dtype=dtype)
    before, made, by_tiles = x.clone(), [], []
    monkeypatch.setattr(layers, "ask_for_large_pages", lambda room: made.append(room.shape) or room)
    monkeypatch.setattr(
        winograd,
        "winograd_conv3x3",
        lambda *a, way=winograd.winograd_conv3x3, **k: by_tiles.append(1) or way(*a, **k),
    )
    mine = block(x)
    assert len(by_tiles) == (2 if size == (12, 16) else 0)
    assert made == [(2 * size[0] + 1, size[1], filters)], "one map for both"
    assert mine.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    expected = copy.deepcopy(block).double()(x.double())
    assert relative(mine, expected) <= bound
    assert torch.equal(block(x[1:]), mine[1:])
    for other in (x.contiguous(), x.flip(3).flip(3), x[:1].expand(2, -1, -1, -1)):
        assert relative(block(other), block(other.clone().contiguous(memory_format=torch.channels_last))) <= bound
    assert block(x[:0]).shape == (0, filters, *size)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [bf16, f32])
def test_statistics_that_are_known_are_taken(dtype, monkeypatch):
    """Each picture's own, and for all strips; here those of other pictures. Observed: 3e-3 and 2e-7."""
    x, other = (
        image(2, 8, 11, 13, dtype=dtype),
        image(2, 8, 5, 7, dtype=dtype) * 3 + torch.tensor([1, -2])[:, None, None, None],
    )
    conv, norm = Conv3x3(8, 6).to(dtype), group_norm(2, 8).to(dtype)
    made, packed_conv = [], strips.packed_conv
    monkeypatch.setattr(strips, "packed_conv", lambda *how: made.append(1) or packed_conv(*how))
    mine = striped_conv3x3(x, conv, norm=norm, known=[Moments().take_in(one) for one in other.to(dtype).split(1)])
    assert made == [1], "filters are rearranged once"
    groups = other.to(dtype).double().reshape(2, 2, -1)
    mean, variance = (
        one.repeat_interleave(4, 1)[..., None, None] for one in (groups.mean(2), groups.var(2, correction=0))
    )
    normed = (x.double() - mean) / (variance + norm.eps).sqrt()
    normed = normed * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    assert relative(mine, F.conv2d(normed, conv.weight.double(), conv.bias.double(), padding=1)) <= (
        6e-3 if dtype == bf16 else 6e-7
    )


@torch.no_grad()
def test_statistics_are_those_of_groups(monkeypatch):
    """Of means far from zero, against float64.

    Observed: 3e-8 of the deviation, 4e-8 of the variance; over 300 seeds at most 1.7e-7 and 2.4e-7.
    """
    x = image(1, 12, 40, 50) * torch.arange(1, 13)[:, None, None] + 20 * torch.randn(12, 1, 1)
    x = x.to(bf16)
    monkeypatch.setattr(strips, "STRIP_BYTES", 7 * 12 * 50 * 2)  # 40 rows in six parts, the last of five
    mean, variance = Moments().take_in(x).of_groups(4)
    groups = x.double().reshape(4, -1)
    assert mean.dtype == variance.dtype == torch.float32
    expected = groups.mean(1).repeat_interleave(3), groups.var(1, correction=0).repeat_interleave(3)
    assert ((mean - expected[0]) / expected[1].sqrt()).abs().max() <= 3e-7
    assert (variance / expected[1] - 1).abs().max() <= 4e-7
    some = Moments()
    for part in x.split([1, 30, 9], 2):
        some.take_in(part)
    for mine, other in zip(some.of_groups(4), (mean, variance), strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=0), "however it is parted"


@torch.no_grad()
def test_a_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match=r"x must have 8 channels, got 4, shape \(1, 4, 11, 13\)"):
        striped_conv3x3(image(1, 4, 11, 13), Conv3x3(8, 6).to(bf16))


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


class WrappedNorm(nn.GroupNorm):
    """The same for a norm."""


def without_offset():
    norm = group_norm(2, 8)
    norm.bias = None
    return norm


def other_way():
    conv = layer()
    conv._conv_forward = lambda *_: None
    return conv


NOT = {
    "another stride": {"conv": layer(stride=2)},
    "halving": {"conv": layer(stride=2, padding=0)},
    "no border": {"conv": layer(padding=0)},
    "other size": {"conv": nn.Conv2d(8, 6, 5, padding=2).to(bf16)},
    "one pixel": {"conv": nn.Conv2d(8, 6, 1).to(bf16)},
    "another kind": {"conv": Wrapped(8, 6).to(bf16)},
    "no convolution": {"conv": nn.Sequential(layer())},
    "wide weights": {"conv": Conv3x3(8, 6)},
    "hooked": {"conv": hooked(layer())},
    "another forward": {"conv": other_forward()},
    "another way": {"conv": other_way()},
    "circular": {"conv": nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular").to(bf16)},
    "groups": {"conv": nn.Conv2d(8, 6, 3, padding=1, groups=2).to(bf16)},
    "dilated": {"conv": nn.Conv2d(8, 6, 3, padding=1, dilation=2).to(bf16)},
    "many channels": {"conv": nn.Conv2d(8, 2**14 + 1, 3, padding=1).to(bf16)},
    "an activation that is not element by element": {"act": nn.Softmax(1)},
    "a norm as activation": {"act": group_norm(2, 8)},
    "hooked activation": {"act": hooked(nn.SiLU())},
    "activation in place": {"act": nn.SiLU(inplace=True)},
    "another norm": {"norm": nn.BatchNorm2d(8).to(bf16)},
    "another kind of norm": {"norm": WrappedNorm(2, 8).to(bf16)},
    "no norm": {"norm": nn.Identity()},
    "norm without weights": {"norm": nn.GroupNorm(2, 8, affine=False)},
    "norm without offset": {"norm": without_offset()},
    "norm in float32": {"norm": nn.GroupNorm(2, 8)},
    "hooked norm": {"norm": hooked(group_norm(2, 8))},
    "a short cut that looks around": {"shortcut": layer()},
    "hooked short cut": {"shortcut": hooked(nn.Identity())},
    "wide pixels": {"x": torch.randn(2, 8, 11, 13)},
    "float64": {"x": torch.randn(2, 8, 11, 13).double(), "conv": layer().double(), "norm": group_norm(2, 8).double()},
    "float16": {"x": torch.randn(2, 8, 11, 13).half(), "conv": layer().half(), "norm": group_norm(2, 8).half()},
    "not a map": {"x": torch.randn(8, 11, 13).to(bf16)},
    "no picture": {"x": torch.randn(0, 8, 11, 13).to(bf16)},
    "one row": {"x": torch.randn(2, 8, 1, 13).to(bf16)},
    "without data": {"x": torch.empty(2, 8, 11, 13, dtype=bf16, device="meta")},
}


@torch.no_grad()
@pytest.mark.parametrize("why", NOT)
def test_strips_are_not_used_otherwise(why):
    usual = {"x": torch.randn(2, 8, 11, 13).to(bf16), "conv": layer(), "norm": group_norm(2, 8), "act": nn.SiLU()}
    usual["shortcut"] = nn.Identity()
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
        assert strips_are_faster(x, nn.Conv2d(8, 9, 3, padding=1).to(bf16)), "the larger of both maps counts"


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
    """Every 3x3 convolution after a norm, and the one that halves. Observed: at most 5e-3."""
    config = {"block_out_channels": [8, 16], "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 2}
    net = AutoencoderKL.from_config({**config, "up_block_types": ["UpDecoderBlock2D"] * 2}).to(bf16)
    for weight in net.parameters():
        weight.uniform_(-0.2, 0.2)
    x, z = (torch.randn(2, *shape).to(bf16) for shape in ((3, 24, 40), (4, 12, 20)))
    wide, shapes = copy.deepcopy(net).float(), []
    every = [module for module in net.modules() if isinstance(module, layers.ResnetBlock2D)]
    firsts, seconds = ({getattr(one, n): one.norm2.weight.shape for one in every} for n in ("conv1", "conv2"))

    def watched(x, conv, **how):
        normed, added = how.get("norm") is not None and how.get("act") is not None, how.get("plus") is not None
        shapes.append((normed, added))
        result = striped_conv3x3(x, conv, **how)
        for name, convs in (("found", firsts), ("known", seconds)):
            moments = how.get(name, ())
            assert [one.parts[0][1].shape for one in moments] == ([convs[conv]] * 2 if conv in convs else [])
        return result

    monkeypatch.setattr(layers, "striped_conv3x3", watched)
    mine = net.encode(x).latent_dist.mode(), net.decode(z).sample
    assert shapes.count((True, True)) == len(every), "the second of a block, with the short cut"
    assert shapes.count((True, False)) == len(every) + 2, "the first of a block, and the last of encoder and decoder"
    assert shapes.count((False, False)) == 2, "the encoder's first, and its one step down"
    monkeypatch.setattr(strips, "LARGE_BYTES", 2**60)
    plain = net.encode(x).latent_dist.mode(), net.decode(z).sample
    exact = wide.encode(x.float()).latent_dist.mode(), wide.decode(z.float()).sample
    for striped, whole, true in zip(mine, plain, exact, strict=True):
        assert relative(striped, whole) <= 1e-2
        assert relative(striped, true) <= 2e-2


@torch.no_grad()
def test_what_a_hook_keeps_is_not_written_over(monkeypatch):
    """A hook on a layer of a block has the block computed layer by layer."""
    block = layers.ResnetBlock2D(8, 8, None, groups=2, eps=1e-3, act_fn="silu").to(bf16)
    x, kept = image(1, 8, 11, 13), []
    block.conv1.register_forward_hook(lambda conv, inputs, result: kept.append((inputs[0], result)))
    block(x)
    assert torch.equal(kept[0][1], block.conv1.forward(kept[0][0]))


@torch.no_grad()
def test_a_layer_of_an_adapter_is_called(monkeypatch):
    """Whatever stands in the place of a convolution, as an adapter's module does; at any size."""

    class Wrap(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return 2 * self.layer(x)

    x = image(1, 8, 12, 14)
    for block, name in ((layers.Downsample2D(8, 0), "conv"), (layers.Downsample2D(8, 1), "conv")):
        block.to(bf16)
        whole = block(x)
        setattr(block, name, Wrap(getattr(block, name)))
        assert relative(block(x), 2 * whole) <= 1e-2  # observed: 2e-3
    block = layers.ResnetBlock2D(8, 8, None, groups=2, eps=1e-3, act_fn="silu").to(bf16)
    whole = block(x)
    block.conv2 = Wrap(block.conv2)
    assert relative(block(x), 2 * whole - x) <= 1e-2  # observed: 3e-3
    step = layers.Upsample2D(8).to(bf16)
    whole = step(x)
    step.conv = Wrap(step.conv)
    assert torch.equal(step(x), 2 * whole)


def test_maps_are_asked_for_in_large_pages(monkeypatch):
    asked = []
    monkeypatch.setattr(pages, "ask_for_large_pages", lambda room: asked.append(room.shape) or room)
    room = pages.empty_map(torch.empty(2, 3, 5, 7, dtype=bf16), 4, 6, 8)
    assert asked == [(2, 6, 8, 4)]
    assert room.shape == (2, 4, 6, 8) and room.dtype == bf16
    assert room.is_contiguous(memory_format=torch.channels_last)
