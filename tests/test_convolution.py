"""3x3 convolutions on shorter ways: the mathematics, the cutting into parts, and where they are used."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from depthdiff.models.convolution import (
    Conv3x3,
    doubled_conv3x3,
    doubling_is_faster,
    im2col_conv3x3,
    packed_conv,
    product_is_faster,
)
from depthdiff.models.layers import FeedForward, fused_gate
from depthdiff.models.plain import fuses_bfloat16, fuses_linear, only_computes
from depthdiff.models.winograd import (
    FILTER,
    grouped_strips,
    is_faster,
    restore_axis,
    split,
    transform_axis,
    winograd_conv3x3,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from depthdiff import AutoencoderKL, UNet2DConditionModel
from depthdiff.models import convolution, layers, winograd


@pytest.fixture
def budgets(monkeypatch):
    """Set how much is transformed, multiplied and held at once."""

    def set_budgets(strip: int, products: int, filters: int) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(winograd, "STRIP_BYTES", strip)
        monkeypatch.setattr(winograd, "PRODUCT_BYTES", products)
        monkeypatch.setattr(winograd, "FILTER_BYTES", filters)

    return set_budgets


@pytest.fixture
def seen(monkeypatch):
    """List the shapes of the maps that take the short way."""
    shapes = []

    def watched(x, weight, bias, **others):
        shapes.append(tuple(x.shape))
        return winograd_conv3x3(x, weight, bias, **others)

    monkeypatch.setattr(winograd, "winograd_conv3x3", watched)
    return shapes


@pytest.fixture
def products(monkeypatch):
    """List the shapes of the maps that are convolved by one product."""
    shapes = []

    def watched(x, *others):
        shapes.append(tuple(x.shape))
        return im2col_conv3x3(x, *others)

    monkeypatch.setattr(convolution, "im2col_conv3x3", watched)
    return shapes


def test_one_axis_is_a_correlation():
    """Four results from six numbers and a filter of three, by six products. Observed in float64: 2e-14."""
    d, g = torch.randn(6, 50, dtype=torch.float64), torch.randn(3, 50, dtype=torch.float64)
    transformed, result = torch.empty_like(d), torch.empty(4, 50, dtype=torch.float64)
    transform_axis(d, transformed)
    restore_axis(transformed * (torch.tensor(FILTER, dtype=torch.float64) @ g), result)
    expected = torch.stack([(d[i : i + 3] * g).sum(0) for i in range(4)])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", [(1, 1, 1), (3000, 20_000, 5000), (3000, 10**9, 5000), (10**9, 10**9, 10**9)])
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 5, 8, 20), (3, 7, 28, 12)])
def test_equals_the_convolution(shape, parts, bias, last, budgets):
    """Whatever the parts, of maps that are not square. Observed in float64: at most 3e-14."""
    budgets(*parts)
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(11, shape[1], 3, 3, dtype=torch.float64)
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    offset = torch.randn(11, dtype=torch.float64) if bias else None
    result = winograd_conv3x3(x, weight, offset)
    torch.testing.assert_close(result, F.conv2d(x, weight, offset, padding=1), rtol=0, atol=1e-11)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("parts", [(1, 1, 1), (3000, 20_000, 5000), (10**9, 10**9, 10**9)])
def test_reading_adding_and_writing_over(parts, budgets):
    """What is read may be changed on its way, and written over a row above. Observed in float64: at most 3e-14."""
    budgets(*parts)
    room, plus = torch.randn(2, 5, 13, 20, dtype=torch.float64), torch.randn(2, 5, 12, 20, dtype=torch.float64)
    weight, bias = torch.randn(5, 5, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    x, asked = room[:, :, 1:], []
    expected = F.conv2d(F.silu(x), weight, bias, padding=1) + plus

    def read(picture, first, last):
        asked.append((picture, first, last))
        return F.silu(x[picture : picture + 1, :, first:last])

    result = winograd_conv3x3(
        x, weight, bias, read=read, add=lambda b, first, last: plus[b : b + 1, :, first:last], out=room[:, :, :-1]
    )
    assert result.data_ptr() == room.data_ptr()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)
    assert asked == sorted(asked), "from the first row to the last"
    assert {row for _, first, last in asked for row in range(first, last)} == set(range(12))


def test_parts_cover_everything_once():
    for count, most in ((1, 0), (10, 3), (11, 4), (12, 100)):
        size = split(count, most)
        assert 1 <= size <= max(1, most) and -(-count // size) == -(-count // max(1, most))
    for rows, most, together in ((1, 1, 1), (7, 3, 1), (7, 3, 9), (16, 5, 100), (4, 100, 4)):
        groups = grouped_strips(2, rows, most, together)
        covered = [
            (strip.picture, row) for group in groups for strip in group for row in range(strip.start, strip.stop)
        ]
        assert covered == [(picture, row) for picture in range(2) for row in range(rows)]
        for group in groups:
            assert group[-1].place.stop <= max(together, most)
            places = [place for strip in group for place in range(strip.place.start, strip.place.stop)]
            assert places == list(range(len(places))) and all(strip.stop - strip.start <= most for strip in group)


def test_no_more_tiles_at_once_than_allowed(budgets, monkeypatch):
    """However large a strip may be: so many rows of tiles as the budget of products holds."""
    x, weight, sizes, bmm = torch.randn(2, 8, 32, 20), torch.randn(11, 8, 3, 3), [], torch.bmm
    budgets(10**9, 2 * 36 * 4 * 5 * (8 + 11), 10**9)
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(a.shape[1]) or bmm(a, b))
    winograd_conv3x3(x, weight, None)
    assert sizes == [2 * 5] * 8


@torch.no_grad()
def test_float32_is_accurate():
    """The norm of the error beside that of the result. Observed: 1.2e-6, torch's own 2e-7, points 1 and 2 2.6e-6."""
    x, weight = torch.randn(2, 320, 24, 32), torch.randn(160, 320, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert (winograd_conv3x3(x, weight, None) - exact).norm() < 2e-6 * exact.norm()


@torch.no_grad()
def test_another_default_device_is_ignored():
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(5, 3, 3, 3)
    expected = F.conv2d(x, weight, padding=1)
    with torch.device("meta"):
        result = winograd_conv3x3(x, weight, None)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)  # observed: 4e-6


