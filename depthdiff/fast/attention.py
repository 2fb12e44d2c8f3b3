"""Attention on a CPU: keys padded to what the kernel takes at a time, and scores that stay in the cache.

Letters: B batch, H heads, Lq and Lk numbers of queries and keys, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from depthdiff.fast.eligible import has_tiles, only_computes
from depthdiff.models.attention import Attention, AttnProcessor2_0

KEY_ALIGN, MAX_PADDED_KEYS = 16, 256
"""Keys that a CPU's kernel processes at a time, slower for a remainder; and the most keys to pad."""

CHUNK = 2**21
"""Scores that `chunked_attention` holds at a time."""

PLAIN = (AttnProcessor2_0.__call__, AttnProcessor2_0.attend, AttnProcessor2_0.kernel)
SDPA = F.scaled_dot_product_attention
"""Methods of the default processor as imported; a program may replace them later."""


def fast_attention(
    layer: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> Tensor:
    """Attend as the default processor does, with a faster kernel; NotImplemented where the plain way is to be taken."""
    if not only_computes(hidden_states) or not uses_default_processor(layer):
        return NotImplemented
    return KERNEL(layer, hidden_states, encoder_hidden_states, attention_mask, temb)


def uses_default_processor(layer: Attention) -> bool:
    """Return whether a layer's processor is the default one, as it was defined."""
    kind = type(layer.processor)
    if kind is not AttnProcessor2_0 or vars(layer.processor) or F.scaled_dot_product_attention is not SDPA:
        return False
    return (kind.__call__, kind.attend, kind.kernel) == PLAIN


class PaddedAttnProcessor(AttnProcessor2_0):
    """The default processor with the kernels of this file."""

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend: q (B, H, Lq, D), k and v (B, H, Lk, D) -> (B, H, Lq, D)."""
        computes = mask is None and only_computes(q, k, v)
        if computes and q.dtype == torch.bfloat16 and not has_tiles():
            return chunked_attention(q, k, v)
        if computes and k.shape[2] % KEY_ALIGN and k.shape[2] <= MAX_PADDED_KEYS:
            k, v, mask = pad_keys(k, v)
        return super().kernel(q, k, v, mask)


KERNEL = PaddedAttnProcessor()


def pad_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad keys and values to a multiple of `KEY_ALIGN`; return a mask (1, Lk') too, which leaves new ones out."""
    count, more = k.shape[2], -k.shape[2] % KEY_ALIGN
    mask = F.pad(k.new_ones(1, count, dtype=torch.bool), (0, more))
    return F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more)), mask


def chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the definition, for so many queries and heads at a time that their scores stay in a processor's cache.

    Shapes as in `PaddedAttnProcessor.kernel`; no gradients. All chunks share one buffer: new memory for each
    would cost more than it saves.
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
