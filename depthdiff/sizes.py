"""Bring images, and what belongs to them, to the size that is asked for: cropped, padded or stretched.

Letters: N images, H and W of what is given, h and w of what is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MODES = ("crop", "pad", "stretch")
MOST_PIXELS = 2**28
"""Of an image that is padded before it is resized."""


def wanted_size(height: int | None, width: int | None, own: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return the height and width of the pictures, in pixels.

    Args:
        height: asked for; None follows from `width` and the aspect of `own`.
        width: asked for; None follows from `height` and the aspect of `own`.
        own: (H, W) of the image or depth map, which counts rounded down to multiples where both are None.
        factor: of which both are multiples.
    """
    if height is None and width is None:
        return own[0] - own[0] % factor, own[1] - own[1] % factor
    if height is None:
        height = factor * max(1, round(width * own[0] / own[1] / factor))  # type: ignore[operator]
    elif width is None:
        width = factor * max(1, round(height * own[1] / own[0] / factor))
    return height, width  # type: ignore[return-value]


@dataclass(frozen=True)
class Fit:
    """How an image comes to another size; maps of any resolution that belong to it are treated alike.

    Attributes:
        own: (H, W) of the image.
        wanted: (h, w).
        mode: one of `MODES`.
    """

    own: tuple[int, int]
    wanted: tuple[int, int]
    mode: str = "crop"

    def margins(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return how many rows to add above and below, and columns left and right, to a map; negative to cut off."""
        (own_h, own_w), (h, w) = self.own, self.wanted
        if self.mode == "stretch":
            return (0, 0), (0, 0)
        too_wide = own_w * h > own_h * w
        if (self.mode == "crop") == too_wide:  # the width changes
            more = max(round(width * (own_h * w / (own_w * h) - 1)), 1 - width)
            return (0, 0), (_half(more), more - _half(more))
        more = max(round(height * (own_w * h / (own_h * w) - 1)), 1 - height)
        return (_half(more), more - _half(more)), (0, 0)

    def images(self, images: list[Image.Image] | Tensor) -> list[Image.Image] | Tensor:
        """Fit what `depthdiff.image.read_images` returns: N images of one size; Lanczos, or bicubic for tensors."""
        h, w = self.wanted
        if isinstance(images, Tensor):
            fitted = self.maps(images)
            if fitted.shape[2:] == (h, w):
                return fitted
            return F.interpolate(fitted, size=(h, w), mode="bicubic", antialias=True).clamp(0, 1)
        arrays = [torch.from_numpy(np.array(image)).movedim(2, 0) for image in images]
        padded = [Image.fromarray(np.ascontiguousarray(self.maps(one[None])[0].movedim(0, 2))) for one in arrays]
        return [image if image.size == (w, h) else image.resize((w, h), Image.Resampling.LANCZOS) for image in padded]

    def maps(self, maps: Tensor) -> Tensor:
        """Crop or pad maps (..., H', W') to the aspect that is asked for; their resolution stays."""
        height, width = maps.shape[-2:]
        (top, bottom), (left, right) = self.margins(height, width)
        pixels = (height + top + bottom) * (width + left + right)
        if pixels > MOST_PIXELS:
            own, wanted = f"{self.own[1]}x{self.own[0]}", f"{self.wanted[1]}x{self.wanted[0]}"
            raise ValueError(
                f"resize_mode must be crop or stretch from {own} to {wanted}: padded it has {pixels:,} pixels"
            )
        maps = maps[..., max(-top, 0) : height - max(-bottom, 0), max(-left, 0) : width - max(-right, 0)]
        rows = torch.arange(-max(top, 0), maps.shape[-2] + max(bottom, 0), device=maps.device)
        columns = torch.arange(-max(left, 0), maps.shape[-1] + max(right, 0), device=maps.device)
        return maps[..., rows.clamp(0, maps.shape[-2] - 1), :][..., columns.clamp(0, maps.shape[-1] - 1)]

    def text(self) -> str:
        """Say in a line what is done."""
        (own_h, own_w), (h, w) = self.own, self.wanted
        (top, bottom), (left, right) = self.margins(own_h, own_w)
        done: list[str] = []
        for word, sign in (("cropped", -1), ("padded", 1)):
            sides = {"top": top, "bottom": bottom, "left": left, "right": right}
            named = [f"{side} {abs(count)}" for side, count in sides.items() if count * sign > 0]
            if named:
                done.append(f"{word} by {', '.join(named)}")
        if self.mode == "stretch" and own_w * h != own_h * w:
            done.append("stretched")
        return f"{own_w}x{own_h} to {w}x{h}{': ' if done else ''}{', '.join(done)}"


def resize_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """Resize maps (N, C, H, W) linearly, smoothed where they become smaller."""
    if maps.shape[2:] == (height, width):
        return maps
    return F.interpolate(maps, size=(height, width), mode="bilinear", antialias=True)


def enlarge(images: Tensor, height: int, width: int) -> Tensor:
    """Enlarge pixels (N, 3, H, W) in [-1, 1] by bicubic interpolation."""
    return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True).clamp(-1, 1)


def _half(count: int) -> int:
    return int(count / 2)
