"""The forms of attention are one function; slices save memory; switches reach every layer."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch

from depthdiff.models import attention
from depthdiff.models.attention import (
    FORMS,
    MultiHeadAttention,
    chunked_attention,
    efficient_attention,
    math_attention,
    sdpa_attention,
    sliced_attention,
    use_attention,
)

OTHERS = {
    "sdpa": sdpa_attention,
    "efficient": efficient_attention,
    **{f"sliced {n}": partial(sliced_attention, slice_size=n) for n in (1, 2, 3, 100)},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (9, 77), (65, 65)])
@pytest.mark.parametrize("head_dim", [3, 40, 64])
@pytest.mark.parametrize("form", OTHERS)
def test_forms_equal_the_definition(form, head_dim, lengths, causal):
    """Observed in float64: at most 5e-15."""
    queries, keys = lengths
    q = torch.randn(2, 3, queries, head_dim, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, keys, head_dim, dtype=torch.float64)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    expected = torch.empty_like(q)
    for b, h, i in itertools.product(range(2), range(3), range(queries)):  # one query at a time, by the book
        scores = (k[b, h] @ q[b, h, i]) / head_dim**0.5
        scores = scores if mask is None else scores.masked_fill(~mask[i], -torch.inf)
        expected[b, h, i] = torch.softmax(scores, 0) @ v[b, h]
    torch.testing.assert_close(math_attention(q, k, v, mask=mask), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(OTHERS[form](q, k, v, mask=mask), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 100, 2000, 10**9])
@pytest.mark.parametrize("lengths", [(1, 1), (9, 77), (65, 65)])
def test_chunks_equal_the_definition(lengths, chunk, monkeypatch):
    """Rows and heads that do not go into the chunks evenly. Observed in float64: at most 2e-15."""
    monkeypatch.setattr(attention, "CHUNK", chunk)
    queries, keys = lengths
    q = torch.randn(2, queries, 3, 40, dtype=torch.float64).transpose(1, 2)
    k, v = torch.randn(2, 2, keys, 3, 40, dtype=torch.float64).transpose(2, 3)
    torch.testing.assert_close(chunked_attention(q, k, v), math_attention(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tiles", [False, True])
def test_chunks_are_used_where_they_are_faster_and_nothing_is_trained(tiles, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    q, k, v = torch.randn(3, 2, 3, 70, 40)
    used = []
    monkeypatch.setattr(attention, "chunked_attention", lambda *qkv: used.append(qkv) or chunked_attention(*qkv))
    expected = sdpa_attention(q, k, v)
    assert not used, "in float32"
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    out = sdpa_attention(q, k, v)
    assert len(used) == (0 if tiles else 1)
    assert (out - expected).norm() < 1e-2 * expected.norm()  # observed: 4e-3
    sdpa_attention(q, k, v, mask=torch.ones(70, 70, dtype=torch.bool))
    sdpa_attention(q.requires_grad_(), k, v).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        sdpa_attention(q.detach(), k, v)
    assert q.grad is not None and len(used) == (0 if tiles else 1), "a mask, training, or autocast"


def test_the_choice_changes_no_weight_and_reaches_every_layer(pipe):
    names = set(pipe.unet.state_dict())
    x, context = torch.randn(2, 5, 11, 15), torch.randn(2, 77, 40)
    with torch.no_grad():
        expected = pipe.unet(x, 3, context).sample
        count = sum(isinstance(module, MultiHeadAttention) for module in pipe.unet.modules())
        for form in FORMS:
            assert use_attention(pipe.unet, form) == count
            assert set(pipe.unet.state_dict()) == names
            torch.testing.assert_close(pipe.unet(x, 3, context).sample, expected, rtol=1e-4, atol=1e-5)


def form_of(model):
    [name] = {
        getattr(m.attn_fn, "func", m.attn_fn).__name__ for m in model.modules() if isinstance(m, MultiHeadAttention)
    }
    return name


def test_switches_of_the_pipeline(pipe):
    pipe.enable_attention_slicing()
    assert form_of(pipe.unet) == "sliced_attention"
    sizes = {m.num_heads: m.attn_fn.keywords["slice_size"] for m in pipe.unet.modules() if hasattr(m, "attn_fn")}
    assert sizes == {2: 1, 3: 1, 4: 2}  # half of the heads
    pipe.enable_attention_slicing("max")
    assert {m.attn_fn.keywords["slice_size"] for m in pipe.unet.modules() if hasattr(m, "attn_fn")} == {1}
    pipe.enable_xformers_memory_efficient_attention()
    assert form_of(pipe.unet) == form_of(pipe.vae) == "efficient_attention"  # it wins over slicing
    pipe.disable_xformers_memory_efficient_attention()
    assert form_of(pipe.unet) == "sliced_attention"
    assert form_of(pipe.vae) == "sdpa_attention"
    pipe.disable_attention_slicing()
    assert form_of(pipe.unet) == "sdpa_attention"
    pipe.vae.enable_xformers_memory_efficient_attention(attention_op=None)
    assert form_of(pipe.vae) == "efficient_attention"


PEAK = """
import sys, torch
from depthdiff.models.attention import FORMS
def peak():  # of this process alone; ru_maxrss would begin with that of the process that started it
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
q, k, v = torch.randn(3, 2, 5, 4096, 64)
before = peak()
FORMS[sys.argv[1]](q, k, v)
print((peak() - before) // 2**20)
"""


def test_slices_need_less_memory():
    """At 64x64 latents, five heads, guidance. Observed: 1296 MiB at once, 147 MiB one slice at a time, 13 fused."""
    peaks = {}
    for form in ("math", "sliced", "sdpa"):
        done = subprocess.run([sys.executable, "-c", PEAK, form], check=True, capture_output=True, text=True)
        peaks[form] = int(done.stdout)
    assert peaks["math"] > 1000, "ten matrices of 4096x4096 numbers, twice"
    assert peaks["sliced"] < peaks["math"] / 4
    assert peaks["sdpa"] < peaks["math"] / 4


def test_another_default_device_changes_nothing():
    """Keys that are rounded up on a processor need a mask that lies there too."""
    q, k, v = (torch.randn(2, 3, length, 40) for length in (9, 77, 77))
    expected = sdpa_attention(q, k, v)
    with torch.device("meta"):
        result = sdpa_attention(q, k, v)
    assert torch.equal(result, expected)
