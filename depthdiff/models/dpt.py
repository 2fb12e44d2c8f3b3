"""The depth net, MiDaS' dense prediction transformer: a photo to relative inverse depth. Source: arXiv:2103.13413.

Two forms: the hybrid one of Stable Diffusion 2 depth (`is_hybrid`), whose tokens and finest features come from a BiT
backbone, and the plain one of Intel/dpt-large, whose tokens are patches of pixels.

Letters: B batch, C channels, H and W height and width in pixels, h and w in patches, L tokens (h * w and one
class token).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.config import BaseOutput, Config
from depthdiff.models.attention import Attention, AttentionMixin
from depthdiff.models.base import PreTrainedModel, recomputed
from depthdiff.models.bit import BitBackbone, BitConfig
from depthdiff.models.embeddings import ACTIVATIONS

HYBRID_BACKBONE = BitConfig(
    depths=(3, 4, 9), layer_type="bottleneck", global_padding="SAME", embedding_dynamic_padding=True
)
FROM_BACKBONE = 2
"""Levels of the hybrid form that are features of the backbone; the others are tokens."""


@dataclass(eq=False)
class DPTConfig(Config):
    """What a checkpoint fixes about the depth net; names and defaults are those of the published `config.json`."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 384
    patch_size: int = 16
    num_channels: int = 3
    is_hybrid: bool = False
    qkv_bias: bool = True
    backbone_out_indices: tuple[int, ...] = (2, 5, 8, 11)
    readout_type: str = "project"
    reassemble_factors: tuple[float, ...] = (4, 2, 1, 0.5)
    neck_hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    fusion_hidden_size: int = 256
    head_in_index: int = -1
    use_bias_in_fusion_residual: bool | None = None
    add_projection: bool = False
    backbone_config: Mapping[str, Any] | None = None
    backbone_featmap_shape: tuple[int, ...] | None = None
    neck_ignore_stages: tuple[int, ...] = ()

    model_type: ClassVar[str] = "dpt"
    COUNTS: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "layer_norm_eps",
        "image_size",
        "patch_size",
        "num_channels",
        "reassemble_factors",
        "neck_hidden_sizes",
        "fusion_hidden_size",
    )
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("dpt",),
        "hidden_act": tuple(ACTIVATIONS),
        "readout_type": ("project", "add", "ignore"),
        "use_batch_norm_in_fusion_residual": (False, None),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.neck_hidden_sizes)
        for name in ("backbone_out_indices", "reassemble_factors"):
            if len(self[name]) != levels or not levels:
                raise ValueError(f"{name} must hold {levels} numbers, one a level of the neck, got {self[name]}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of {self.num_attention_heads} heads")
        if max(self.backbone_out_indices[FROM_BACKBONE if self.is_hybrid else 0 :]) >= self.num_hidden_layers:
            raise ValueError(f"backbone_out_indices must be below {self.num_hidden_layers} layers")
        if not -levels <= self.head_in_index < levels:
            raise ValueError(f"head_in_index must name one of {levels} levels, got {self.head_in_index}")
        if self.add_projection and self.fusion_hidden_size != 256:
            raise ValueError(f"add_projection needs a fusion_hidden_size of 256, got {self.fusion_hidden_size}")
        if self.is_hybrid and (self.readout_type != "project" or levels != 4):
            raise ValueError(
                f"is_hybrid needs readout_type 'project' and four levels, got {self.readout_type!r}, {levels}"
            )
        if not self.is_hybrid and self.backbone_config is not None:
            raise ValueError("backbone_config must be absent unless is_hybrid; other backbones are not implemented")
        for width, size in zip(
            self.backbone.widths[:2] if self.is_hybrid else (), self.neck_hidden_sizes, strict=False
        ):
            if width != size:
                raise ValueError(f"neck_hidden_sizes must begin with the backbone's widths, got {size} for {width}")

    @property
    def backbone(self) -> BitConfig:
        """The hybrid form's backbone."""
        if self.backbone_config is None:
            return HYBRID_BACKBONE
        return BitConfig.from_dict(self.backbone_config)

    def to_dict(self) -> dict[str, Any]:
        """Return what transformers writes as well: the backbone's config is an object of its own."""
        backbone = {"model_type": "bit", "out_features": ["stage1", "stage2", "stage3"]}
        return super().to_dict() | {
            "backbone_config": {**self.backbone.to_dict(), **backbone} if self.is_hybrid else None,
            "neck_ignore_stages": list(range(FROM_BACKBONE)) if self.is_hybrid else [],
        }


