"""3x3 convolutions by Winograd's algorithm, by one product, and of doubled maps: torch's results, and only plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from depthdiff import fast
from depthdiff.fast import convolution, winograd
from depthdiff.fast.eligible import fuses_bfloat16
from depthdiff.models.resnet import Upsample2D
from tests.fast.conftest import distance

bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
LARGE, SMALL = ((192, 256), (64, 48)), ((1024, 1088), (8, 12))
"""Channels in and out, height and width: for Winograd's algorithm, and for one product."""


@pytest.fixture
def used(spy):
    """List which fast ways were taken."""
    ways = [spy(winograd, "winograd_conv3x3"), spy(convolution, "im2col_conv3x3"), spy(convolution, "doubled_conv3x3")]
    return lambda: [len(way) for way in ways]


def enabled(module):
    fast.enable(module)
    return module


def tensors(shape, filters, *, bias=True, last=False):
    x, weight = torch.randn(shape, dtype=f64), torch.randn(filters, shape[1], 3, 3, dtype=f64)
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return x, weight, torch.randn(filters, dtype=f64) if bias else None


# The mathematics


def test_one_axis_of_winograd_is_a_correlation():
    """Four results from six numbers and a filter of three, by six products. Observed in float64: 2e-14."""
    d, g = torch.randn(6, 50, dtype=f64), torch.randn(3, 50, dtype=f64)
    transformed, result = torch.empty_like(d), torch.empty(4, 50, dtype=f64)
    winograd.transform_axis(d, transformed)
    winograd.restore_axis(transformed * (torch.tensor(winograd.FILTER, dtype=f64) @ g), result)
    expected = torch.stack([(d[i : i + 3] * g).sum(0) for i in range(4)])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "strip", "products", "filters", "last"),
    [
        ((1, 3, 4, 4), 1, 1, 1, False),
        ((2, 5, 8, 20), 3000, 20_000, 5000, True),
        ((3, 7, 28, 12), 3000, 20_000, 5000, False),
        ((3, 7, 28, 12), 10**9, 10**9, 10**9, True),
    ],
)
def test_winograd_is_the_convolution(shape, strip, products, filters, last, monkeypatch):
    """However it is cut into parts, of maps that are not square. Observed in float64: at most 3e-14."""
    for name, size in (("ROWS_BYTES", strip), ("PRODUCT_BYTES", products), ("FILTER_BYTES", filters)):
        monkeypatch.setattr(winograd, name, size)
    x, weight, bias = tensors(shape, 11, last=last)
    result = winograd.winograd_conv3x3(x, weight, bias)
    torch.testing.assert_close(result, F.conv2d(x, weight, bias, padding=1), rtol=0, atol=1e-11)


