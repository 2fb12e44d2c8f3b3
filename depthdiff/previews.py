"""Pictures of latents on the way, for little work: a linear map to colours, or a small decoder.

Letters: B pictures, C channels of the latents, h and w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from depthdiff.checks import check_number, check_path, check_tensor, show
from depthdiff.config import CheckpointError
from depthdiff.devices import DeviceMixin, device_of, dtype_of, hook_device, uses_weights
from depthdiff.image import from_pixels
from depthdiff.models.autoencoder_tiny import AutoencoderTiny
from depthdiff.precision import finite
from depthdiff.run import Step

PREVIEW_STEPS = 5
"""After how many steps a preview is made where nothing else is asked for."""

SAMPLES, SIDE, SEED = 32, 8, 0
"""How many latents the linear map is fitted on, their height and width, and the seed that draws them."""


@dataclass(frozen=True)
class LatentToRGB:
    """A linear map from latents to colours: what a network decodes, but for everything finer than a latent.

    Attributes:
        weight: (3, C), float32, on the CPU.
        bias: (3,).
        factor: how many pixels, in height and in width, one latent stands for.
        error: how much of the colours it was fitted on it does not explain: the norm of what remains over the norm of
            the colours without their mean; 0 is a perfect map, 1 is grey.
    """

    weight: Tensor
    bias: Tensor
    factor: int
    error: float

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: Any, device: torch.device | None = None) -> LatentToRGB:
        """Fit the map to an autoencoder by least squares, always on the same latents: see `smooth_latents`.

        Args:
            vae: an autoencoder, such as a pipeline's own; it decodes 32 small latents.
            device: where it works; that of its weights if None.

        Raises:
            FloatingPointError: NaN or infinity in what it decodes.
            TypeError: not an autoencoder.
        """
        latents = smooth_latents(_config(vae).latent_channels)
        pixels = decode(latents, vae, device).cpu().double()
        factor = pixels.shape[-1] // latents.shape[-1]
        colours = F.avg_pool2d(pixels, factor).movedim(1, -1).flatten(0, 2)
        features = latents.double().movedim(1, -1).flatten(0, 2)
        features = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
        solution = torch.linalg.solve(features.T @ features, features.T @ colours)  # the normal equations
        spread = (colours - colours.mean(dim=0)).norm()
        error = float((features @ solution - colours).norm() / spread) if spread > 0 else 0.0
        weight, bias = solution[:-1].T.float().contiguous(), solution[-1].float()
        return cls(weight, bias, factor, error)

    def __call__(self, latents: Tensor) -> Tensor:
        """Map scaled latents (B, C, h, w) of any dtype, on any device, to colours (B, 3, h, w), about in [-1, 1]."""
        x = latents.to(torch.promote_types(latents.dtype, torch.float32))
        colours = torch.einsum("oc,bchw->bohw", self.weight.to(x), x)
        return colours + self.bias.to(x)[:, None, None]


def smooth_latents(channels: int) -> Tensor:
    """Draw the latents that the linear map is fitted on: (32, C, 8, 8), float32, smooth, of about unit variance.

    Each is one constant for every channel and a slow change around it. They are the same in every process.
    """
    generator = Generator().manual_seed(SEED)
    constant = torch.randn(SAMPLES, channels, 1, 1, generator=generator)
    change = torch.randn(SAMPLES, channels, 2, 2, generator=generator)
    change = F.interpolate(change, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    return (constant + change) / 2**0.5


@torch.no_grad()
def preview_pictures(latents: Tensor, decoder: Any, device: torch.device | None = None) -> list[Image.Image]:
    """Turn latents into pictures.

    Args:
        latents: (B, C, h, w), as a run has them: scaled.
        decoder: a `LatentToRGB`, whose colours are enlarged; or an autoencoder, such as `AutoencoderTiny` or
            `AutoencoderKL`, which gets the latents divided by its `scaling_factor` (1 for the tiny one).
        device: where an autoencoder works; that of its weights if None.

    Returns:
        B RGB images of the size of the decoded picture.

    Raises:
        FloatingPointError: NaN or infinity in what an autoencoder decodes.
        TypeError: neither such a map nor an autoencoder, or not latents.
        ValueError: latents of another number of channels.
    """
    linear = isinstance(decoder, LatentToRGB)
    channels = decoder.weight.shape[1] if linear else _config(decoder).latent_channels
    if check_tensor("latents", latents, f"(B, {channels}, h, w)", 4).shape[1] != channels:
        raise ValueError(f"latents must have {channels} channels, which the decoder reads, got {latents.shape[1]}")
    if linear:
        pixels = F.interpolate(decoder(latents), scale_factor=float(decoder.factor), mode="bilinear")
    else:
        pixels = decode(latents, decoder, device)
    return cast("list[Image.Image]", from_pixels(pixels))


def decode(latents: Tensor, vae: Any, device: torch.device | None = None) -> Tensor:
    """Decode scaled latents (B, C, h, w) to pixels (B, 3, H, W), about in [-1, 1], on the autoencoder's device."""
    scaled = latents.to(device or hook_device(vae) or device_of(vae)) / _config(vae).scaling_factor
    return finite("vae", vae, lambda net: net.decode(scaled.to(dtype_of(net)), return_dict=False)[0], scaled)


