"""Attention with padded keys or in chunks: torch's results, and only for the default processor."""

import pytest
import torch
import torch.nn.functional as F

from depthdiff import fast
from depthdiff.fast import attention
from depthdiff.models.attention import Attention, AttnProcessor, AttnProcessor2_0
from tests.fast.conftest import distance

bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def used(spy):
    """List which fast kernels were used."""
    ways = [spy(attention, "pad_keys"), spy(attention, "chunked_attention")]
    return lambda: [len(way) for way in ways]


def layer_of(dtype=f32, **options):
    layer = Attention(24, 40, heads=3, dim_head=8, **options).to(dtype).requires_grad_(False)
    fast.enable(layer)
    return layer


@pytest.mark.parametrize(("queries", "keys", "chunk"), [(1, 1, 1), (9, 77, 100), (65, 65, 2000), (65, 77, 10**9)])
def test_chunks_equal_torchs_attention(queries, keys, chunk, monkeypatch):
    """Rows and heads that do not go into the chunks evenly. Observed in float64: at most 2e-15."""
    monkeypatch.setattr(attention, "CHUNK", chunk)
    q = torch.randn(2, queries, 3, 40, dtype=f64).transpose(1, 2)
    k, v = torch.randn(2, 2, keys, 3, 40, dtype=f64).transpose(2, 3)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention.chunked_attention(q, k, v), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "keys", "tiles", "ways", "bound"),
    [
        (f32, 77, True, [1, 0], 1e-6),
        (f32, 80, True, [0, 0], 1e-6),
        (f32, 257, True, [0, 0], 1e-6),
        (bf16, 77, True, [1, 0], 1e-2),
        (bf16, 77, False, [0, 1], 1e-2),
    ],
)
def test_a_layer_takes_the_way_of_its_keys(dtype, keys, tiles, ways, bound, used, monkeypatch):
    """Observed: 2e-7 in float32; in bfloat16 4e-3."""
    monkeypatch.setattr(attention, "has_tiles", lambda: tiles)
    layer, x, context = layer_of(dtype), torch.randn(2, 9, 24).to(dtype), torch.randn(2, keys, 40).to(dtype)
    mine = layer(x, encoder_hidden_states=context, attention_mask=None, temb=None)
    assert used() == ways
    assert distance(mine, layer._call_impl(x, context)) <= bound
    with torch.device("meta"):  # another default device changes nothing
        assert torch.equal(layer(x, context), mine)


class Own(AttnProcessor2_0):
    """A processor of the user's own."""


CHANGES = {
    "another processor": lambda layer: layer.set_processor(AttnProcessor()),
    "slices": lambda layer: layer.set_attention_slice(1),
    "a processor's subclass": lambda layer: layer.set_processor(Own()),
    "a changed processor": lambda layer: setattr(layer.processor, "kernel", lambda q, k, v, mask: 2 * q),
    "a hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "another forward": lambda layer: setattr(layer, "forward", lambda x, context: 2 * x),
    "training": lambda layer: layer.to_k.weight.requires_grad_(True),
}


def test_a_layer_that_was_changed_is_called_as_it_is(used):
    for change, apply in CHANGES.items():
        layer, x, context = layer_of(), torch.randn(2, 9, 24), torch.randn(2, 77, 40)
        apply(layer)
        assert torch.equal(layer(x, context), layer._call_impl(x, context)), change
        assert used() == [0, 0], change


def test_masks_autocast_and_other_arguments_are_left_to_torch(used, monkeypatch):
    layer, x, context = layer_of(), torch.randn(2, 9, 24), torch.randn(2, 77, 40)
    mask = torch.zeros(2, 1, 77)
    assert torch.equal(layer(x, context, mask), layer._call_impl(x, context, mask))
    with pytest.warns(UserWarning, match="unknown"):
        assert torch.equal(layer(x, context, unknown=1), layer._call_impl(x, context))
    with torch.autocast("cpu", bf16):
        assert layer(x, context).dtype == bf16
    kernel, seen = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(a) or kernel(*a, **k))
    layer(x, context)
    assert len(seen) == 1 and seen[0][1].shape[2] == 77, "a replaced function gets what torch's would"
    assert used() == [0, 0]


def test_a_layer_is_called_in_every_form(used):
    """Maps with a norm and a residual connection, and self-attention of any number of tokens. Observed: 0."""
    layer = Attention(24, heads=3, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True)
    fast.enable(layer)
    with torch.no_grad():
        for x in (torch.randn(2, 24, 4, 5), torch.randn(2, 24, 4, 4), torch.randn(1, 24, 17, 16)):
            assert distance(layer(x), layer._call_impl(x)) <= 1e-6
    assert used() == [1, 0]