def test_winograd_reads_adds_and_writes_over(monkeypatch):
    """What is read may be changed on its way, and written over a row above. Observed in float64: 3e-14."""
    monkeypatch.setattr(winograd, "PRODUCT_BYTES", 20_000)
    room, plus = torch.randn(2, 5, 13, 20, dtype=f64), torch.randn(2, 5, 12, 20, dtype=f64)
    x, (_, weight, bias) = room[:, :, 1:], tensors((2, 5, 12, 20), 5)
    expected = F.conv2d(F.silu(x), weight, bias, padding=1) + plus
    options = {
        "read": lambda picture, first, last: F.silu(x[picture : picture + 1, :, first:last]),
        "add": lambda picture, first, last: plus[picture : picture + 1, :, first:last],
    }
    result = winograd.winograd_conv3x3(x, weight, bias, **options, out=room[:, :, :-1])
    assert result.data_ptr() == room.data_ptr()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("count", "stride", "padding", "bias", "last"),
    [(5, 1, 1, True, False), (3, 2, 1, False, True), (2, 2, 0, True, True), (1, 1, 0, False, False)],
)
def test_one_product_is_the_convolution(count, stride, padding, bias, last, monkeypatch):
    """Some pictures at a time. Observed in float64: 1e-14."""
    monkeypatch.setattr(convolution, "COVERED_BYTES", 2 * 9 * 10 * 6 * 9 * 8)
    x, weight, bias = tensors((count, 10, 6, 9), 14, bias=bias, last=last)
    result = convolution.im2col_conv3x3(x, weight, bias, stride, padding)
    torch.testing.assert_close(result, F.conv2d(x, weight, bias, stride, padding), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "bias", "last"), [((1, 3, 1, 1), True, False), ((2, 10, 5, 8), False, True), ((3, 4, 2, 9), True, True)]
)
def test_doubling_is_repeating_and_convolving(shape, bias, last):
    """Observed in float64: 2e-14."""
    x, weight, bias = tensors(shape, 7, bias=bias, last=last)
    expected = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)
    torch.testing.assert_close(convolution.doubled_conv3x3(x, weight, bias), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "stride", "bias", "last", "bound"),
    [(bf16, 1, True, True, 4e-3), (bf16, 2, False, False, 4e-3), (f32, 2, True, False, 1e-6)],
)
def test_packed_filters_convolve_maps_of_several_sizes(dtype, stride, bias, last, bound):
    """Observed: 2e-3 and 2e-7, as torch's."""
    layout = torch.channels_last if last else torch.contiguous_format
    conv = nn.Conv2d(12, 10, 3, stride, 1, bias=bias).to(dtype).to(memory_format=layout)
    convolve = convolution.packed_conv(conv, (0, 1), (1, 12, 6, 14))
    for shape in ((1, 12, 6, 14), (2, 12, 5, 9)):
        x, bias64 = torch.randn(shape).to(dtype), None if conv.bias is None else conv.bias.double()
        assert distance(convolve(x), F.conv2d(x.double(), conv.weight.double(), bias64, stride, (0, 1))) <= bound


# Where they are used


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "size", "stride", "dtype", "bound", "ways"),
    [
        (*LARGE, 1, f32, 2e-6, [1, 0, 0]),
        (*SMALL, 1, f32, 1e-6, [0, 1, 0]),
        (*SMALL, 2, f32, 1e-6, [0, 1, 0]),
        (*SMALL, 1, bf16, 4e-3, [0, 1, 0]),
        (*LARGE, 2, f32, 1e-6, [0, 0, 0]),
    ],
)
def test_a_layer_takes_the_way_of_its_size(channels, size, stride, dtype, bound, ways, used, monkeypatch):
    """Of the exact result's norm. Observed: 1.3e-6, 3.5e-7 (torch's own: 2.5e-7), and 1.7e-3 (1.7e-3) in bfloat16."""
    monkeypatch.setattr(convolution, "has_tiles", lambda: True)
    conv = enabled(nn.Conv2d(*channels, 3, stride, 1).to(dtype))
    x = torch.randn(2, channels[0], *size).to(dtype)
    mine = conv(input=x)
    assert used() == ways
    assert distance(mine, F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), stride, 1)) <= bound
    torch.testing.assert_close(conv(x[1:]), mine[1:], rtol=bound, atol=bound)  # a picture alone takes the same way
    assert used() == [2 * count for count in ways]


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "dtype", "bound"),
    [(None, f32, 1e-6), ((48, 64), bf16, 4e-3), ((47, 64), f32, 1e-6), ((24, 32), f32, 1e-6)],
)
def test_a_map_is_doubled_and_convolved_at_once(size, dtype, bound, used, monkeypatch):
    """Not where it is brought to another size. Observed: 3e-7, 2.4e-3 where oneDNN has bfloat16; else 7e-7, 1.7e-3."""
    monkeypatch.setattr(convolution, "FEWEST_DOUBLED", 24 * 32)
    layer = enabled(Upsample2D(160, use_conv=True, out_channels=96).to(dtype))
    x = torch.randn(2, 160, 24, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    mine = layer(x, size)
    assert used()[2] == (size in (None, (48, 64)) and (dtype == f32 or fuses_bfloat16()))
    repeated = F.interpolate(x.double(), size=size or (48, 64), mode="nearest")
    assert distance(mine, F.conv2d(repeated, *(w.double() for w in layer.conv.parameters()), padding=1)) <= bound


def other_way(conv):
    conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def other_forward(conv):
    forward = conv.forward
    conv.forward = lambda x: 2 * forward(x)


def circular(conv):
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


CHANGES = {
    "circular padding": circular,
    "dilation": lambda conv: setattr(conv, "dilation", (2, 2)),
    "two strides": lambda conv: setattr(conv, "stride", (1, 2)),
    "1x1 filters": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight[..., :1, :1].clone())),
    "another _conv_forward": other_way,
    "another forward": other_forward,
    "a hook": lambda conv: conv.register_forward_hook(lambda *_: None),
    "a backward hook": lambda conv: conv.register_full_backward_hook(lambda *_: None),
    "a parametrization": lambda conv: nn.utils.parametrize.register_parametrization(conv, "weight", nn.Tanh()),
    "float64": lambda conv: conv.double(),
    "module.compile()": lambda conv: conv.compile(backend="eager"),
}


