"""The tiny autoencoder (TAESD): convolutions alone, distilled from the large one; fast, for previews and tests.

Source: madebyollin/taesd, taesd.py, in the layout of huggingface/diffusers, `AutoencoderTiny`.

Letters: B batch, C channels of the latents, H and W height and width in pixels, h and w in latents (each
2 ** (levels - 1) times smaller).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from depthdiff.checkpoint.taesd import load_taesd
from depthdiff.config import BaseOutput, register_to_config
from depthdiff.models.base import ModelMixin, recomputed
from depthdiff.models.embeddings import ACTIVATIONS, get_activation
from depthdiff.models.tiling import run_in_slices
from depthdiff.models.vae import DecoderOutput

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class AutoencoderTinyOutput(BaseOutput):
    """`latents`: (B, C, h, w), already scaled as the UNet reads them."""

    latents: Tensor


class AutoencoderTinyBlock(nn.Module):
    """Three convolutions beside a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, act_fn: str) -> None:
        super().__init__()
        activation = get_activation(act_fn)
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            activation,
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            activation,
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.fuse = nn.ReLU()  # whatever `act_fn` says

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return self.fuse(self.conv(x) + self.skip(x))


class EncoderTiny(nn.Module):
    """Pixels to latents; arguments as those of `AutoencoderTiny`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: tuple[int, ...],
        block_out_channels: tuple[int, ...],
        act_fn: str,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        layers: list[nn.Module] = []
        for level, (count, width) in enumerate(zip(num_blocks, block_out_channels, strict=True)):
            if level == 0:
                layers.append(nn.Conv2d(in_channels, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            layers += [AutoencoderTinyBlock(width, width, act_fn) for _ in range(count)]
        layers.append(nn.Conv2d(block_out_channels[-1], out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), in [-1, 1] -> (B, C, h, w)."""
        return recomputed(self)(self.layers, (x + 1) / 2)


class DecoderTiny(nn.Module):
    """Latents to pixels; arguments as those of `AutoencoderTiny`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: tuple[int, ...],
        block_out_channels: tuple[int, ...],
        upsampling_scaling_factor: int,
        act_fn: str,
        upsample_fn: str,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        layers: list[nn.Module] = [nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1), get_activation(act_fn)]
        last = len(num_blocks) - 1
        for level, (count, width) in enumerate(zip(num_blocks, block_out_channels, strict=True)):
            layers += [AutoencoderTinyBlock(width, width, act_fn) for _ in range(count)]
            if level < last:
                layers.append(nn.Upsample(scale_factor=upsampling_scaling_factor, mode=upsample_fn))
                layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
            else:
                layers.append(nn.Conv2d(width, out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W), about in [-1, 1]; latents are squashed into (-3, 3) first."""
        return 2 * recomputed(self)(self.layers, 3 * torch.tanh(x / 3)) - 1


