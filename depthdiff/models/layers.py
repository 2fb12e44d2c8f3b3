"""What the UNet and the autoencoder are made of.

Letters: B batch, C channels, H and W height and width of a feature map, L tokens, T channels of the time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.models.attention import KeysValues, MultiHeadAttention
from depthdiff.models.convolution import Conv3x3, doubled_conv3x3, doubling_is_faster
from depthdiff.models.pages import ask_for_large_pages
from depthdiff.models.plain import fuses_linear, only_computes
from depthdiff.models.shortcuts import TokenMerging
from depthdiff.models.strips import Moments, striped_conv3x3, strips_are_faster


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's stand-in for GELU. Source: openai/CLIP, clip/model.py."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it element by element."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "mish": nn.Mish,
}
"""Activations by the names that published configs use."""


def timestep_embedding(timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Encode timesteps as sines and cosines of falling frequency.

    Args:
        timesteps: (B,), int or float, 0..999.
        dim: of the result.
        flip_sin_to_cos: put the cosines first, as Stable Diffusion does.
        freq_shift: 0 ends at frequency just above 1/10000, 1 exactly there.

    Returns:
        (B, dim), float32, in [-1, 1]; an odd `dim` ends in a column of zeros.

    Source: arXiv:1706.03762, sec. 3.5, in the form of hojonathanho/diffusion, nn.py, `get_timestep_embedding`.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - freq_shift)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10_000) * exponents)  # (B, dim / 2)
    sin, cos = angles.sin(), angles.cos()
    return F.pad(torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn the sinusoids into what the residual blocks read."""

    def __init__(self, dim: int, time_dim: int, act_fn: str) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_dim)
        self.act = ACTIVATIONS[act_fn]()
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, sinusoids: Tensor) -> Tensor:
        """(B, dim) -> (B, T)."""
        return self.linear_2(self.act(self.linear_1(sinusoids)))