def maps(channels: int, height: int, width: int, filters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a map and filters whose numbers do not matter."""
    return torch.zeros(1, channels, height, width), torch.zeros(filters, channels, 3, 3)


REFUSED = {
    "a height of no whole tiles": (192, 66, 48, 256),
    "a width of no whole tiles": (192, 64, 50, 256),
    "few channels": (124, 64, 96, 256),
    "few filters": (256, 64, 96, 124),
    "few tiles": (1024, 12, 20, 1024),
    "few products": (128, 64, 64, 128),
}


def test_only_large_float32_maps():
    """Each of the others fails one condition alone; the batch does not count."""
    x, weight = maps(192, 64, 48, 256)
    assert is_faster(x, weight) and is_faster(x.repeat(2, 1, 1, 1), weight) and is_faster(x[:0], weight)
    for what, shape in REFUSED.items():
        assert not is_faster(*maps(*shape)), what
    for x_dtype, dtype in ((torch.bfloat16,) * 2, (torch.float64,) * 2, (torch.float32, torch.bfloat16)):
        assert not is_faster(x.to(x_dtype), weight.to(dtype))
    assert not is_faster(x[0], weight)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("channels", "filters", "height", "width"), [(192, 256, 64, 48), (1024, 1088, 8, 12)])
def test_only_plain_computing(channels, filters, height, width, seen, products):
    """What records, traces or transforms the work gets torch's own convolution, and the same numbers."""
    layer, x = Conv3x3(channels, filters), torch.randn(1, channels, height, width)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1).detach()

    def check(result: torch.Tensor, atol: float = 1e-5) -> None:
        torch.testing.assert_close(result.float(), expected, rtol=0, atol=atol)
        assert not seen and not products

    recorded = layer(x)
    check(recorded.detach())
    assert recorded.requires_grad
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            result = layer(x)
        assert result.dtype == torch.bfloat16
        check(result, atol=0.02)  # observed: 0.006
        check(torch.vmap(layer)(x[None])[0])
        result, tangent = torch.func.jvp(layer, (x,), (x,))
        check(result)
        check(tangent + layer.bias[:, None, None])
        with forward_ad.dual_level():
            check(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).primal)
        traced = torch.jit.trace(layer, x, check_trace=False)
        check(traced(x.repeat(2, 1, 1, 1))[1:])
        program = torch.export.export(layer, (x,))
        assert "conv2d" in str(program.graph) and "bmm" not in str(program.graph) and "linear" not in str(program.graph)
        check(program.module()(x))
        assert not only_computes(x.to("meta")) and not only_computes(x.to_mkldnn())
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-5)  # observed: 4e-6
    assert seen + products == [(1, channels, height, width)]
    layer.requires_grad_(False)
    layer(x)
    with torch.inference_mode():
        layer(x)
    assert len(seen + products) == 3


