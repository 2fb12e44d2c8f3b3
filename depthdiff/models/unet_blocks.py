"""The levels of the UNet: residual blocks, each followed by attention to the prompt or by nothing.

Letters: B batch, C channels, h and w height and width of a level's feature maps, T channels of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from depthdiff.models.attention import KeysValues
from depthdiff.models.layers import Downsample2D, ResnetBlock2D, SpatialTransformer, Upsample2D, widened
from depthdiff.models.shortcuts import TokenMerging

if TYPE_CHECKING:
    from depthdiff.models.unet import UNet2DConditionConfig


class PassThrough(nn.Module):
    """Stands where a level has no attention."""

    def forward(self, x: Tensor, context: Sequence[KeysValues], merging: TokenMerging | None = None) -> Tensor:
        """Return `x`."""
        return x


class Level:
    """The sizes of one level of the UNet, from which its layers are made."""

    def __init__(self, config: UNet2DConditionConfig, index: int, *, attention: bool) -> None:
        self.config, self.attention = config, attention
        self.channels = config.block_out_channels[index]
        self.num_heads = config.per_level("attention_head_dim")[index]
        self.num_resnets = config.per_level("layers_per_block")[index]
        self.num_transformers = config.per_level("transformer_layers_per_block")[index]
        self.context_dim = config.per_level("cross_attention_dim")[index]

    def resnet(self, in_channels: int) -> ResnetBlock2D:
        """Make a residual block that ends in this level's channels."""
        config = self.config
        time_dim, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        return ResnetBlock2D(
            in_channels, self.channels, time_dim, groups=groups, eps=config.norm_eps, act_fn=config.act_fn
        )

    def transformer(self) -> nn.Module:
        """Make the attention that follows a residual block, or a pass-through."""
        if not self.attention:
            return PassThrough()
        return SpatialTransformer(
            self.channels,
            self.num_heads,
            num_layers=self.num_transformers,
            context_dim=self.context_dim,
            groups=self.config.norm_num_groups,
            use_linear=self.config.use_linear_projection,
        )


class DownBlock(nn.Module):
    """One level on the way down; hands out what its counterpart on the way up will read."""

    def __init__(self, level: Level, in_channels: int, *, downsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [level.channels] * (level.num_resnets - 1)
        self.resnets = nn.ModuleList(level.resnet(width) for width in widths)
        self.attentions = nn.ModuleList(level.transformer() for _ in widths)
        self.downsample = Downsample2D(level.channels, level.config.downsample_padding) if downsample else None

    def forward(
        self, x: Tensor, time: Tensor, context: Sequence[KeysValues], merging: TokenMerging | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the block's result and every intermediate one, the result included.

        Up to the first attention to the prompts, `x` may have fewer rows than there are prompts.
        """
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, time[: len(x)]), context, merging)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The coarsest level: residual block, attention, residual block; only the first of them without attention."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(level.resnet(level.channels) for _ in range(1 + level.attention))
        self.attentions = nn.ModuleList(level.transformer() for _ in range(level.attention))

    def forward(self, x: Tensor, time: Tensor, context: Sequence[KeysValues]) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = self.resnets[0](x, time)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, context), time)
        return x


class UpBlock(nn.Module):
    """One level on the way up: every residual block also reads a result of the way down."""

    def __init__(self, level: Level, in_channels: int, skip_channels: int, *, upsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [level.channels] * level.num_resnets
        skips = [level.channels] * level.num_resnets + [skip_channels]
        self.resnets = nn.ModuleList(level.resnet(width + skip) for width, skip in zip(widths, skips, strict=True))
        self.attentions = nn.ModuleList(level.transformer() for _ in widths)
        self.upsample = Upsample2D(level.channels) if upsample else None

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: Tensor,
        context: Sequence[KeysValues],
        merging: TokenMerging | None = None,
        part: slice = slice(None),
    ) -> Tensor:
        """Take what it needs off the end of `skips`, and come out at the size of the skip that is then last.

        `part` names the residual blocks to run, of a level that does not upsample.
        """
        for resnet, attention in list(zip(self.resnets, self.attentions, strict=True))[part]:
            x = attention(resnet(torch.cat([x, widened(skips.pop(), len(x))], dim=1), time), context, merging)
        return x if self.upsample is None else self.upsample(x, skips[-1].shape[-2:])
