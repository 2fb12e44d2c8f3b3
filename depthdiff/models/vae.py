"""The autoencoder: pixels to latents and back. Source: arXiv:2112.10752, sec. 3.1 and appendix G.

Letters: B batch, C channels, H and W height and width in pixels, h and w in latents (each 2 ** (levels - 1) times
smaller).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor, nn

from depthdiff.checks import refuse_values
from depthdiff.config import BaseOutput, register_to_config
from depthdiff.models.attention import AttentionMixin
from depthdiff.models.base import ModelMixin, recomputed
from depthdiff.models.embeddings import ACTIVATIONS
from depthdiff.models.gaussian import DiagonalGaussianDistribution
from depthdiff.models.levels import Level, make_downsamplers, make_upsamplers, resnet_options, widths_down
from depthdiff.models.mid_blocks import UNetMidBlock2D
from depthdiff.models.peft import PeftAdapterMixin
from depthdiff.models.tiling import fade, run_in_slices, run_in_tiles

EPS = 1e-6
"""Epsilon of every group norm of the autoencoder; the UNet's residual blocks use 1e-5."""


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """`latent_dist`: the distribution of the latents, not yet multiplied by `scaling_factor`."""

    latent_dist: DiagonalGaussianDistribution


@dataclass
class DecoderOutput(BaseOutput):
    """`sample`: (B, out_channels, H, W), pixels, about in [-1, 1]."""

    sample: Tensor


class DownEncoderBlock2D(Level):
    """A level of the encoder; arguments as those of `depthdiff.models.unet_blocks.CrossAttnDownBlock2D`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        num_layers: int = 1,
        resnet_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        resnet_pre_norm: bool = True,
        output_scale_factor: float = 1.0,
        add_downsample: bool = True,
        downsample_padding: int = 1,
    ) -> None:
        super().__init__()
        self._build(
            widths_down(in_channels, out_channels, num_layers),
            None,
            [0] * num_layers,
            **resnet_options(None, dropout, resnet_eps, resnet_time_scale_shift, resnet_act_fn, resnet_groups),
            pre_norm=resnet_pre_norm,
            output_scale_factor=output_scale_factor,
        )
        self.downsamplers = make_downsamplers(out_channels, downsample_padding) if add_downsample else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, temb=None)
        for downsampler in self.downsamplers or ():
            hidden_states = downsampler(hidden_states)
        return hidden_states


class UpDecoderBlock2D(Level):
    """A level of the decoder; arguments as those of `depthdiff.models.unet_blocks.CrossAttnUpBlock2D`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resolution_idx: int | None = None,
        dropout: float = 0.0,
        num_layers: int = 1,
        resnet_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        resnet_pre_norm: bool = True,
        output_scale_factor: float = 1.0,
        add_upsample: bool = True,
        temb_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.resolution_idx = resolution_idx
        self._build(
            widths_down(in_channels, out_channels, num_layers),
            None,
            [0] * num_layers,
            **resnet_options(temb_channels, dropout, resnet_eps, resnet_time_scale_shift, resnet_act_fn, resnet_groups),
            pre_norm=resnet_pre_norm,
            output_scale_factor=output_scale_factor,
        )
        self.upsamplers = make_upsamplers(out_channels) if add_upsample else None

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', 2 H, 2 W)."""
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, temb=temb)
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states)
        return hidden_states


class Encoder(nn.Module):
    """Pixels to the parameters of a Gaussian; arguments as those of `AutoencoderKL`."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        double_z: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        self.layers_per_block, self.gradient_checkpointing = layers_per_block, False
        widths, last = block_out_channels, len(block_out_channels) - 1
        common: dict[str, Any] = {"resnet_eps": EPS, "resnet_act_fn": act_fn, "resnet_groups": norm_num_groups}
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            options: dict[str, Any] = {
                "num_layers": layers_per_block,
                "add_downsample": i < last,
                "downsample_padding": 0,
            }
            self.down_blocks.append(DownEncoderBlock2D(widths[max(i - 1, 0)], width, **options, **common))
        self.mid_block = UNetMidBlock2D(
            widths[-1], None, **common, attention_head_dim=widths[-1], add_attention=mid_block_add_attention
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[-1], EPS)
        self.conv_act = nn.SiLU()  # whatever `act_fn` says: that is for the residual blocks
        self.conv_out = nn.Conv2d(widths[-1], 2 * out_channels if double_z else out_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2C, h, w)."""
        sample = self.conv_in(sample)
        for block in self.down_blocks:
            sample = recomputed(self)(block, sample)
        sample = recomputed(self)(self.mid_block, sample)
        sample = self.conv_norm_out(sample)
        sample = self.conv_act(sample)
        return self.conv_out(sample)