UNET = {
    "sample_size": 32,
    "in_channels": 5,
    "block_out_channels": [128, 192],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": [128, 160],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}


@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_networks_agree_with_torch_convolutions(last, seen, monkeypatch):
    """Relative to the norm. Observed: 2e-6 for the UNet, 4e-6 for the autoencoder."""
    unet, vae = UNet2DConditionModel.from_config(UNET).eval(), AutoencoderKL.from_config(VAE).eval()
    x, context, pixels = torch.randn(2, 5, 32, 48), torch.randn(2, 7, 16), torch.rand(1, 3, 64, 96) * 2 - 1

    def results() -> list[torch.Tensor]:
        latents = vae.encode(pixels).latent_dist.mean
        return [unet(x, 500, context).sample, latents, vae.decode(latents).sample]

    monkeypatch.setattr(winograd, "FEWEST_PRODUCTS", 1)
    with monkeypatch.context() as direct:
        direct.setattr(winograd, "is_faster", lambda x, weight: False)
        expected = results()
    assert not seen
    if last:
        unet.use_fast_layout(), vae.use_fast_layout()
    for result, wanted in zip(results(), expected, strict=True):
        assert (result - wanted).norm() < 2e-5 * wanted.norm()
    assert len(seen) > 20 and {shape[0] for shape in seen} == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout(dtype):
    """In half precision all convolutions; in float32 on a processor the first ones, and results follow them."""
    vae = AutoencoderKL.from_config(VAE).to(dtype).eval()
    before = {name: weight.data_ptr() for name, weight in vae.named_parameters()}
    vae.use_fast_layout()
    convolutions = {name: layer for name, layer in vae.named_modules() if isinstance(layer, nn.Conv2d)}
    last = {
        name for name, layer in convolutions.items() if layer.weight.is_contiguous(memory_format=torch.channels_last)
    }
    single = {name for name, layer in convolutions.items() if layer.kernel_size == (1, 1)}  # where both are the same
    first = {"encoder.conv_in", "decoder.conv_in"}
    assert last == (set(convolutions) if dtype == torch.bfloat16 else first | single)
    moved = {name for name, weight in vae.named_parameters() if weight.data_ptr() != before[name]}
    if dtype == torch.float32:
        assert moved == {f"{name}.weight" for name in first}
    with torch.no_grad():
        latents = vae.encode(torch.rand(1, 3, 32, 48, dtype=dtype)).latent_dist.mean
        x = vae.decoder.mid_block(vae.decoder.conv_in(latents))
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def test_layout_chosen_in_inference_mode_can_be_trained():
    vae = AutoencoderKL.from_config(VAE)
    with torch.inference_mode():
        vae.use_fast_layout()
        vae.encode(torch.rand(1, 3, 32, 48))
    vae.encode(torch.rand(1, 3, 32, 48)).latent_dist.mean.sum().backward()
    assert vae.encoder.conv_in.weight.grad is not None


def test_layout_of_another_device():
    """Weights that only wait on the processor for a GPU keep their layout in float32, or get it back."""
    vae = AutoencoderKL.from_config(VAE)
    plain = {name: weight.stride() for name, weight in vae.named_parameters()}
    vae.use_fast_layout(torch.device("cuda"))
    assert plain == {name: weight.stride() for name, weight in vae.named_parameters()}
    vae.use_fast_layout()
    assert not vae.encoder.conv_in.weight.is_contiguous()
    vae.use_fast_layout(torch.device("cuda"))
    assert plain == {name: weight.stride() for name, weight in vae.named_parameters()}
    vae.to(memory_format=torch.channels_last)
    vae.use_fast_layout(torch.device("cuda"))
    assert not vae.encoder.conv_in.weight.is_contiguous(), "a layout that the user chose for all stays"


@torch.no_grad()
def test_feed_forward_in_parts(monkeypatch):
    """Tokens are widened some at a time. Observed in float64: 2e-16."""
    feed, x = FeedForward(8).double(), torch.randn(3, 7, 8, dtype=torch.float64)
    whole, sizes = feed(x), []
    feed.proj_in.register_forward_pre_hook(lambda layer, inputs: sizes.append(inputs[0].shape[0]))
    monkeypatch.setattr(layers, "TOKENS_AT_ONCE", 10)
    torch.testing.assert_close(feed(x), whole, rtol=0, atol=1e-14)
    assert sizes == [10, 10, 1]
    with torch.enable_grad():
        assert feed(x).requires_grad
    torch.vmap(feed)(x)
    assert sizes[3:] == [3, 7]  # whole: the batch, and the tokens of each of it


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0)])
def test_one_product_is_a_convolution(stride, padding, biased, last):
    """Of filters in torch's order and with the channels last. Observed in float64: 1e-14."""
    x, weight = torch.randn(3, 10, 6, 9, dtype=torch.float64), torch.randn(14, 10, 3, 3, dtype=torch.float64)
    bias = torch.randn(14, dtype=torch.float64) if biased else None
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    expected = F.conv2d(x, weight, bias, stride, padding)
    result = im2col_conv3x3(x, weight, bias, stride, padding)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_only_small_maps_of_many_channels(monkeypatch):
    """Each of the others fails one condition alone; the batch does not count."""
    x, weight = maps(1024, 16, 16, 1024)
    assert product_is_faster(x, weight) and product_is_faster(x.repeat(2, 1, 1, 1), weight)
    for (height, width), padding, fits in (((32, 32), 1, True), ((33, 31), 1, False), ((33, 33), 0, True)):
        assert product_is_faster(torch.zeros(1, 1024, height, width), weight, 2, padding) is fits
    refused = {"a large map": (x.repeat(1, 1, 1, 2), weight), "few weights": maps(1024, 16, 16, 1023)}
    refused |= {"no batch": (x[0], weight), "nothing": (x[:, :, :0], weight), "two dtypes": (x, weight.bfloat16())}
    refused |= {"float64": (x.double(), weight.double()), "float16": (x.half(), weight.half())}
    for what, pair in refused.items():
        assert not product_is_faster(*pair), what
    for tiles in (True, False):
        monkeypatch.setattr(convolution, "has_tiles", lambda tiles=tiles: tiles)
        assert product_is_faster(x.bfloat16(), weight.bfloat16()) is tiles
        assert product_is_faster(x, weight)
    assert not product_is_faster(x, nn.Parameter(weight))
    with torch.no_grad():
        assert product_is_faster(x, nn.Parameter(weight))