class ResnetBlock2D(nn.Module):
    """Two convolutions with a short cut, shifted by the time embedding where there is one (`time_dim`)."""

    def __init__(
        self, in_channels: int, out_channels: int, time_dim: int | None, *, groups: int, eps: float, act_fn: str
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.act = ACTIVATIONS[act_fn]()
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and, where the block has a time projection, (B, T) after its activation -> (B, C', H, W)."""
        if time is None and self._goes_by_strips(x):
            return self._by_strips(x)
        h = self.norm1(x)  # one step a line from here on, so that what was read is given back at once
        h = self.act(h)
        h = self.conv1(h)
        if time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.norm2(h)
        h = self.act(h)
        h = self.conv2(h)
        return self.conv_shortcut(x) + h

    def _goes_by_strips(self, x: Tensor) -> bool:
        return strips_are_faster(x, self.conv1, norm=self.norm1, act=self.act) and strips_are_faster(
            x, self.conv2, norm=self.norm2, act=self.act, shortcut=self.conv_shortcut
        )

    def _by_strips(self, x: Tensor) -> Tensor:
        """Write the result over what is between the convolutions, each row over the one above it, read by then."""
        batch, _, height, width = x.shape
        room = ask_for_large_pages(x.new_empty(batch * height + 1, width, self.conv1.out_channels))
        h, result = (rows.unflatten(0, (batch, height)).movedim(3, 1) for rows in (room[1:], room[:-1]))
        moments = [Moments() for _ in range(batch)]
        striped_conv3x3(x, self.conv1, norm=self.norm1, act=self.act, out=h, found=moments)
        return striped_conv3x3(
            h,
            self.conv2,
            norm=self.norm2,
            act=self.act,
            plus=x,
            shortcut=self.conv_shortcut,
            out=result,
            known=moments,
        )


def convolved(x: Tensor, conv: nn.Conv2d, norm: nn.GroupNorm | None = None, act: nn.Module | None = None) -> Tensor:
    """Norm and activate (B, C, H, W) where a layer is given for it, and convolve; in strips where that is faster."""
    if strips_are_faster(x, conv, norm=norm, act=act):
        return striped_conv3x3(x, conv, norm=norm, act=act)
    for layer in (norm, act):
        if layer is not None:
            x = layer(x)
    return conv(x)


class Downsample2D(nn.Module):
    """Halve height and width by a strided convolution.

    With `padding` 0 one row and one column of zeros are added below and to the right only: the layout that the
    autoencoder was trained with.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.pad = (0, 1, 0, 1) if padding == 0 else (0, 0, 0, 0)
        self.conv = Conv3x3(channels, channels, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), the floor for `padding` 0."""
        if strips_are_faster(x, self.conv, halving=True):
            return striped_conv3x3(x, self.conv)
        return self.conv(F.pad(x, self.pad))


class Upsample2D(nn.Module):
    """Double height and width, or bring them to a given size, by repeating pixels; then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size), twice the input's size if that is None."""
        if doubling_is_faster(x, self.conv, size):
            return doubled_conv3x3(x, self.conv.weight, self.conv.bias)
        if size is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


TOKENS_AT_ONCE = 2048
"""Tokens that `FeedForward` widens at a time on a processor: what all 8192 of a call at 512x512 become, eight times as
wide as they are, is memory that the system hands out anew. So it takes 0.82 of the time, in float32 and bfloat16."""


class FeedForward(nn.Module):
    """Two linear layers around a gated GELU. Source: arXiv:2002.05202, eq. 6 (GEGLU)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, 8 * dim)
        self.proj_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        if not only_computes(x, *self.proj_in.parameters()) or x.shape[:-1].numel() <= TOKENS_AT_ONCE:
            return self._feed(x)
        parts = x.flatten(0, 1).split(TOKENS_AT_ONCE)
        return torch.cat([self._feed(part) for part in parts]).view_as(x)

    def _feed(self, x: Tensor) -> Tensor:
        if fuses_linear(x, self.proj_in):
            return self.proj_out(fused_gate(x, self.proj_in))
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


def fused_gate(x: Tensor, layer: nn.Linear) -> Tensor:
    """Multiply the first half of what a layer gives by the GELU of the second: (..., C) -> (..., C').

    oneDNN adds, gates and multiplies while the products of each half are at hand, and rounds once a half. Its operators
    are those that torch.compile uses; torch has no public name for them.
    """
    (value, gate), (value_bias, gate_bias) = layer.weight.chunk(2), layer.bias.chunk(2)
    linear = torch.ops.mkldnn._linear_pointwise
    return linear.binary(x, linear(x, gate, gate_bias, "gelu", [], "none"), value, value_bias, "mul")


def widened(x: Tensor, rows: int) -> Tensor:
    """Repeat a batch until it has as many rows as wanted, a multiple of those that it has; its layout is kept."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt and a gated feed-forward, each after a norm and around a short cut."""

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = MultiHeadAttention(dim, num_heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = MultiHeadAttention(dim, num_heads, context_dim=context_dim, qkv_bias=False)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)
        self.slot = 0
        """Which of the network's readings of the prompt this block attends to."""

    def forward(
        self,
        x: Tensor,
        context: Sequence[KeysValues],
        merging: TokenMerging | None = None,
        size: torch.Size | None = None,
    ) -> Tensor:
        """(B, L, C) and prompts as each block reads them -> (B', L, C), B' being the number of prompts.

        `size` is that of the tokens' map.
        """
        tokens = self.norm1(x)
        groups = None if merging is None or size is None else merging.group(tokens, size)
        if groups is None:
            x = x + self.self_attn(tokens)
        else:
            x = x + groups.unmerge(self.self_attn(groups.merge(tokens)))
        x = widened(x, len(context[self.slot].keys))
        x = x + self.cross_attn(self.norm2(x), context[self.slot])
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Let every pixel attend to all pixels and to the prompt. Source: arXiv:2112.10752, sec. 3.3.

    Args:
        channels: C of the feature map.
        num_heads: of the attention; each has `channels // num_heads` channels.
        num_layers: how many transformer blocks.
        context_dim: channels of the prompt's tokens.
        groups: of the norm.
        use_linear: project tokens by linear layers (Stable Diffusion 2), else by 1x1 convolutions (Stable Diffusion 1).
    """

    def __init__(
        self, channels: int, num_heads: int, *, num_layers: int, context_dim: int, groups: int, use_linear: bool
    ) -> None:
        super().__init__()
        inner = num_heads * (channels // num_heads)
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if use_linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, num_heads, context_dim) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(inner, channels) if use_linear else nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, context: Sequence[KeysValues], merging: TokenMerging | None = None) -> Tensor:
        """(B, C, H, W) and prompts as each block reads them -> (B', C, H, W), B' being the number of prompts."""
        size = x.shape[-2:]
        if self.use_linear:
            tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, HW, C)
        else:
            tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, merging, size)
        x = widened(x, len(tokens))
        if self.use_linear:
            return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, size)  # (B, C, H, W)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, size))
