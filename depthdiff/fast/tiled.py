"""Norm, activation, 3x3 convolution and short cut of maps far larger than a processor's cache, some rows at a time.

Intermediates stay in the cache and need no map of their own, whose first use costs page faults: 128 channels of 512x512
take 64 MiB in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.fast import winograd
from depthdiff.fast.calls import is_bare
from depthdiff.fast.convolution import fits, is_usual, packed_conv
from depthdiff.fast.eligible import is_plain, only_computes
from depthdiff.fast.memory import HUGEPAGE_MIN_BYTES, advise_hugepage, empty_map
from depthdiff.models.resnet import Downsample2D, ResnetBlock2D
from depthdiff.models.vae import Decoder, Encoder

MAX_WEIGHTS = 2**17
"""Pairs of channels up to which tiles are faster; wider convolutions spend little time outside their products."""

TILE_BYTES = 2**22
"""Bytes of the larger map that are processed at a time."""

ELEMENTWISE = (nn.SiLU, nn.GELU, nn.ReLU, nn.Mish)

KEEPING, HALVING, PIXELWISE = ((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (0, 0)), ((1, 1), (1, 1), (0, 0))
"""Filters, stride and padding: of a convolution that keeps height and width; of one that halves them, with a row and a
column of zeros at the end; of a short cut."""


def tiles_are_faster(
    x: Tensor,
    conv: nn.Module,
    *,
    norm: nn.Module | None = None,
    act: nn.Module | None = None,
    shortcut: nn.Module | None = None,
    halving: bool = False,
) -> bool:
    """Return whether to prefer `tiled_norm_act_conv`: for large maps on a processor, where nothing is trained.

    Layers of another class, with hooks, or with a replaced `forward` are called as they are.

    Args:
        x: (B, C, H, W), the input, or one of its dtype and size.
        conv: a convolution.
        norm: before it, if there is one.
        act: after the norm, if there is one.
        shortcut: around them, if there is one.
        halving: whether `conv` halves height and width; it keeps them otherwise.
    """
    if not only_computes(x) or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not is_conv(conv, HALVING if halving else KEEPING) or not fits(x, conv) or min(x.shape[2:]) < 2:
        return False
    if max(x.shape[1], conv.out_channels) * x.shape[2:].numel() * x.itemsize < HUGEPAGE_MIN_BYTES:
        return False
    if norm is not None and not is_norm(norm, x.shape[1]):
        return False
    if act is not None and (type(act) not in ELEMENTWISE or getattr(act, "inplace", False)):
        return False
    if shortcut is not None and not is_conv(shortcut, PIXELWISE):
        return False
    layers = [layer for layer in (conv, norm, act, shortcut) if layer is not None]
    weights = [weight for layer in layers for weight in layer.parameters()]
    return all(map(is_bare, layers)) and all(w.dtype == x.dtype for w in weights) and only_computes(*weights)


def is_conv(layer: nn.Module, geometry: tuple[tuple[int, int], ...]) -> TypeGuard[nn.Conv2d]:
    """Return whether a layer is a plain convolution with these filters, stride and padding, and not too wide."""
    if type(layer) is not nn.Conv2d or not is_usual(layer, geometry[0]):
        return False
    narrow = layer.in_channels * layer.out_channels <= MAX_WEIGHTS
    return narrow and (layer.stride, layer.padding) == geometry[1:]


def is_norm(layer: nn.Module, channels: int) -> TypeGuard[nn.GroupNorm]:
    """Return whether a layer is a group norm of so many channels, with weights."""
    if type(layer) is not nn.GroupNorm or layer.weight is None or layer.bias is None:
        return False
    return layer.weight.shape == layer.bias.shape == (channels,) and channels % layer.num_groups == 0


def tiled_norm_act_conv(
    x: Tensor,
    conv: nn.Conv2d,
    *,
    norm: nn.GroupNorm | None = None,
    act: nn.Module | None = None,
    plus: Tensor | None = None,
    shortcut: nn.Module | None = None,
    out: Tensor | None = None,
    known: Sequence[GroupNormStats] = (),
    found: Sequence[GroupNormStats] = (),
) -> Tensor:
    """Norm, activate, convolve, and add: shortcut(plus) + conv(act(norm(x))), all but `conv` optional.

    Args:
        x: (B, C, H, W), float32 or bfloat16.
        conv: a 3x3 convolution, C -> K, that keeps or halves height and width.
        norm: of C channels.
        act: works element by element.
        plus: (B, C', H', W'), added to the result.
        shortcut: a 1x1 convolution or the identity, C' -> K.
        out: (B, K, H', W'), written from the first row to the last; new memory if None. If it overlaps `x` in
            memory, each of its rows must start before the row of `x` with the same number.
        known: statistics of each picture of `x`, if they were computed before.
        found: collects the statistics of each picture of the result.

    Returns:
        (B, K, H', W'), channels last in memory unless `out` was given.

    Raises:
        ValueError: `x` has another number of channels than `conv` reads.
    """
    if x.shape[1] != conv.in_channels:
        raise ValueError(f"x must have {conv.in_channels} channels, got {x.shape[1]}, shape {tuple(x.shape)}")
    read = RowTile(x, norm, act, known)
    add = None if plus is None else RowTile(plus, None, shortcut)
    stride, above = conv.stride[0], int(conv.padding[0])  # so many rows of zeros above, and one below where it is read
    if stride == 1 and winograd.is_faster(x, conv.weight):
        out = winograd.winograd_conv3x3(x, conv.weight, conv.bias, read=read, add=add, out=out)
        for moments, picture in zip(found, out.split(1) if found else (), strict=True):
            moments.take_in(picture)
        return out
    height, width = x.shape[2:]
    down, across = ((side + above - 2) // stride + 1 for side in (height, width))
    out = empty_map(x, conv.out_channels, down, across) if out is None else out
    rows = max(1, TILE_BYTES // (x.itemsize * stride * width * max(x.shape[1], conv.out_channels)))
    convolve = packed_conv(conv, (0, above), (1, x.shape[1], stride * rows + 2, width))
    for picture in range(len(x)):
        for top in range(0, down, rows):
            bottom = min(top + rows, down)
            first, last = stride * top - above, stride * (bottom - 1) - above + 3  # what the filters cover
            part = read(picture, max(first, 0), min(last, height))
            if first < 0 or last > height or above == 0:
                part = F.pad(part, (0, 1 - above, max(-first, 0), max(last - height, 0)))
            part = convolve(part)
            place = out[picture : picture + 1, :, top:bottom]
            if add is None:
                place.copy_(part)
            else:
                torch.add(add(picture, top, bottom), part, out=place)
            if found:
                found[picture].take_in(place)
    return out


def fast_resnet(block: ResnetBlock2D, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
    """Compute a residual block without time embedding in tiles; NotImplemented where the plain way is to be taken."""
    x, dropout = input_tensor, block.dropout
    if block.output_scale_factor != 1 or block.time_emb_proj is not None:
        return NotImplemented
    if not is_plain(dropout, nn.Dropout) or (dropout.p and dropout.training):
        return NotImplemented
    act, shortcut = block.nonlinearity, block.conv_shortcut
    if not tiles_are_faster(x, block.conv1, norm=block.norm1, act=act):
        return NotImplemented
    between = x[:, :1].expand(-1, block.conv1.out_channels, -1, -1)  # as large as what the second half reads
    if not tiles_are_faster(between, block.conv2, norm=block.norm2, act=act, shortcut=shortcut):
        return NotImplemented
    added = (x.shape[1], x.shape[1]) if shortcut is None else (shortcut.in_channels, shortcut.out_channels)
    if added != (x.shape[1], block.conv2.out_channels) or block.conv1.out_channels != block.conv2.out_channels:
        return NotImplemented
    batch, _, height, width = x.shape  # the result overwrites the map between the convolutions, one row above it
    room = advise_hugepage(x.new_empty(batch * height + 1, width, block.conv1.out_channels))
    h, result = (rows.unflatten(0, (batch, height)).movedim(3, 1) for rows in (room[1:], room[:-1]))
    moments = [GroupNormStats() for _ in range(batch)]
    tiled_norm_act_conv(x, block.conv1, norm=block.norm1, act=act, out=h, found=moments)
    return tiled_norm_act_conv(
        h, block.conv2, norm=block.norm2, act=act, plus=x, shortcut=shortcut, out=result, known=moments
    )


def fast_downsample(layer: Downsample2D, hidden_states: Tensor) -> Tensor:
    """Halve a map in tiles; NotImplemented where the plain way is to be taken."""
    if layer.use_conv and layer.padding == 0 and tiles_are_faster(hidden_states, layer.conv, halving=True):
        return tiled_norm_act_conv(hidden_states, layer.conv)  # type: ignore[arg-type]
    return NotImplemented


def fast_encoder(encoder: Encoder, sample: Tensor) -> Tensor:
    """Compute an encoder with its first and last convolution in tiles; NotImplemented where neither gains by that."""
    if not tiles_are_faster(sample, encoder.conv_in) or not only_computes(*encoder.parameters()):
        return NotImplemented
    x = tiled_norm_act_conv(sample, encoder.conv_in)
    for block in encoder.down_blocks:
        x = block(x)
    return norm_act_conv(encoder.mid_block(x), encoder)


def fast_decoder(decoder: Decoder, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    """Compute a decoder with its last convolution in tiles; NotImplemented where that gains nothing."""
    if not only_computes(sample) or not only_computes(*decoder.parameters()):
        return NotImplemented
    if sample.dim() != 4 or type(decoder.conv_out) is not nn.Conv2d:
        return NotImplemented
    scale, (batch, _, height, width) = 2 ** (len(decoder.up_blocks) - 1), sample.shape
    last = sample.new_empty(1).expand(batch, decoder.conv_out.in_channels, scale * height, scale * width)
    if not tiles_are_faster(last, decoder.conv_out, norm=decoder.conv_norm_out, act=decoder.conv_act):
        return NotImplemented
    x = decoder.mid_block(decoder.conv_in(sample), latent_embeds)
    for block in decoder.up_blocks:
        x = block(x, latent_embeds)
    return norm_act_conv(x, decoder)


def norm_act_conv(x: Tensor, coder: Encoder | Decoder) -> Tensor:
    """Compute the last layers of an encoder or decoder, in tiles where that is faster."""
    norm, act, conv = coder.conv_norm_out, coder.conv_act, coder.conv_out
    if tiles_are_faster(x, conv, norm=norm, act=act):
        return tiled_norm_act_conv(x, conv, norm=norm, act=act)
    return conv(act(norm(x)))


class RowTile:
    """Some rows of a picture, normed and then passed through a layer.

    Args:
        x: (B, C, H, W).
        norm: of C channels, if there is one.
        layer: an activation or a 1x1 convolution, if there is one.
        known: the moments of each picture of `x`, if they are known.
    """

    def __init__(
        self, x: Tensor, norm: nn.GroupNorm | None, layer: nn.Module | None, known: Sequence[GroupNormStats] = ()
    ) -> None:
        self.x, self.norm, self.layer = x, norm, layer
        self.statistics: list[tuple[Tensor, Tensor]] = []
        if norm is not None:
            self.weights = norm.weight.float(), norm.bias.float()
            every = known or [GroupNormStats().take_in(picture) for picture in x.split(1)]
            self.statistics = [moments.of_groups(norm.num_groups) for moments in every]

    def __call__(self, picture: int, first: int, last: int) -> Tensor:
        """(1, C', last - first, W)."""
        part = self.x[picture : picture + 1, :, first:last]
        if self.norm is not None:
            part = F.batch_norm(part, *self.statistics[picture], *self.weights, eps=self.norm.eps)
            if type(self.layer) is nn.SiLU:
                return F.silu(part, inplace=True)
        return part if self.layer is None else self.layer(part)


class GroupNormStats:
    """Mean and variance of a picture's channels, put together from those of its parts."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Tensor, Tensor]] = []

    def take_in(self, x: Tensor) -> GroupNormStats:
        """Take in some rows of the picture, (1, C, rows, W); return these moments."""
        kept = x.new_zeros(2, x.shape[1], dtype=torch.float32)  # so that what is found is float32
        for part in x.split(max(1, TILE_BYTES // x[:, :, :1].nbytes), 2):
            mean, variance = torch.batch_norm_update_stats(part, kept[0], kept[1], 1.0)
            self.parts.append((part.shape[2], mean, variance))
        return self

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return mean and variance of groups of channels, as each channel of a group has them: two of (C,), float32."""
        rows, means, variances = zip(*self.parts, strict=True)
        mean, variance = torch.stack(means).double(), torch.stack(variances).double()  # (parts, C)
        share = torch.tensor(rows, dtype=torch.float64, device=mean.device)[:, None] / sum(rows)
        square = (share * (variance + mean.square())).sum(0).view(groups, -1)
        mean = (share * mean).sum(0).view(groups, -1).mean(1, keepdim=True)
        variance = square.mean(1, keepdim=True) - mean.square()
        return mean.expand_as(square).flatten().float(), variance.expand_as(square).flatten().float()