def test_products_that_may_be_of_less_precision_stand_for_no_convolution(monkeypatch):
    large, small = maps(192, 64, 48, 256), maps(1024, 16, 16, 1024)
    for precision, exact in (("highest", True), ("high", True), ("medium", False)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert is_faster(*large) is exact and product_is_faster(*small) is exact


@torch.no_grad()
def test_layers_that_were_changed_convolve_as_they_say(products, seen):
    """Seamless tiles are made by setting the padding of every convolution; the short ways know zeros alone."""
    for layer, size in ((Conv3x3(1024, 1024), 8), (Conv3x3(1024, 1024, stride=2), 8), (Conv3x3(192, 256), 64)):
        layer.padding_mode, layer._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
        x = torch.randn(1, layer.in_channels, size, size)
        expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), layer.weight, layer.bias, layer.stride)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    assert not products and not seen


@torch.no_grad()
def test_one_product_covers_some_pictures_at_a_time(monkeypatch):
    """Of any number, none included. Observed in float64: 0."""
    weight, sizes = torch.randn(14, 10, 3, 3, dtype=torch.float64), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *others: sizes.append(len(x)) or linear(x, *others))
    monkeypatch.setattr(convolution, "COVERED_BYTES", 2 * 9 * 10 * 6 * 9 * 8)
    for count, parts in ((5, [2, 2, 1]), (2, [2]), (0, [0])):
        x = torch.randn(count, 10, 6, 9, dtype=torch.float64)
        result = im2col_conv3x3(x, weight, None, 1, 1)
        torch.testing.assert_close(result, F.conv2d(x, weight, padding=1), rtol=0, atol=1e-12)
        assert sizes == parts
        sizes.clear()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@torch.no_grad()