def load_preview_decoder(path: str | Path) -> AutoencoderTiny:
    """Load a tiny autoencoder from a folder in diffusers' layout, or from TAESD's own two files.

    Args:
        path: the folder; or `taesd_decoder.safetensors` or `.pth`, beside which `taesd_encoder` must be.

    Raises:
        CheckpointError: a file is missing, damaged or of another network.
    """
    check_path("path", path)
    place = Path(path)
    if not place.is_file():
        loaded: AutoencoderTiny = AutoencoderTiny.from_pretrained(place)
        return loaded
    names = [place.name.replace("decoder", part).replace("encoder", part) for part in ("encoder", "decoder")]
    encoder, decoder = (place.with_name(name) for name in names)
    if encoder == decoder or not (encoder.is_file() and decoder.is_file()):
        raise CheckpointError(
            f"{place} must be a folder with config.json and weights, or TAESD's taesd_decoder file with taesd_encoder "
            "of the same type beside it"
        )
    return AutoencoderTiny.from_taesd(encoder, decoder)


def _config(vae: Any) -> Any:
    if not hasattr(vae, "decode") or not hasattr(vae, "config"):
        raise TypeError(f"the decoder must be a LatentToRGB or an autoencoder, got {show(vae)}")
    return vae.config


class PreviewMixin(DeviceMixin):
    """Adds to a pipeline pictures of what is in the making."""

    vae: Any

    @torch.no_grad()
    @uses_weights
    def preview(self, step_or_latents: Step | Tensor, decoder: Any = None) -> list[Image.Image]:
        """Turn latents on the way into pictures, for little work.

        Args:
            step_or_latents: a step of `denoise`, of which the clean latents that it predicts are shown, or its latents
                where the scheduler does not tell; or latents (B, 4, h, w).
            decoder: see `depthdiff.previews.preview_pictures`. If None, a `LatentToRGB` is fitted to the pipeline's own
                autoencoder, again in every call; in a loop, fit it once and pass it.

        Returns:
            B RGB images.

        Raises:
            FloatingPointError: NaN or infinity in what an autoencoder decodes.
            TypeError: neither a step nor latents, or not a decoder.
            ValueError: latents of another number of channels.
        """
        latents = step_or_latents
        if isinstance(latents, Step):
            latents = latents.latents if latents.denoised is None else latents.denoised
        if decoder is not None and decoder is not self.vae:
            return preview_pictures(latents, decoder)
        vae, device = self._at_work("vae"), self._execution_device
        return preview_pictures(latents, LatentToRGB.fit(vae, device) if decoder is None else vae, device)

    def _watch(
        self, preview: Callable[[int, list[Image.Image]], Any] | None, preview_steps: object, decoder: Any
    ) -> Callable[[Step], None]:
        """Return what shows every so many steps to a callback; the decoder is fitted once, when it is needed first.

        Raises:
            TypeError: not a callback, not a number, or not a decoder.
            ValueError: no step at all, or a decoder or number of steps without a callback.
        """
        for name, value in (("preview_steps", preview_steps), ("preview_decoder", decoder)):
            if value is not None and preview is None:
                raise ValueError(f"{name} needs preview, the function that gets the pictures")
        if preview is None:
            return lambda step: None
        if not callable(preview):
            raise TypeError(f"preview must be a function of an index and pictures, got {show(preview)}")
        every = PREVIEW_STEPS if preview_steps is None else check_number("preview_steps", preview_steps, 1, whole=True)
        if decoder is not None and not isinstance(decoder, LatentToRGB):
            _config(decoder)
        fitted: list[Any] = [] if decoder is None else [decoder]

        def watch(step: Step) -> None:
            if (step.index + 1) % every == 0:
                if not fitted:
                    fitted.append(LatentToRGB.fit(self._at_work("vae"), self._execution_device))
                preview(step.index, self.preview(step, fitted[0]))

        return watch