@dataclass
class DepthEstimatorOutput(BaseOutput):
    """`predicted_depth`: (B, H, W), disparity: relative inverse depth, at least 0, near is large, of no unit."""

    predicted_depth: Tensor


class Embeddings(nn.Module):
    """Features or pixels to tokens: a projection, a class token before them, and positions."""

    def __init__(self, config: DPTConfig) -> None:
        super().__init__()
        grid, self.is_hybrid = config.image_size // config.patch_size, config.is_hybrid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, grid * grid + 1, config.hidden_size))
        if config.is_hybrid:
            self.projection = nn.Conv2d(config.backbone.widths[-1], config.hidden_size, 1)
        else:
            patch = config.patch_size
            self.patch_projection = nn.Conv2d(config.num_channels, config.hidden_size, patch, stride=patch)

    def forward(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """(B, C, ...) -> tokens (B, L, C'), and (h, w)."""
        features = self.projection(x) if self.is_hybrid else self.patch_projection(x)
        size = features.shape[-2:]
        tokens = features.flatten(2).transpose(1, 2)  # (B, hw, C')
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens + self.positions(size), size

    def positions(self, size: torch.Size) -> Tensor:
        """Stretch the square grid of position embeddings to (h, w): (1, hw + 1, C')."""
        first, grid = self.position_embeddings.split([1, self.position_embeddings.shape[1] - 1], dim=1)
        side = round(grid.shape[1] ** 0.5)
        grid = grid.transpose(1, 2).unflatten(2, (side, side))  # (1, C', side, side)
        if size != (side, side):
            grid = F.interpolate(grid, size=size, mode="bilinear")
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


class ViTLayer(nn.Module):
    """Self-attention and a feed-forward, each after a norm and with a residual connection. Source: arXiv:2010.11929."""

    def __init__(self, config: DPTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, config.layer_norm_eps)
        heads = config.num_attention_heads
        self.attention = Attention(dim, heads=heads, dim_head=dim // heads, bias=config.qkv_bias)
        self.norm2 = nn.LayerNorm(dim, config.layer_norm_eps)
        self.fc1 = nn.Linear(dim, config.intermediate_size)
        self.act = ACTIVATIONS[config.hidden_act]()
        self.fc2 = nn.Linear(config.intermediate_size, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Reassemble(nn.Module):
    """Tokens to a feature map at a level's resolution. Source: arXiv:2103.13413, sec. 3, Read, Concatenate, Resample.

    Args:
        config: of the depth net.
        channels: of the result.
        factor: by which the map is enlarged: a whole number, 1, or 1 / whole number.
    """

    def __init__(self, config: DPTConfig, channels: int, factor: float) -> None:
        super().__init__()
        dim = config.hidden_size
        self.readout_type = config.readout_type
        if config.readout_type == "project":
            self.readout = nn.Linear(2 * dim, dim)
            self.act = ACTIVATIONS[config.hidden_act]()
        self.projection = nn.Conv2d(dim, channels, 1)
        self.resize: nn.Module = nn.Identity()
        if factor > 1:
            self.resize = nn.ConvTranspose2d(channels, channels, int(factor), stride=int(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(channels, channels, 3, stride=int(1 / factor), padding=1)

    def forward(self, tokens: Tensor, size: torch.Size) -> Tensor:
        """(B, L, C) -> (B, channels, factor * h, factor * w)."""
        readout, tokens = tokens[:, :1], tokens[:, 1:]  # the class token, and those of the map
        if self.readout_type == "project":
            tokens = self.act(self.readout(torch.cat([tokens, readout.expand_as(tokens)], dim=2)))
        elif self.readout_type == "add":
            tokens = tokens + readout
        features = tokens.transpose(1, 2).unflatten(2, size)  # (B, C, h, w)
        return self.resize(self.projection(features))


class ResidualConvUnit(nn.Module):
    """Two convolutions, each after a ReLU, and a residual connection. Source: arXiv:1611.06612, fig. 4b (RefineNet)."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.convolution2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a level's features to what comes from the coarser ones, refines both and doubles the resolution."""

    def __init__(self, config: DPTConfig, *, coarsest: bool) -> None:
        super().__init__()
        channels, bias = config.fusion_hidden_size, config.use_bias_in_fusion_residual is not False
        self.residual_layer1 = nn.Identity() if coarsest else ResidualConvUnit(channels, bias)
        self.residual_layer2 = ResidualConvUnit(channels, bias)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor, coarser: Tensor | None) -> Tensor:
        """(B, C, h, w), and the same from the coarser levels -> (B, C, 2 h, 2 w)."""
        if coarser is not None:
            if features.shape != coarser.shape:
                features = F.interpolate(features, size=coarser.shape[-2:], mode="bilinear", align_corners=False)
            features = coarser + self.residual_layer1(features)
        x = self.residual_layer2(features)
        return self.projection(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True))


class Head(nn.Module):
    """Three convolutions to one channel, and a last doubling of the resolution between the first two."""

    def __init__(self, config: DPTConfig) -> None:
        super().__init__()
        channels = config.fusion_hidden_size
        self.projection = nn.Conv2d(channels, channels, 3, padding=1) if config.add_projection else None
        self.conv1 = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(channels // 2, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 2 h, 2 w), at least 0."""
        if self.projection is not None:
            x = F.relu(self.projection(x))
        x = F.interpolate(self.conv1(x), scale_factor=2.0, mode="bilinear", align_corners=True)
        return F.relu(self.conv3(F.relu(self.conv2(x)))).squeeze(1)


class DPTForDepthEstimation(PreTrainedModel, AttentionMixin):
    """Monocular depth estimation, for depth up to scale and shift.

    Args:
        config: its geometry.
        **settings: those of `DPTConfig`, instead of a config.
    """

    config_class = DPTConfig
    config: DPTConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: DPTConfig | None = None, **settings: Any) -> None:
        if config is not None and settings:
            raise TypeError(f"config and {', '.join(settings)} both describe the network; give one of them")
        config = DPTConfig(**settings) if config is None else config
        super().__init__(config)
        self.gradient_checkpointing = False
        self.backbone = BitBackbone(config.backbone) if config.is_hybrid else None
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        levels = list(zip(config.neck_hidden_sizes, config.reassemble_factors, strict=True))
        self.first_token_level = FROM_BACKBONE if config.is_hybrid else 0
        self.reassemble = nn.ModuleDict(
            {str(i): Reassemble(config, *level) for i, level in enumerate(levels) if i >= self.first_token_level}
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(size, config.fusion_hidden_size, 3, padding=1, bias=False) for size in config.neck_hidden_sizes
        )
        self.fusion = nn.ModuleList(Fusion(config, coarsest=i == 0) for i in range(len(levels)))
        self.head = Head(config)

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> DepthEstimatorOutput | tuple[Tensor]:
        """Estimate disparity.

        Args:
            pixel_values: (B, 3, H, W), about in [-1, 1], as `DPTImageProcessor` prepares them; any multiples of
                `patch_size`. Positions are stretched where these are not `image_size`.
            return_dict: return a record, else a tuple of its one field.

        Returns:
            A record with `predicted_depth` (B, H, W).

        Raises:
            ValueError: an image size that the network does not take.
        """
        self._check_size(pixel_values)
        features: list[Tensor] = []
        x = pixel_values
        if self.backbone is not None:
            *_, x = maps = self.backbone(pixel_values)
            features = maps[:FROM_BACKBONE]
        tokens, size = self.embeddings(x)
        taps = self.config.backbone_out_indices[self.first_token_level :]
        levels = iter(self.reassemble.values())
        for i, layer in enumerate(self.layers):
            tokens = recomputed(self)(layer, tokens)
            if i in taps:
                features.append(next(levels)(tokens, size))

        fused: list[Tensor] = []
        maps = [conv(feature) for conv, feature in zip(self.convs, features, strict=True)]
        for fusion, feature in zip(self.fusion, reversed(maps), strict=True):  # the coarsest level comes first
            fused.append(fusion(feature, fused[-1] if fused else None))
        disparity = self.head(fused[self.config.head_in_index])
        return DepthEstimatorOutput(disparity) if return_dict else (disparity,)

    def _check_size(self, pixel_values: Tensor) -> None:
        config, (_, channels, height, width) = self.config, pixel_values.shape
        if channels != config.num_channels:
            raise ValueError(f"pixel_values must have {config.num_channels} channels, got {channels}")
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"pixel_values must have multiples of {config.patch_size} as height and width, got {height}x{width}; "
                "prepare them with the checkpoint's image processor"
            )
