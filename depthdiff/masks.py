"""Keep a part of the image: outside a mask the picture is the image, inside it is repainted.

At every step the kept latents are those of the image, as noisy as that step's (arXiv:2206.02779, sec. 4.1), and in the
end its pixels are pasted back.

Letters: N masks, B pictures, H, W pixels, h, w latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from depthdiff.decoding import DEEP
from depthdiff.image import SLACK, ImageInput, read_depth

BLUR = 4.0
"""Deviation of the feather in pixels where none is asked for."""
REACH = 3
"""Deviations at which the feather ends."""


def read_mask(mask_image: ImageInput, name: str = "mask_image") -> Tensor:
    """Convert any accepted mask to one form: 1 is repainted, 0 is kept.

    PIL images of every mode, by their luminance; arrays and tensors (H, W), (N, H, W), (H, W, 1), (N, 1, H, W) or
    (N, H, W, 1), or a list of these with one size. Bools, integers of 8 or 16 bits up to their maximum, or floats in
    [0, 1].

    Args:
        mask_image: one mask or several.
        name: of the argument, for messages.

    Returns:
        (N, H, W), float32, in [0, 1].

    Raises:
        TypeError: not a mask, mixed kinds, or a dtype that no range belongs to.
        ValueError: empty, of a wrong shape, of different sizes, out of range, or not finite.
    """
    values = read_depth(mask_image, name)
    if isinstance(mask_image, (list, tuple)):
        return torch.cat([read_mask(one, name) for one in mask_image])
    mask = values / _white(mask_image, float(values.max()), name)
    low, high = (float(end) for end in mask.aminmax())
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(f"{name} must be in [0, 1], got {low:g} to {high:g}; divide by its white, or use uint8")
    return mask.clamp(0, 1)


def _white(mask: Any, top: float, name: str) -> float:
    """Return the number that is white in a mask whose largest is `top`."""
    if isinstance(mask, Image.Image):
        return next((white for white in DEEP.get(mask.mode, (255,)) if top <= white), 1)
    dtype = mask.dtype.name if isinstance(mask, np.ndarray) else str(mask.dtype)[6:]
    if dtype == "bool" or "float" in dtype:
        return 1
    if dtype not in ("uint8", "uint16"):
        raise TypeError(f"{name} must be bool, uint8 (0..255), uint16 or float in [0, 1], got {dtype}; convert it")
    return 255 if dtype == "uint8" else 65535


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Return which latents (N, 1, h, w) are repainted: 1 where any pixel of (N, 1, H, W) is at least half white."""
    return F.max_pool2d((mask >= 0.5).to(mask.dtype), factor)


def feather(mask: Tensor, blur: float) -> Tensor:
    """Blur masks (N, 1, H, W) by a Gaussian of this deviation in pixels, which ends at three times that."""
    reach = math.ceil(REACH * blur)
    if not reach:
        return mask
    places = torch.arange(-reach, reach + 1, dtype=mask.dtype, device=mask.device)
    kernel = torch.exp(-(places**2) / (2 * blur**2)) * (places.abs() <= REACH * blur)
    kernel = kernel / kernel.sum()
    wide = F.pad(mask, (reach,) * 4, mode="replicate")
    rows = F.conv2d(wide, kernel.view(1, 1, 1, -1))
    blurred = F.conv2d(rows, kernel.view(1, 1, -1, 1)).clamp(0, 1)
    return torch.where(blurred > 1 - 1e-6, 1.0, blurred)  # white, but for rounding


@dataclass
class Kept:
    """What a run keeps of its image.

    Attributes:
        mask: (B, 1, h, w), 1 where latents are repainted.
        clean: (B, 4, h, w), latents of the image.
        noise: (B, 4, h, w), unit normal, by which they are made noisy.
        pixels: (B, 3, H, W) in [-1, 1], float32, the image.
        share: (B, 1, H, W), float32, how much of a pixel is repainted.
        sharp: (B, 1, H, W), float32, the mask without its feather.
        blur: deviation of the feather in pixels.
    """

    mask: Tensor
    clean: Tensor
    noise: Tensor
    pixels: Tensor
    share: Tensor
    sharp: Tensor
    blur: float

    def put_back(self, latents: Tensor, kept: Tensor) -> Tensor:
        """Take the latents (B, 4, h, w) where they are repainted, and the kept ones elsewhere."""
        return torch.where(self.mask.to(latents.device) > 0, latents, kept.to(latents))

    def paste(self, pixels: Tensor) -> Tensor:
        """Paste the image into decoded pixels (B, 3, H, W), in float32: exactly where nothing is repainted."""
        share, own = self.share.to(pixels.device), self.pixels.to(pixels.device)
        return torch.where(share < 1, torch.where(share > 0, own + share * (pixels.float() - own), own), pixels.float())


def keep(mask: Tensor, pixels: Tensor, clean: Tensor, noise: Tensor, blur: float, factor: int) -> Kept:
    """Prepare what a run keeps of its image.

    Args:
        mask: (N, 1, H, W), 1 is repainted.
        pixels: (N, 3, H, W) in [-1, 1], the image.
        clean: (B, 4, h, w), its latents.
        noise: (B, 4, h, w), unit normal.
        blur: deviation of the feather in pixels.
        factor: pixels that a latent stands for.
    """
    mask, pixels = (x.to(clean.device, torch.float32) for x in (mask, pixels))
    mask, pixels = (x.repeat_interleave(len(clean) // len(x), dim=0) for x in (mask, pixels))
    return Kept(latent_mask(mask, factor), clean, noise, pixels, feather(mask, blur), mask, blur)
