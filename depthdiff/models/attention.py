"""Attention in one place: one function type in several forms, and the one layer that uses it.

All forms compute softmax(q kᵀ / sqrt(D)) v (arXiv:1706.03762, eq. 1) with the same signature and no parameters, so
that a model's weights do not depend on the choice, which `use_attention` makes by an explicit call.

Letters: B batch, H heads, Lq and Lk numbers of queries and keys, D channels of a head, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from depthdiff.checks import brief, plain
from depthdiff.models.plain import has_tiles, only_computes

AttentionFn = Callable[..., Tensor]
"""(q, k, v, *, mask=None) -> out; q and out (B, H, Lq, D), k and v (B, H, Lk, D); mask bool, True where a query may
look, broadcastable to (B, H, Lq, Lk)."""

AttentionName = Literal["sdpa", "sliced", "math", "efficient"]

KEYS_AT_ONCE, FEW_KEYS = 16, 256
"""How many keys a processor's kernel takes at a time, slowing down for what remains: with three more, masked out, a
prompt's 77 take 0.7 of the time in float32, and 0.4 in bfloat16 with AMX. And up to how many keys to append some."""

CHUNK = 2**21
"""Scores that `chunked_attention` holds at a time; 4 MiB in bfloat16."""


def math_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Attend by the definition, with the whole (Lq, Lk) matrix in memory; the form that the others are tested against.

    Args:
        q: (B, H, Lq, D), float.
        k: (B, H, Lk, D), float.
        v: (B, H, Lk, D), float.
        mask: bool, broadcastable to (B, H, Lq, Lk), True where a query may look.

    Returns:
        (B, H, Lq, D), float.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, Lq, Lk)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Attend with torch's fused kernel, which picks its own back end. Shapes as in `math_attention`.

    On CUDA in half precision that is flash attention, torch's or cuDNN's, for the UNet's 64 channels a head. What that
    cannot do goes to the memory-efficient kernel: the autoencoder's one head of 512 channels (flash ends at 256), the
    text encoder's mask, and float32. None of them holds the (Lq, Lk) matrix. On a processor in bfloat16, its kernel is
    slower than plain products are, unless these are done in tiles (AMX); there `chunked_attention` is used instead.
    """
    if mask is None and chunks_are_faster(q, k, v):
        return chunked_attention(q, k, v)
    known = isinstance(k.shape[2], int)  # no number where the length stays free in what is exported
    if mask is None and q.device.type == "cpu" and known and k.shape[2] % KEYS_AT_ONCE and k.shape[2] <= FEW_KEYS:
        k, v, mask = rounded_up(k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rounded_up(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring keys and values to a multiple of `KEYS_AT_ONCE`; return a mask (1, Lk') too, which leaves new ones out."""
    count, more = k.shape[2], -k.shape[2] % KEYS_AT_ONCE
    mask = F.pad(k.new_ones(1, count, dtype=torch.bool), (0, more))
    return F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more)), mask


