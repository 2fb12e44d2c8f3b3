"""Big Transfer (BiT): the residual network in front of the hybrid depth net. Source: arXiv:1912.11370, sec. 3.

Its convolutions standardise their weights (arXiv:1903.10520), its norms are group norms, and it pads as TensorFlow's
SAME does. Letters: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.config import Config
from depthdiff.models.embeddings import ACTIVATIONS

EPS = 1e-8
"""Added to the variance of a filter's weights. Source: rwightman/pytorch-image-models, models/resnetv2.py."""

STEM_STRIDE = 4


@dataclass(eq=False)
class BitConfig(Config):
    """What a checkpoint fixes about the backbone; names and defaults are those of the published `config.json`."""

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "preactivation"
    hidden_act: str = "relu"
    global_padding: str | None = None
    num_groups: int = 32
    embedding_dynamic_padding: bool = False
    output_stride: int = 32
    width_factor: int = 1
    out_features: tuple[str, ...] | None = None

    model_type: ClassVar[str] = "bit"
    COUNTS: ClassVar[tuple[str, ...]] = ("depths",)
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "num_channels",
        "embedding_size",
        "hidden_sizes",
        "num_groups",
        "width_factor",
    )
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("bit",),
        "layer_type": ("bottleneck",),
        "hidden_act": tuple(ACTIVATIONS),
        "global_padding": ("SAME", "same"),
        "embedding_dynamic_padding": (True,),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) > len(self.hidden_sizes) or len(self.depths) < 3 or min(self.depths) < 1:
            raise ValueError(f"depths must be three or four positive numbers, one a stage, got {self.depths}")
        for width in (self.embedding_size, *self.widths, *map(bottleneck_width, self.widths)):
            if width % self.num_groups:
                raise ValueError(
                    f"hidden_sizes and embedding_size must fit {self.num_groups} groups, got width {width}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(round_width(size * self.width_factor) for size in self.hidden_sizes[: len(self.depths)])


def round_width(width: float) -> int:
    """Round to a multiple of 8, but never below 90 %. Source: tensorflow/models, mobilenet, `_make_divisible`."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def bottleneck_width(width: int) -> int:
    """Return the number of channels inside a residual layer."""
    return round_width(width / 4)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad with zeros so that the result has ceil(size / stride) rows and columns; an odd one goes below and right."""
    pads: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose every filter has mean 0 and variance 1 when it is used. Source: arXiv:1903.10520, eq. 5."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, dilation=dilation, bias=False)
        self.reach = dilation * (kernel - 1) + 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        filters = self.weight.flatten(1)[None]  # (1, C', C * kernel * kernel)
        filters = F.batch_norm(filters, None, None, training=True, momentum=0.0, eps=EPS)
        x = pad_same(x, self.reach, self.stride[0])
        return F.conv2d(x, filters.view_as(self.weight), None, self.stride, 0, self.dilation)


class Stem(nn.Module):
    """A wide convolution and a pooling, which together divide height and width by 4."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.conv = StandardizedConv2d(config.num_channels, config.embedding_size, 7, stride=2)
        self.norm = nn.GroupNorm(config.num_groups, config.embedding_size)
        self.act = ACTIVATIONS[config.hidden_act]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 4, W / 4)."""
        return F.max_pool2d(pad_same(self.act(self.norm(self.conv(x))), 3, 2), 3, 2)


class Shortcut(nn.Module):
    """Shortcut of a stage's first layer: input to the shape of its output."""

    def __init__(self, config: BitConfig, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = StandardizedConv2d(in_channels, out_channels, 1, stride=stride)
        self.norm = nn.GroupNorm(config.num_groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Narrow, look around, widen; around a residual connection. The middle convolution carries the stride."""

    def __init__(
        self, config: BitConfig, in_channels: int, out_channels: int, *, stride: int, dilation: int, first: bool
    ) -> None:
        super().__init__()
        width, groups = bottleneck_width(out_channels), config.num_groups
        self.conv1 = StandardizedConv2d(in_channels, width, 1)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = StandardizedConv2d(width, width, 3, stride=stride, dilation=dilation)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv3 = StandardizedConv2d(width, out_channels, 1)
        self.norm3 = nn.GroupNorm(groups, out_channels)
        self.act = ACTIVATIONS[config.hidden_act]()
        self.downsample = Shortcut(config, in_channels, out_channels, stride) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        h = self.act(self.norm1(self.conv1(x)))
        h = self.act(self.norm2(self.conv2(h)))
        return self.act(self.norm3(self.conv3(h)) + self.downsample(x))


class Stage(nn.Module):
    """Several layers of one width."""

    def __init__(
        self, config: BitConfig, in_channels: int, out_channels: int, depth: int, *, stride: int, dilation: int
    ) -> None:
        super().__init__()
        before = 1 if dilation in (1, 2) else 2  # dilation of the first layer: that of the stage before
        self.layers = nn.ModuleList(
            Bottleneck(
                config,
                in_channels if i == 0 else out_channels,
                out_channels,
                stride=stride if i == 0 else 1,
                dilation=before if i == 0 else dilation,
                first=i == 0,
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        for layer in self.layers:
            x = layer(x)
        return x


class BitBackbone(nn.Module):
    """The residual network.

    Args:
        config: its geometry.
    """

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.stem = Stem(config)
        self.stages = nn.ModuleList()
        channels, reached, dilation = config.embedding_size, STEM_STRIDE, 1
        for i, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            stride = 1 if i == 0 else 2
            if reached >= config.output_stride:  # dilate instead of shrinking further
                stride, dilation = 1, dilation * stride
            self.stages.append(Stage(config, channels, width, depth, stride=stride, dilation=dilation))
            channels, reached = width, reached * stride

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the result of every stage, from (B, C1, H / 4, W / 4) to the coarsest."""
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features