def test_small_maps_go_by_one_product(dtype, bound, products, monkeypatch):
    """Relative to the exact result's norm. Observed: 3.5e-7 (torch's own: 2.5e-7) and 1.7e-3 (1.7e-3)."""
    monkeypatch.setattr(convolution, "has_tiles", lambda: True)
    layer = Conv3x3(1024, 1088).to(dtype)
    down = Conv3x3(1024, 1088, stride=2).to(dtype)
    for convolve, x in ((layer, torch.randn(2, 1024, 6, 10)), (down, torch.randn(2, 1024, 12, 10))):
        x = x.to(dtype)
        stride = convolve.stride[0]
        exact = F.conv2d(x.double(), convolve.weight.double(), convolve.bias.double(), stride, 1)
        assert (convolve(x) - exact).norm() < bound * exact.norm()
    assert products == [(2, 1024, 6, 10), (2, 1024, 12, 10)]
    with torch.enable_grad():
        assert layer(torch.randn(1, 1024, 4, 4, dtype=dtype)).requires_grad
    layer(torch.randn(1, 1024, 20, 20, dtype=dtype))
    assert len(products) == 2


needs_fusing = pytest.mark.skipif(not fuses_bfloat16(), reason="needs a processor on which oneDNN does bfloat16")


@needs_fusing
@torch.no_grad()
def test_the_gate_within_the_products():
    """The fused layer rounds less often than the plain one. Observed: 2.4e-3 and 3.2e-3 of the exact result's norm."""
    feed, x = FeedForward(64).bfloat16(), torch.randn(3, 40, 64, dtype=torch.bfloat16)
    feed.proj_in.weight *= 3
    layer = feed.proj_in
    value, gate = F.linear(x.double(), layer.weight.double(), layer.bias.double()).chunk(2, dim=-1)
    exact = value * F.gelu(gate)
    assert fuses_linear(x, layer)
    assert (fused_gate(x, layer) - exact).norm() < 3e-3 * exact.norm()
    plain_value, plain_gate = layer(x).chunk(2, dim=-1)
    assert (fused_gate(x, layer) - exact).norm() < (plain_value * F.gelu(plain_gate) - exact).norm()


@needs_fusing
@torch.no_grad()
def test_the_gate_is_the_exact_gelu():
    """Not one of its approximations, which are 3e-4 off. Observed in float32: 2.4e-7 of the norm."""
    layer, x = FeedForward(64).proj_in, torch.randn(40, 64)
    layer.weight *= 3
    value, gate = layer.double()(x.double()).chunk(2, dim=-1)
    exact = value * F.gelu(gate)
    assert (fused_gate(x, layer.float()) - exact).norm() < 2e-6 * exact.norm()


