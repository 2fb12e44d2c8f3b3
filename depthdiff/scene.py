"""What a call starts from: image, depth map and mask, read, checked and brought to one size.

Letters: N of a kind, H and W of the pictures in pixels, h and w of their latents.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from depthdiff.call_options import CallOptions
from depthdiff.depth_maps import read_disparity
from depthdiff.image import ImageInput, image_size, is_latents, read_maps
from depthdiff.inputs import paired, read_start
from depthdiff.masks import BLUR, read_mask
from depthdiff.sizes import Fit, resize_maps, wanted_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Scene:
    """What a run starts from.

    Attributes:
        image: as it was given where nothing had to be fitted, else as `depthdiff.image.read_images` returns it; None
            where the run starts from noise under a depth map alone.
        depth_map: as it was given where nothing had to be done to it, else disparity (N, H', W'); None where it is to
            be estimated.
        mask: (N, 1, H, W), 1 is repainted; None repaints all.
        size: (H, W).
        blur: deviation of the mask's feather in pixels.
        noisy_content: whether what is repainted starts from noise.
        pure_noise: whether everything does.
        axes: along which the pictures repeat.
        windows: (size, stride) in latents.
        counts: how many there are of each kind.
    """

    image: ImageInput | None
    depth_map: Any
    mask: Tensor | None
    size: tuple[int, int]
    blur: float = BLUR
    noisy_content: bool = False
    pure_noise: bool = False
    axes: str = ""
    windows: tuple[int, int] | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def paired(self, pictures: int) -> Scene:
        """Repeat what there is less of, until there is one of each kind for each picture, or one for all."""
        image, depth_map, mask = (
            paired(getattr(self, name), self.counts.get(key), pictures)
            for name, key in (("image", "image"), ("depth_map", "depth_map"), ("mask", "mask_image"))
        )
        return replace(self, image=image, depth_map=depth_map, mask=mask)


def read_scene(image: ImageInput | None, depth_map: Any, options: CallOptions, factor: int) -> Scene:
    """Read what a call starts from.

    Args:
        image: see `StableDiffusionDepth2ImgPipeline.__call__`.
        depth_map: see there.
        options: of the call.
        factor: pixels that a latent stands for, in height and in width.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: empty, too small, of a wrong shape or range.
    """
    start = None if image is None and depth_map is not None else read_start(image, depth_map, factor)
    disparity = None
    counts = {} if start is None else {"image": len(start)}
    if depth_map is not None:
        disparity = read_disparity(depth_map, options.depth_invert, options.depth_range)
        counts["depth_map"] = len(disparity)
    fit = None
    if is_latents(image):
        size = start.shape[2] * factor, start.shape[3] * factor  # type: ignore[union-attr]
    else:
        own = tuple(disparity.shape[1:]) if start is None else image_size(start)  # type: ignore[union-attr]
        size = wanted_size(options.height, options.width, own, factor)
        if min(size) < factor:
            raise ValueError(f"`depth_map` must be at least {factor}x{factor}, got {own[0]}x{own[1]}; pass height")
        if options.height is not None or options.width is not None:
            fit = Fit(own, size, options.resize_mode or "crop")
            logger.info("%s: %s", "depth map" if start is None else "image", fit.text())
    if disparity is not None and fit is None and not options.reads_depth and read_maps(depth_map).isfinite().all():
        disparity = depth_map  # for those who override `prepare_depth_map`
    if fit is not None:
        image = None if start is None else fit.images(start)
        disparity = None if disparity is None else fit.maps(disparity)
    mask = None
    if options.mask_image is not None:
        mask = read_mask(options.mask_image)
        counts["mask_image"] = len(mask)
        mask = resize_maps((mask if fit is None else fit.maps(mask))[:, None], *size)
        if not bool((mask >= 0.5).any()):
            raise ValueError("mask_image must be white where the image is to be repainted, got one that is black")
    return Scene(
        image,
        disparity,
        mask,
        size,
        blur=BLUR if options.mask_blur is None else options.mask_blur,
        noisy_content=options.mask_content == "noise",
        pure_noise=start is None or options.start == "noise",
        axes=options.axes,
        windows=options.windows_of_latents(factor),
        counts=counts,
    )