@torch.no_grad()
def test_a_layer_that_was_changed_is_called_as_it_is(used, monkeypatch):
    """By itself, and by the layer that doubles a map."""
    monkeypatch.setattr(convolution, "FEWEST_DOUBLED", 1)
    for change, apply in CHANGES.items():
        for (channels, filters), size in (LARGE, SMALL):
            conv = enabled(nn.Conv2d(channels, filters, 3, padding=1))
            apply(conv)
            x = torch.randn(1, channels, *size, dtype=conv.weight.dtype)
            assert torch.equal(conv(x), conv._call_impl(x)), change
        step = enabled(Upsample2D(8, use_conv=True))
        apply(step.conv)
        x = torch.randn(1, 8, 6, 10, dtype=step.conv.weight.dtype)
        assert torch.equal(step(x), step.conv(F.interpolate(x, scale_factor=2))), change
        assert used() == [0, 0, 0], change


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", [LARGE, SMALL], ids=["large", "small"])
def test_only_plain_computing(kind, used):
    """What records, traces, watches or transforms the work gets torch's own convolution. Observed: at most 4e-6."""
    (channels, filters), size = kind
    conv, x = enabled(nn.Conv2d(channels, filters, 3, padding=1)), torch.randn(1, channels, *size)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1).detach()

    def check(result):
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
        assert used() == [0, 0, 0]

    for trained in (conv.weight, conv.bias):
        conv.requires_grad_(False)
        trained.requires_grad_(True)
        recorded = conv(x)
        assert recorded.requires_grad
        check(recorded.detach())
    with torch.no_grad():
        with torch.autocast("cpu", bf16):
            assert conv(x).dtype == bf16
        check(torch.vmap(conv)(x[None])[0])
        check(torch.func.jvp(conv, (x,), (x,))[0])
        with forward_ad.dual_level():
            check(forward_ad.unpack_dual(conv(forward_ad.make_dual(x, x))).primal)
        with FlopCounterMode(display=False):
            check(conv(x))
        check(torch.jit.trace(conv, x, check_trace=False)(x))
        if kind is SMALL:
            graph = str(torch.export.export(conv, (x,)).graph)
            assert "conv2d" in graph and "linear" not in graph
        with torch.device("meta"):  # another default device changes nothing
            torch.testing.assert_close(conv(x), expected, rtol=0, atol=2e-5)
    with torch.inference_mode():
        conv(x)
    assert sum(used()) == 2


@torch.no_grad()
def test_products_of_less_precision_stand_for_no_convolution(used, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    for (channels, filters), size in (LARGE, SMALL):
        enabled(nn.Conv2d(channels, filters, 3, padding=1))(torch.randn(1, channels, *size))
    assert used() == [0, 0, 0]


@torch.no_grad()
def test_errors_are_those_of_the_layer():
    conv = enabled(nn.Conv2d(*LARGE[0], 3, padding=1))
    for wrong in (torch.randn(1, 188, 64, 48), torch.randn(1, 192, 64, 48, dtype=f64), torch.randn(48)):
        with pytest.raises(RuntimeError) as plain:
            conv._call_impl(wrong)
        with pytest.raises(RuntimeError, match=str(plain.value).split(",")[0].replace("[", r"\[").split("(")[0]):
            conv(wrong)
    with pytest.raises(TypeError, match="forward"):
        conv()
