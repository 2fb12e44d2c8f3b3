"""The autoencoder: pixels to latents and back. Source: arXiv:2112.10752, sec. 3.1 and appendix G.

Letters: B batch, C channels, H and W height and width in pixels, h and w in latents (each f = 2 ** (levels - 1)
times smaller).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from depthdiff.config import Config, Output
from depthdiff.models.attention import MultiHeadAttention
from depthdiff.models.base import Model
from depthdiff.models.gaussian import DiagonalGaussianDistribution
from depthdiff.models.layers import ACTIVATIONS, Downsample2D, ResnetBlock2D, Upsample2D, convolved
from depthdiff.models.tiling import run_in_tiles

EPS = 1e-6
"""Of every group norm of the autoencoder; the UNet's residual blocks have 1e-5."""


@dataclass(frozen=True)
class AutoencoderKLConfig(Config):
    """What a checkpoint fixes about the autoencoder; names and defaults are those of the published `config.json`.

    `scaling_factor` times the latents have unit deviation: that is what the UNet was trained on.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    COUNTS: ClassVar[tuple[str, ...]] = ("layers_per_block",)
    POSITIVE: ClassVar[tuple[str, ...]] = ("sample_size",)
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "act_fn": tuple(ACTIVATIONS),
        "shift_factor": (None, 0),
        "latents_mean": (None,),
        "latents_std": (None,),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(self[name]) != levels or not levels:
                raise ValueError(f"{name} must name {levels} blocks, one a level, got {len(self[name])}")
        if self.sample_size == ():
            raise ValueError("sample_size must be a number or two, got none")
        for channels in self.block_out_channels:
            if self.norm_num_groups < 1 or channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels must be multiples of {self.norm_num_groups} groups, got {channels}"
                )
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "scaling_factor"):
            if self[name] <= 0:
                raise ValueError(f"{name} must be positive, got {self[name]}")


@dataclass
class AutoencoderKLOutput(Output):
    """`latent_dist`: the distribution of the latents, not yet multiplied by `scaling_factor`."""

    latent_dist: DiagonalGaussianDistribution


@dataclass
class DecoderOutput(Output):
    """`sample`: (B, out_channels, H, W), pixels, about in [-1, 1]."""

    sample: Tensor


class SpatialAttention(nn.Module):
    """Let every pixel of the coarsest map look at all others, with one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.attn = MultiHeadAttention(channels, num_heads=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        tokens = self.attn(self.norm(x).flatten(2).transpose(1, 2))  # (B, hw, C)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[-2:])


class Block(nn.Module):
    """One level: residual blocks, then a change of resolution where there is one."""

    def __init__(self, config: AutoencoderKLConfig, in_channels: int, out_channels: int, num_resnets: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_resnets - 1)
        self.resnets = nn.ModuleList(resnet(config, width, out_channels) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        for block in self.resnets:
            x = block(x)
        return x


class DownBlock(Block):
    """A level of the encoder, halved at its end unless it is the last."""

    def __init__(self, config: AutoencoderKLConfig, in_channels: int, out_channels: int, *, downsample: bool) -> None:
        super().__init__(config, in_channels, out_channels, config.layers_per_block)
        self.downsample = Downsample2D(out_channels, padding=0) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        return self.downsample(super().forward(x))


class UpBlock(Block):
    """A level of the decoder, doubled at its end unless it is the last."""

    def __init__(self, config: AutoencoderKLConfig, in_channels: int, out_channels: int, *, upsample: bool) -> None:
        super().__init__(config, in_channels, out_channels, config.layers_per_block + 1)
        self.upsample = Upsample2D(out_channels) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2 H, 2 W)."""
        return self.upsample(super().forward(x))


class MidBlock(nn.Module):
    """The coarsest level: residual block, attention, residual block."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        attention = SpatialAttention(channels, config.norm_num_groups)
        self.resnets = nn.ModuleList(resnet(config, channels, channels) for _ in range(2))
        self.attention = attention if config.mid_block_add_attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.resnets[1](self.attention(self.resnets[0](x)))


class Encoder(nn.Module):
    """Pixels to the parameters of a Gaussian."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(config, widths[max(i - 1, 0)], widths[i], downsample=i < last) for i in range(last + 1)
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.act = nn.SiLU()  # whatever `act_fn` says: that is for the residual blocks
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2C, h, w)."""
        x = convolved(x, self.conv_in)
        for down_block in self.down_blocks:
            x = down_block(x)
        return convolved(self.mid_block(x), self.conv_out, self.conv_norm_out, self.act)


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, last = config.block_out_channels[::-1], len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, widths[max(i - 1, 0)], widths[i], upsample=i < last) for i in range(last + 1)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.act = nn.SiLU()  # whatever `act_fn` says: that is for the residual blocks
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for up_block in self.up_blocks:
            x = up_block(x)
        return convolved(x, self.conv_out, self.conv_norm_out, self.act)


class AutoencoderKL(Model):
    """The variational autoencoder of latent diffusion.

    Args:
        config: its geometry.
    """

    config_class = AutoencoderKLConfig
    weights_name = "diffusion_pytorch_model"
    bodies = ("_encode", "_decode")
    config: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else nn.Identity()
        sample_size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.tile_sample_min_size = sample_size
        self.tile_latent_min_size = sample_size // self.factor
        self.tile_overlap_factor = 0.25
        self.use_slicing = False
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode one sample of the batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode the whole batch at once."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode large images in overlapping tiles, blended where they meet."""
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Encode and decode images whole."""
        self.use_tiling = False

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Describe the latents of an image.

        Args:
            x: (B, 3, H, W), pixels in [-1, 1]; H and W multiples of f.
            return_dict: return a record, else a tuple of its one field.

        Returns:
            A record with `latent_dist`, a distribution over (B, C, h, w).
        """
        tiled = self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size
        distribution = DiagonalGaussianDistribution(self._sliced(self._encode_tiled if tiled else self._encode, x))
        return AutoencoderKLOutput(distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into pixels.

        Args:
            z: (B, C, h, w), latents divided by `scaling_factor`.
            return_dict: return a record, else a tuple of its one field.
            generator: not needed; there because diffusers' signature has it.

        Returns:
            A record with `sample`, (B, 3, H, W), pixels, about in [-1, 1].
        """
        tiled = self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size
        pixels = self._sliced(self._decode_tiled if tiled else self._decode, z)
        return DecoderOutput(pixels) if return_dict else (pixels,)

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode (B, 3, H, W), through the mean or through a draw from the distribution."""
        distribution = self.encode(sample)[0]
        return self.decode(distribution.sample(generator) if sample_posterior else distribution.mode())

    def _encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def _sliced(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([run(one) for one in x.split(1)]) if self.use_slicing and len(x) > 1 else run(x)

    def _encode_tiled(self, x: Tensor) -> Tensor:
        sizes = self.tile_sample_min_size, self.tile_latent_min_size
        return run_in_tiles(self._encode, x, *sizes, self.tile_overlap_factor)

    def _decode_tiled(self, z: Tensor) -> Tensor:
        sizes = self.tile_latent_min_size, self.tile_sample_min_size
        return run_in_tiles(self._decode, z, *sizes, self.tile_overlap_factor)


def resnet(config: AutoencoderKLConfig, in_channels: int, out_channels: int) -> ResnetBlock2D:
    """Make a residual block of the autoencoder, which knows no time."""
    return ResnetBlock2D(in_channels, out_channels, None, groups=config.norm_num_groups, eps=EPS, act_fn=config.act_fn)