@needs_fusing
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@torch.no_grad()
def test_a_fuses_linear_only_where_nothing_else_is_asked(monkeypatch):
    """Hooks are called, wrapped layers too; what records or changes dtypes goes the plain way."""
    feed, x = FeedForward(8).bfloat16(), torch.randn(5, 8, dtype=torch.bfloat16)
    layer, plain = feed.proj_in, feed.float()(x.float())
    feed.bfloat16()
    torch.testing.assert_close(feed(x).float(), plain, rtol=0, atol=0.02)  # observed: 0.002
    assert fuses_linear(x, layer)
    for hook in (layer.register_forward_hook, layer.register_forward_pre_hook):
        seen = []
        handle = hook(lambda *parts, seen=seen: seen.append(parts))
        assert not fuses_linear(x, layer)
        feed(x)
        assert len(seen) == 1
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *parts: None)
    assert not fuses_linear(x, layer)
    handle.remove()
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) + 100
    assert not fuses_linear(x, layer) and feed(x).abs().max() > 100 * plain.abs().max()
    del layer.forward
    assert not fuses_linear(x, nn.Linear(8, 64, bias=False).bfloat16()) and not fuses_linear(x.float(), layer)
    feed.proj_in = nn.Sequential(layer)
    assert not fuses_linear(x, feed.proj_in)
    torch.testing.assert_close(feed(x).float(), plain, rtol=0, atol=0.02)
    feed.proj_in = layer
    with torch.backends.mkldnn.flags(enabled=False):
        assert not fuses_linear(x, layer)
    assert not fuses_linear(x.float(), feed.float().proj_in)
    feed.bfloat16()
    with torch.enable_grad():
        assert not fuses_linear(x, layer) and feed(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert not fuses_linear(x, layer)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pretended = mode.from_tensor(x)
        assert not fuses_linear(pretended, layer) and feed(pretended).shape == x.shape
    for operators in (SimpleNamespace(), SimpleNamespace(_linear_pointwise=1, _is_mkldnn_bf16_supported=lambda: False)):
        monkeypatch.setattr(torch.ops, "mkldnn", operators)
        assert not fuses_linear(x, layer)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 10, 5, 8), (3, 4, 2, 9)])
def test_doubling_is_repeating_and_convolving(shape, biased, last):
    """Of filters in torch's order and with the channels last. Observed in float64: 2e-14."""
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(7, shape[1], 3, 3, dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64) if biased else None
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(repeated, weight, bias, padding=1)
    torch.testing.assert_close(doubled_conv3x3(x, weight, bias), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_doubling_is_accurate(dtype, bound):
    """The norm of the error beside that of the result. Observed: 3e-7 and 2.4e-3; without it 7e-7 and 1.7e-3."""
    x = torch.randn(2, 160, 24, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(96, 160, 3, 3).to(dtype), torch.randn(96).to(dtype)
    exact = F.conv2d(F.interpolate(x.double(), scale_factor=2), weight.double(), bias.double(), padding=1)
    result = doubled_conv3x3(x, weight, bias)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert (result.double() - exact).norm() < bound * exact.norm()
    with torch.device("meta"):
        assert torch.equal(doubled_conv3x3(x, weight, bias), result), "another default device is ignored"


def test_where_maps_are_doubled(monkeypatch):
    """Each of the others fails one condition alone; the batch does not count."""
    x, conv = torch.zeros(1, 8, 64, 64), Conv3x3(8, 6)
    assert not doubling_is_faster(x, conv, None)
    with torch.no_grad():
        for fits in ((x, conv), (x.repeat(2, 1, 1, 1), conv), (x.bfloat16(), Conv3x3(8, 6).bfloat16())):
            assert doubling_is_faster(*fits, None)
        hooked = Conv3x3(8, 6)
        hooked.register_forward_hook(lambda *_: None)
        others = {name: Conv3x3(8, 6) for name in ("circular", "dilated", "grouped", "forward", "_conv_forward")}
        others["circular"].padding_mode = "circular"  # as those do who make tiles
        others["dilated"].dilation = (2, 2)
        others["grouped"].groups = 2
        for name in ("forward", "_conv_forward"):
            setattr(others[name], name, lambda *_: None)
        for what, other in {
            "few pixels": (x[:, :, 1:], conv),
            "no batch": (x[0], conv),
            "two dtypes": (x.bfloat16(), conv),
            "float64": (x.double(), Conv3x3(8, 6).double()),
            "without data": (x.to("meta"), Conv3x3(8, 6).to("meta")),
            "another kind": (x, nn.Conv2d(8, 6, 3, padding=1)),
            "a stride": (x, Conv3x3(8, 6, stride=2)),
            "no border": (x, Conv3x3(8, 6, padding=0)),
            "hooked": (x, hooked),
            **{name: (x, other) for name, other in others.items()},
        }.items():
            assert not doubling_is_faster(*other, None), what
        with torch.autocast("cpu", torch.bfloat16):
            assert not doubling_is_faster(x, conv, None)
        for name in ("products_are_exact", "uses_onednn"):
            with monkeypatch.context() as other:
                other.setattr(convolution, name, lambda: False)
                assert not doubling_is_faster(x, conv, None)


@torch.no_grad()
@pytest.mark.parametrize("size", [None, (18, 22), (17, 22), (18, 21), (9, 11)])
def test_a_step_up(size, monkeypatch):
    """Maps are doubled that way, those brought to another size are not. Observed: 1e-6."""
    block, x, seen = layers.Upsample2D(8), torch.randn(2, 8, 9, 11), []
    monkeypatch.setattr(convolution, "FEWEST_DOUBLED", 99)
    monkeypatch.setattr(layers, "doubled_conv3x3", lambda *a: seen.append(1) or doubled_conv3x3(*a))
    result = block(x, None if size is None else torch.Size(size))
    repeated = F.interpolate(x, size=size or (18, 22), mode="nearest")
    torch.testing.assert_close(result, F.conv2d(repeated, *block.conv.parameters(), padding=1), rtol=0, atol=1e-5)
    assert len(seen) == (size in (None, (18, 22)))
    with torch.enable_grad():
        assert block(x).requires_grad
    assert len(seen) == (size in (None, (18, 22)))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(192, 256, 64, 48), (1024, 1024, 16, 16), (8, 6, 12, 16)])