class Decoder(nn.Module):
    """Latents to pixels; arguments as those of `AutoencoderKL`."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        refuse_values("Decoder", norm_type=(norm_type, "group"))
        self.layers_per_block, self.gradient_checkpointing = layers_per_block, False
        widths, last = block_out_channels[::-1], len(block_out_channels) - 1
        common: dict[str, Any] = {"resnet_eps": EPS, "resnet_act_fn": act_fn, "resnet_groups": norm_num_groups}
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList()  # registered before the middle, built after it
        self.mid_block = UNetMidBlock2D(
            widths[0], None, **common, attention_head_dim=widths[0], add_attention=mid_block_add_attention
        )
        for i, width in enumerate(widths):
            options: dict[str, Any] = {"num_layers": layers_per_block + 1, "add_upsample": i < last}
            block = UpDecoderBlock2D(
                widths[max(i - 1, 0)], width, resnet_time_scale_shift=norm_type, **options, **common
            )
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[-1], EPS)
        self.conv_act = nn.SiLU()  # as in the encoder
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        sample = self.conv_in(sample)
        sample = recomputed(self)(self.mid_block, sample, latent_embeds)
        for block in self.up_blocks:
            sample = recomputed(self)(block, sample, latent_embeds)
        sample = self.conv_norm_out(sample)
        sample = self.conv_act(sample)
        return self.conv_out(sample)


class AutoencoderKL(ModelMixin, AttentionMixin, PeftAdapterMixin):
    """The variational autoencoder of latent diffusion.

    Args:
        in_channels: of pixels.
        out_channels: of pixels.
        down_block_types: class of each level of the encoder.
        up_block_types: class of each level of the decoder.
        block_out_channels: of each level, the finest first.
        layers_per_block: residual blocks of a level of the encoder; of the decoder there is one more.
        act_fn: name of the residual blocks' activation.
        latent_channels: C.
        norm_num_groups: of all group norms.
        sample_size: H and W that the network was trained on; a tile has this size.
        scaling_factor: 1 over the standard deviation of the latents (arXiv:2112.10752, appendix G).
        shift_factor: must be None or 0.
        latents_mean: must be None.
        latents_std: must be None.
        force_upcast: whether float16 overflows; kept for others that read it.
        use_quant_conv: whether a 1x1 convolution follows the encoder.
        use_post_quant_conv: whether a 1x1 convolution precedes the decoder.
        mid_block_add_attention: whether pixels attend to each other at the coarsest level.

    Attributes:
        use_slicing: one sample of the batch at a time.
        use_tiling: large images in overlapping tiles.
        tile_sample_min_size: height and width of a tile in pixels.
        tile_latent_min_size: the same in latents.
        tile_overlap_factor: share of a tile that the next one covers again.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]  # noqa: RUF012
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "act_fn": tuple(ACTIVATIONS),
        "shift_factor": (None, 0),
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    COUNTS = ("layers_per_block",)
    POSITIVE = (
        *("sample_size", "in_channels", "out_channels", "latent_channels", "layers_per_block", "scaling_factor"),
        *("norm_num_groups", "block_out_channels"),
    )

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | tuple[int, ...] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        self._check_levels()
        common: dict[str, Any] = {"block_out_channels": block_out_channels, "layers_per_block": layers_per_block}
        common |= {"norm_num_groups": norm_num_groups, "act_fn": act_fn}
        common |= {"mid_block_add_attention": mid_block_add_attention}
        self.encoder = Encoder(in_channels, latent_channels, down_block_types, **common)
        self.decoder = Decoder(latent_channels, out_channels, up_block_types, **common)
        moments = 2 * latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        size = sample_size if isinstance(sample_size, int) else sample_size[0]
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = size
        self.tile_latent_min_size = size // 2 ** (len(block_out_channels) - 1)
        self.tile_overlap_factor = 0.25

    def _check_levels(self) -> None:
        config, levels = self.config, len(self.config.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(config[name]) != levels or not levels:
                raise ValueError(f"{name} must name {levels} blocks, one a level, got {len(config[name])}")
        if config.sample_size == ():
            raise ValueError("sample_size must be a number or two, got none")
        for channels in config.block_out_channels:
            if channels % config.norm_num_groups:
                raise ValueError(
                    f"block_out_channels must be multiples of {config.norm_num_groups} groups, got {channels}"
                )

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
            x: (B, 3, H, W), pixels in [-1, 1]; H and W multiples of 2 ** (levels - 1).
            return_dict: return a record, else a tuple of its one field.

        Returns:
            A record with `latent_dist`, a distribution over (B, C, h, w).
        """
        distribution = DiagonalGaussianDistribution(self._sliced(self._encode, x))
        return AutoencoderKLOutput(distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into pixels.

        Args:
            z: (B, C, h, w), latents divided by `scaling_factor`.
            return_dict: return a record, else a tuple of its one field.
            generator: not used.

        Returns:
            A record with `sample`, (B, 3, H, W), pixels, about in [-1, 1].
        """
        pixels = self._sliced(self._decode, z)
        return DecoderOutput(pixels) if return_dict else (pixels,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode (B, 3, H, W), through the mean or through a draw from the distribution."""
        distribution = self.encode(sample)[0]
        latents = distribution.sample(generator) if sample_posterior else distribution.mode()
        return self.decode(latents, return_dict=return_dict)

    def tiled_encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Describe the latents of an image in overlapping tiles; arguments as those of `encode`."""
        sizes = self.tile_sample_min_size, self.tile_latent_min_size
        distribution = DiagonalGaussianDistribution(
            run_in_tiles(self._encode_tile, x, *sizes, self.tile_overlap_factor)
        )
        return AutoencoderKLOutput(distribution) if return_dict else (distribution,)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into pixels in overlapping tiles; arguments as those of `decode`."""
        sizes = self.tile_latent_min_size, self.tile_sample_min_size
        pixels = run_in_tiles(self._decode_tile, z, *sizes, self.tile_overlap_factor)
        return DecoderOutput(pixels) if return_dict else (pixels,)

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Blend the first rows of `b` with the last ones of `a`, the tile above it."""
        return fade(a, b, blend_extent, dim=2)

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Blend the first columns of `b` with the last ones of `a`, the tile to its left."""
        return fade(a, b, blend_extent, dim=3)

    def _encode(self, x: Tensor) -> Tensor:
        if self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size:
            return self.tiled_encode(x)[0].parameters
        return self._encode_tile(x)

    def _decode(self, z: Tensor) -> Tensor:
        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            return self.tiled_decode(z)[0]
        return self._decode_tile(z)

    def _encode_tile(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return x if self.quant_conv is None else self.quant_conv(x)

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _sliced(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return run_in_slices(run, x) if self.use_slicing else run(x)
