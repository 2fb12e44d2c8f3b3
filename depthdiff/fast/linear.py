"""Feed-forwards of the UNet on a CPU: in chunks of tokens, with GEGLU fused into its linear layer.

Letters: B batch, L tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.fast.eligible import fuses_linear, is_plain, only_computes
from depthdiff.models.transformer import GEGLU, FeedForward

TOKEN_CHUNK = 2048
"""Tokens per chunk. The hidden layer is eight times as wide as its input; a smaller one stays in the cache."""


def fast_feed_forward(layer: FeedForward, hidden_states: Tensor) -> Tensor:
    """Compute a gated feed-forward, (B, L, C) -> (B, L, C'); NotImplemented where this does not apply."""
    layers: list[Any] = list(layer.net)
    kinds, x = (GEGLU, nn.Dropout, nn.Linear), hidden_states
    if not only_computes(x) or not only_computes(*layer.parameters()) or x.ndim != 3 or len(layers) != 3:
        return NotImplemented
    gate, dropout, out = layers
    if not all(map(is_plain, layers, kinds)) or not is_plain(gate.proj, nn.Linear) or (dropout.p and dropout.training):
        return NotImplemented
    fuses = fuses_linear(x, gate.proj)
    if x.shape[:2].numel() <= TOKEN_CHUNK:
        return out(geglu_linear(x, gate.proj)) if fuses else NotImplemented
    chunks = x.flatten(0, 1).split(TOKEN_CHUNK)
    parts = [out(geglu_linear(chunk, gate.proj) if fuses else gate(chunk)) for chunk in chunks]
    return torch.cat(parts).unflatten(0, x.shape[:2])


def geglu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Multiply the first half of a layer's output by the GELU of the second: (..., C) -> (..., C').

    oneDNN fuses bias, GELU and multiplication into the products and rounds once per half. Its operators are those that
    torch.compile uses; torch has no public name for them.
    """
    (value, gate), (value_bias, gate_bias) = layer.weight.chunk(2), layer.bias.chunk(2)
    linear = torch.ops.mkldnn._linear_pointwise
    return linear.binary(x, linear(x, gate, gate_bias, "gelu", [], "none"), value, value_bias, "mul")