class AutoencoderTiny(ModelMixin):
    """A small autoencoder whose latents are those of a large one, already scaled: it draws nothing at random.

    Args:
        in_channels: of pixels.
        out_channels: of pixels.
        encoder_block_out_channels: of each level of the encoder, the finest first; all are equal.
        decoder_block_out_channels: of each level of the decoder, the coarsest first; all are equal.
        act_fn: name of the blocks' activation.
        upsample_fn: how the decoder enlarges: "nearest" or "bilinear".
        latent_channels: C.
        upsampling_scaling_factor: by how much each level of the decoder enlarges.
        num_encoder_blocks: of each level.
        num_decoder_blocks: of each level.
        latent_magnitude: half of the range that `scale_latents` maps to [0, 1].
        latent_shift: where it maps 0 to.
        force_upcast: kept for others that read it; its config is always False.
        scaling_factor: kept for others that read it: 1, since the latents are scaled already.
        shift_factor: kept for others that read it.

    Attributes:
        use_slicing: one sample of the batch at a time.
        use_tiling: images in overlapping tiles.
        spatial_scale_factor: H / h.
        tile_sample_min_size: height and width of a tile in pixels.
        tile_latent_min_size: the same in latents.
        tile_overlap_factor: share of a tile that the next one covers again.
    """

    _supports_gradient_checkpointing = True
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": tuple(ACTIVATIONS),
        "upsample_fn": ("nearest", "bilinear", "nearest-exact", "bicubic"),
    }
    COUNTS = ("num_encoder_blocks", "num_decoder_blocks")
    POSITIVE = (
        *("in_channels", "out_channels", "latent_channels", "encoder_block_out_channels", "latent_magnitude"),
        *("decoder_block_out_channels", "upsampling_scaling_factor", "scaling_factor"),
    )
    DERIVED = ("block_out_channels",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: float = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        for side, widths, counts in (
            ("encoder", encoder_block_out_channels, num_encoder_blocks),
            ("decoder", decoder_block_out_channels, num_decoder_blocks),
        ):
            _check_levels(side, widths, counts)
        self.register_to_config(block_out_channels=decoder_block_out_channels, force_upcast=False)
        self.encoder = EncoderTiny(in_channels, latent_channels, num_encoder_blocks, encoder_block_out_channels, act_fn)
        self.decoder = DecoderTiny(
            latent_channels, out_channels, num_decoder_blocks, decoder_block_out_channels,
            upsampling_scaling_factor, act_fn, upsample_fn,
        )  # fmt: skip
        self.latent_magnitude, self.latent_shift, self.scaling_factor = latent_magnitude, latent_shift, scaling_factor
        self.use_slicing = self.use_tiling = False
        self.spatial_scale_factor = 2 ** (len(encoder_block_out_channels) - 1)
        self.tile_overlap_factor = 0.125
        self.tile_sample_min_size = 512
        self.tile_latent_min_size = self.tile_sample_min_size // self.spatial_scale_factor

    @classmethod
    def from_taesd(
        cls,
        encoder: str | os.PathLike[str],
        decoder: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
    ) -> Self:
        """Load the two files that TAESD is published in, `taesd_encoder` and `taesd_decoder`, in evaluation mode.

        Args:
            encoder: a file, `.safetensors` or `.pth`; of a pickle, nothing but tensors is read.
            decoder: the same.
            torch_dtype: of the weights; float32 if absent, the file's own for "auto".

        Raises:
            CheckpointError: a file is missing, damaged or of another network.
            ValueError: a dtype that weights cannot have.
        """
        return load_taesd(cls, encoder, decoder, torch_dtype)

    def enable_slicing(self) -> None:
        """Encode and decode one sample of the batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode the whole batch at once."""
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Encode and decode in overlapping tiles, blended where they meet."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Encode and decode images whole."""
        self.use_tiling = False

    def scale_latents(self, x: Tensor) -> Tensor:
        """Map latents (B, C, h, w) to [0, 1], as pictures of 8 bits store them."""
        return (x / (2 * self.latent_magnitude) + self.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """Map [0, 1] back to latents (B, C, h, w)."""
        return (x - self.latent_shift) * (2 * self.latent_magnitude)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Turn pixels into latents.

        Args:
            x: (B, 3, H, W), pixels in [-1, 1].
            return_dict: return a record, else a tuple of its one field.

        Returns:
            A record with `latents`, (B, C, h, w).
        """
        latents = self._sliced(self._tiled_encode if self.use_tiling else self.encoder, x)
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    def decode(
        self, x: Tensor, generator: Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into pixels.

        Args:
            x: (B, C, h, w), scaled latents, as the UNet reads them.
            generator: not used.
            return_dict: return a record, else a tuple of its one field.

        Returns:
            A record with `sample`, (B, 3, H, W), pixels, about in [-1, 1].
        """
        pixels = self._sliced(self._tiled_decode if self.use_tiling else self.decoder, x)
        return DecoderOutput(pixels) if return_dict else (pixels,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode (B, 3, H, W), round the latents to 8 bits, and decode them."""
        stored = (self.scale_latents(self.encode(sample)[0]) * 255).round() / 255
        return self.decode(self.unscale_latents(stored), return_dict=return_dict)

    def _sliced(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return run_in_slices(run, x) if self.use_slicing else run(x)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        return self._in_tiles(self.encoder, x, self.tile_sample_min_size, self.tile_latent_min_size)

    def _tiled_decode(self, x: Tensor) -> Tensor:
        return self._in_tiles(self.decoder, x, self.tile_latent_min_size, self.tile_sample_min_size)

    def _in_tiles(self, run: Callable[[Tensor], Tensor], x: Tensor, size_in: int, size_out: int) -> Tensor:
        """Run tiles that overlap; each fades in over those above and to its left.

        Source: huggingface/diffusers, `AutoencoderTiny`, whose numbers it has.
        """
        overlap = int(size_in * self.tile_overlap_factor)
        fading = overlap * size_out // size_in
        ramp = (torch.arange(size_out, device=x.device, dtype=x.dtype) / max(fading - 1, 1)).clamp(0, 1)
        ramp = ramp if fading else torch.ones_like(ramp)
        height, width = (side * size_out // size_in for side in x.shape[2:])
        whole: Tensor | None = None
        for top in range(0, x.shape[2], size_in - overlap):
            for left in range(0, x.shape[3], size_in - overlap):
                tile = run(x[:, :, top : top + size_in, left : left + size_in])
                whole = tile.new_zeros(len(tile), tile.shape[1], height, width) if whole is None else whole
                place = whole[:, :, top * size_out // size_in :, left * size_out // size_in :]
                place = place[:, :, : tile.shape[2], : tile.shape[3]]
                rows, columns = place.shape[2:]
                mask = torch.ones_like(place[:1, :1])
                mask = mask * ramp[:rows, None] if top else mask
                mask = mask * ramp[:columns] if left else mask
                place.copy_(mask * tile[:, :, :rows, :columns] + (1 - mask) * place)
        assert whole is not None
        return whole


def _check_levels(side: str, widths: Sequence[int], counts: Sequence[int]) -> None:
    """Refuse levels that do not pair, or whose widths do not fit each other."""
    if len(widths) != len(counts) or not widths:
        raise ValueError(
            f"{side}_block_out_channels must be as many as num_{side}_blocks, one a level, got {len(widths)} and "
            f"{len(counts)}"
        )
    if len(set(widths)) > 1:
        raise ValueError(f"{side}_block_out_channels must all be equal, got {list(widths)}")
