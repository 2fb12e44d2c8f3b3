"""The text encoder's feed-forward goes by parts of its width: the same numbers, and only in plain computing."""

import pytest
import torch
import torch.nn.functional as F
from depthdiff.models.plain import fuses_bfloat16
from torch import nn

from depthdiff.models import clip_text
from depthdiff.models.clip import CLIPTextConfig, EncoderLayer

bf16, f32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Make the test's layers wide ones."""
    monkeypatch.setattr(clip_text, "FEWEST_WEIGHTS", 1)


def layer_of(act="gelu", width=80, dtype=f32):
    config = CLIPTextConfig(hidden_size=48, intermediate_size=width, num_attention_heads=4, hidden_act=act)
    layer = EncoderLayer(config).to(dtype).requires_grad_(False)
    for weight in layer.parameters():
        weight.normal_(0, 0.3)
    return layer


def exact(layer, x):
    """What the feed-forward does, in float64 with the same weights."""
    one, two = ([weight.double() for weight in linear.parameters()] for linear in (layer.fc1, layer.fc2))
    act = F.gelu if type(layer.act) is nn.GELU else layer.act
    return F.linear(act(F.linear(x.double(), *one)), *two)


def distance(mine, expected):
    return ((mine.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("width", [3, 6, 80, 81])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "relu"])
@pytest.mark.parametrize(("dtype", "bound"), [(f32, 5e-7), (bf16, 6e-3)])
def test_parts_equal_the_whole(dtype, bound, act, width, monkeypatch):
    """Also where the width is no multiple of the parts. Observed: 2e-7, and at most 4.5e-3 of the norm."""
    products, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a: products.append(a[1].shape) or addmm(*a))
    layer, x = layer_of(act, width, dtype), torch.randn(3, 7, 48).to(dtype)
    mine = layer._feed(x)
    assert mine.shape == x.shape and mine.dtype == dtype
    assert sum(shape[1] for shape in products) == width and len(products) == (4 if width >= 80 else 3)
    assert distance(mine, exact(layer, x)) <= bound
    whole = layer.fc2(layer.act(layer.fc1(x)))
    assert distance(mine, exact(layer, x)) <= 1.5 * distance(whole, exact(layer, x)), "roundings are few"
    assert torch.equal(layer._feed(x), mine), "weights stay as they are"


def test_the_layer_adds_its_feed_forward():
    layer, x = layer_of(), torch.randn(2, 7, 48)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    attended = x + layer.self_attn(layer.norm1(x), mask=mask)
    expected = attended.double() + exact(layer, layer.norm2(attended))
    assert distance(layer(x, mask), expected) <= 5e-7


def test_parts_only_where_nothing_else_is_asked(monkeypatch):
    """Hooks are called, replaced layers too; what records gradients or chooses dtypes goes the whole way."""
    layer, x = layer_of(), torch.randn(2, 7, 48)
    expected = exact(layer, x)
    assert layer._goes_by_parts(x)
    for part in (layer.fc1, layer.act, layer.fc2):
        for hook in (part.register_forward_hook, part.register_forward_pre_hook):
            seen = []
            handle = hook(lambda *given, seen=seen: seen.append(given))
            assert not layer._goes_by_parts(x)
            assert distance(layer._feed(x), expected) <= 5e-7 and len(seen) == 1
            handle.remove()
    for name in ("fc1", "fc2"):
        linear = getattr(layer, name)
        setattr(layer, name, nn.Sequential(linear))
        assert not layer._goes_by_parts(x) and distance(layer._feed(x), expected) <= 5e-7
        setattr(layer, name, linear)
        bias, linear.bias = linear.bias, None
        assert not layer._goes_by_parts(x) and layer._feed(x).shape == x.shape
        linear.bias = bias
    layer.act = nn.ELU()
    assert not layer._goes_by_parts(x)
    layer.act = nn.GELU()
    with torch.autocast("cpu", bf16):
        assert not layer._goes_by_parts(x) and layer._feed(x).dtype == bf16
    assert not layer._goes_by_parts(x.to(bf16))
    layer.fc2.weight.requires_grad_(True)
    assert layer._feed(x).requires_grad
    with torch.no_grad():
        assert layer._goes_by_parts(x)
        monkeypatch.setattr(clip_text, "FEWEST_WEIGHTS", 48 * 80 + 1)
        assert not layer._goes_by_parts(x), "not worth it"


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_another_gelu_is_that_which_is_computed(dtype, monkeypatch):
    """Its approximation by tanh is called for each part, as is the exact one unless the products compute it."""
    seen, gelu = [], nn.GELU.forward
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: seen.append(self.approximate) or gelu(self, x))
    layer, x = layer_of(dtype=dtype), torch.randn(2, 7, 48).to(dtype)
    layer._feed(x)
    assert seen == ([] if dtype == bf16 and fuses_bfloat16() else ["none"] * clip_text.PARTS)
    layer.act = nn.GELU(approximate="tanh")
    seen.clear()
    mine = layer._feed(x)
    assert seen == ["tanh"] * clip_text.PARTS
    expected = layer.fc2(layer.act(layer.fc1(x)))
    assert distance(mine, expected.double()) <= (5e-7 if dtype == f32 else 6e-3)