def test_another_way_to_convolve_is_taken(shape):
    """As those put in its place who have pictures continue beyond their borders."""
    channels, filters, *size = shape
    conv, x = Conv3x3(channels, filters), torch.randn(1, channels, *size)

    def circular(x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    conv._conv_forward = circular
    assert torch.equal(conv(x), circular(x, conv.weight, conv.bias))


class Sample(nn.Module):
    """A UNet that returns a tensor alone, as what is exported must."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, timestep, context):
        return self.unet(x, timestep, context, return_dict=False)[0]


def test_sizes_stay_free_in_exported_networks():
    """No way of our own is asked for its size before it is clear that nothing is traced. Observed: 2e-5."""
    vae, unet = AutoencoderKL.from_config(VAE).eval(), UNet2DConditionModel.from_config(UNET).eval()
    sides = {axis: 2 * torch.export.Dim(f"half{axis}", min=4, max=64) for axis in (2, 3)}
    tokens = {1: torch.export.Dim("tokens", min=3, max=100)}
    x, context = torch.rand(1, 5, 16, 24), torch.rand(1, 7, 16)
    for network, given, others, free in (
        (vae.encoder, [torch.rand(1, 3, 32, 48)], [torch.rand(1, 3, 20, 28)], (sides,)),
        (vae.decoder, [torch.rand(1, 4, 16, 24)], [torch.rand(1, 4, 20, 28)], (sides,)),
        (
            Sample(unet),
            [x, torch.tensor(5), context],
            [x, torch.tensor(9), torch.rand(1, 11, 16)],
            (None, None, tokens),
        ),
    ):
        with torch.no_grad():
            program = torch.export.export(network, tuple(given), dynamic_shapes=free).module()
            for inputs in (given, others):
                torch.testing.assert_close(program(*inputs), network(*inputs), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("channels", [3, 12])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-6)])
def test_filters_rearranged_once(stride, bias, last, channels, dtype, bound, monkeypatch):
    """For maps of several sizes, with the layer's own padding or another. Observed: 2e-3 and 2e-7, as torch's."""
    layout = torch.channels_last if last else torch.contiguous_format
    conv = Conv3x3(channels, 10, stride=stride, bias=bias).to(dtype).to(memory_format=layout)
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(convolution, "fuses_bfloat16", lambda: False)
        convolve = packed_conv(conv, (0, 1), (1, channels, 6, 14))
        for shape in ((1, 6, 14), (2, 5, 9), (1, 3, 14)):
            x = torch.randn(shape[0], channels, *shape[1:]).to(dtype).contiguous(memory_format=layout)
            bias64 = None if conv.bias is None else conv.bias.double()
            expected = F.conv2d(x.double(), conv.weight.double(), bias64, stride, (0, 1))
            mine = convolve(x)
            assert mine.dtype == dtype and (mine - expected).norm() <= bound * expected.norm()
