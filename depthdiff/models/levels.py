"""Common parts of the levels of the UNet and of the autoencoder.

Letters: B batch, C channels, H and W height and width of a feature map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.checks import refuse_values
from depthdiff.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from depthdiff.models.transformer import Transformer2DModel

Kwargs = dict[str, Any]


class Level(nn.Module):
    """Base of the levels: builds their layers in the published order, so that a seed gives the published weights."""

    def _build(self, widths: list[tuple[int, int]], attention: Kwargs | None, depths: list[int], **resnet: Any) -> None:
        """Build residual blocks, of given widths in and out, and after each of them a transformer."""
        resnets, attentions = [], []
        for (in_channels, out_channels), depth in zip(widths, depths, strict=True):
            resnets.append(ResnetBlock2D(in_channels=in_channels, out_channels=out_channels, **resnet))
            if attention is not None:
                attentions.append(make_transformer(out_channels, depth, **attention))
        if attention is not None:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)


def make_transformer(channels: int, depth: int, *, num_attention_heads: int, **options: Any) -> Transformer2DModel:
    """Build the transformer of a level."""
    return Transformer2DModel(
        num_attention_heads=num_attention_heads,
        attention_head_dim=channels // num_attention_heads,
        in_channels=channels,
        num_layers=depth,
        **options,
    )


def resnet_options(
    temb_channels: int | None, dropout: float, eps: float, time_shift: str, act_fn: str, groups: int
) -> Kwargs:
    """Gather the arguments of a level's residual blocks.

    Raises:
        ValueError: a time embedding that is added in another way.
    """
    refuse_values("resnet", resnet_time_scale_shift=(time_shift, "default", "group"))
    options: Kwargs = {"temb_channels": temb_channels, "dropout": dropout, "eps": eps, "groups": groups}
    return options | {"non_linearity": act_fn, "time_embedding_norm": time_shift}


def per_layer(value: int | tuple[int, ...] | list[int], count: int) -> list[int]:
    """Return one number a layer."""
    return list(value) if isinstance(value, (tuple, list)) else [value] * count


def widths_down(in_channels: int, out_channels: int, num_layers: int) -> list[tuple[int, int]]:
    """List the channels in and out of a level's residual blocks on the way down."""
    return [(in_channels if i == 0 else out_channels, out_channels) for i in range(num_layers)]


def widths_up(in_channels: int, prev_channels: int, out_channels: int, num_layers: int) -> list[tuple[int, int]]:
    """List the channels in (the last result and a skip) and out of a level's residual blocks on the way up."""
    before = [prev_channels, *[out_channels] * (num_layers - 1)]
    skips = [*[out_channels] * (num_layers - 1), in_channels]
    return [(wide + skip, out_channels) for wide, skip in zip(before, skips, strict=True)]


def make_downsamplers(channels: int, padding: int) -> nn.ModuleList:
    """Build what halves the resolution at the end of a level."""
    layer = Downsample2D(channels, use_conv=True, out_channels=channels, padding=padding, name="op")
    return nn.ModuleList([layer])


def make_upsamplers(channels: int) -> nn.ModuleList:
    """Build what doubles the resolution at the end of a level."""
    return nn.ModuleList([Upsample2D(channels, use_conv=True, out_channels=channels)])


def downsampled(
    downsamplers: nn.ModuleList | None, hidden_states: Tensor, skips: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Halve the resolution where the level does, and add the result to its skips."""
    for downsampler in downsamplers or ():
        hidden_states = downsampler(hidden_states)
        skips = (*skips, hidden_states)
    return hidden_states, skips


def upsampled(upsamplers: nn.ModuleList | None, hidden_states: Tensor, size: torch.Size | None) -> Tensor:
    """Double the resolution, or bring it to a size, where the level does."""
    for upsampler in upsamplers or ():
        hidden_states = upsampler(hidden_states, size)
    return hidden_states