def chunks_are_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether to prefer `chunked_attention`: in bfloat16 on a processor without AMX, where nothing is trained."""
    if q.dtype != torch.bfloat16 or not only_computes(q, k, v):
        return False
    return not has_tiles()


def chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the definition, for so many queries and heads at a time that their scores stay in a processor's cache.

    Shapes as in `math_attention`; no gradients. The one buffer is used again and again: 1.9 times as fast as torch's
    kernel for 4096 tokens in bfloat16 on two Zen 4 cores, where a new buffer for each chunk made it slower than that.
    """
    shape, rows = q.shape, max(1, min(q.shape[2], CHUNK // k.shape[2]))
    q, k, v = (q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (BH, L, D)
    heads = max(1, min(q.shape[0], CHUNK // (rows * k.shape[1])))
    buffer, out = q.new_empty(heads * rows * k.shape[1]), torch.empty_like(q)
    for head in range(0, q.shape[0], heads):
        some = slice(head, head + heads)
        for row in range(0, q.shape[1], rows):
            queries, result = q[some, row : row + rows], out[some, row : row + rows]
            scores = buffer[: queries[..., 0].numel() * k.shape[1]].view(*queries.shape[:2], -1)
            torch.bmm(queries, k[some].transpose(1, 2), out=scores)
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, v[some], out=result)
    return out.view(shape)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Attend with a kernel that never holds the (Lq, Lk) matrix: xFormers' method, which torch contains.

    Shapes as in `math_attention`. Where the device has no such kernel for the given shapes, torch's plain one is used.
    """
    order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sliced_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, slice_size: int = 1) -> Tensor:
    """Attend for `slice_size` of the B * H heads at a time, so that only so many (Lq, Lk) matrices exist at once.

    Shapes as in `math_attention`. Every slice is complete attention: masks and remainders are right by construction.
    """
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2]).flatten(0, 1)
    batch, q, k, v = q.shape[0], q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (BH, L, D)
    out = torch.empty_like(q)
    for start in range(0, q.shape[0], slice_size):
        part = slice(start, start + slice_size)
        out[part] = math_attention(q[part], k[part], v[part], mask=None if mask is None else mask[part])
    return out.view(batch, -1, *out.shape[1:])


FORMS: dict[str, AttentionFn] = {
    "sdpa": sdpa_attention,
    "efficient": efficient_attention,
    "sliced": sliced_attention,
    "math": math_attention,
}


class KeysValues(NamedTuple):
    """What a layer reads of its context: keys and values, each (B, H, Lk, D)."""

    keys: Tensor
    values: Tensor


class MultiHeadAttention(nn.Module):
    """Let every token of `x` look at the tokens of `context`, or at those of `x` itself.

    Args:
        dim: C, channels of `x` and of the result.
        num_heads: H.
        head_dim: D; `dim // num_heads` if absent.
        context_dim: channels of `context`; `dim` if absent.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = num_heads * (head_dim or dim // num_heads)
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, inner_dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim or dim, inner_dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim or dim, inner_dim, bias=qkv_bias)
        self.to_out = nn.Linear(inner_dim, dim)
        self.attn_fn: AttentionFn = sdpa_attention

    def read(self, context: Tensor) -> KeysValues:
        """Compute keys and values of a context (B, Lk, context_dim), which may then serve many queries."""
        return KeysValues(self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context)))

    def forward(self, x: Tensor, context: KeysValues | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from `x` (B, Lq, C) to a context as `read` returns it, or to `x` where that is None; (B, Lq, C)."""
        q = self._split_heads(self.to_q(x))
        k, v = self.read(x) if context is None else context
        return self.to_out(self.attn_fn(q, k, v, mask=mask).transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, L, HD) -> (B, H, L, D)


def use_attention(model: nn.Module, name: AttentionName, slice_size: int | Literal["auto", "max"] = "auto") -> int:
    """Choose the form of attention in every `MultiHeadAttention` of `model`; return how many there are.

    Args:
        model: any network of this package.
        name: "sdpa" (torch's fused kernel), "efficient" (never holds the matrix), "sliced" or "math".
        slice_size: for "sliced": heads at a time; "auto" takes half of a layer's heads, "max" one.

    Raises:
        ValueError: unknown name, a slice size beyond a layer's heads, or a model without attention.
    """
    if not isinstance(name, str) or name not in FORMS:
        raise ValueError(f"attention must be one of {', '.join(FORMS)}, got {brief(name)}")
    layers = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layer to switch to {name!r}")
    fewest = min(layer.num_heads for layer in layers)
    size: Any = plain(slice_size)
    if name == "sliced" and not (isinstance(size, str) and size in ("auto", "max")):
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= fewest:
            raise ValueError(
                f'slice_size must be "auto", "max" or a number of heads from 1 to {fewest}, got {brief(slice_size)}'
            )
    for layer in layers:
        layer.attn_fn = FORMS[name]
        if name == "sliced":
            heads = max(layer.num_heads // 2, 1) if size == "auto" else 1 if size == "max" else size
            layer.attn_fn = partial(sliced_attention, slice_size=heads)
    return len(layers)
