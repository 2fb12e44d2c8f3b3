"""Depth estimators other than the checkpoint's: what their image processors and their results need.

Letters: N images, H and W of a map.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from depthdiff.checks import show
from depthdiff.image import read_maps
from depthdiff.image_processor import DPTImageProcessor

MULTIPLE = 32
"""Pixels that both sides are multiples of where the aspect is kept, unless the processor asks for others."""

RESULT = "what depth_estimator returns"


def call_function(function: Callable[[Image.Image], Any], images: list[Image.Image]) -> Tensor:
    """Ask a plain function for the depth of each image.

    Args:
        function: RGB image -> one map, in any form of `depthdiff.image.read_maps`.
        images: N, RGB.

    Returns:
        (N, H, W), float32, the function's numbers as they are.

    Raises:
        TypeError: the function returns no map.
        ValueError: a bad map, several for one image, or maps of different sizes.
    """
    maps = [read_maps(function(image), RESULT) for image in images]
    several = next((len(one) for one in maps if len(one) != 1), None)
    if several is not None:
        raise ValueError(f"{RESULT} must be one map (H, W) for one image, got {several} maps")
    sizes = {tuple(one.shape[1:]) for one in maps}
    if len(sizes) > 1:
        raise ValueError(f"{RESULT} must be of one size for images of one size, got {sorted(sizes)}; resize them")
    return torch.cat([one.to(maps[0].device) for one in maps])


def keeping_aspect(processor: Any) -> Any:
    """Return an image processor that keeps the aspect; the given one stays as it is.

    Both sides are scaled by one factor: of the two that bring a side to the processor's size, the one nearer to 1.
    Then each is rounded to a multiple of 32, or of what the processor asks for.

    Raises:
        TypeError: the processor cannot do it.

    Source: Stability-AI/stablediffusion, ldm/modules/midas/api.py, `load_midas_transform`, with
        isl-org/MiDaS, midas/transforms.py, `Resize`, method "minimal".
    """
    own = processor.config if isinstance(processor, DPTImageProcessor) else processor
    names = "keep_aspect_ratio", "ensure_multiple_of"
    lacks = ", ".join(name for name in names if not hasattr(own, name))
    if lacks:
        raise TypeError(
            f"feature_extractor must be able to keep the aspect for keep_aspect=True, got {show(processor)} without "
            f"{lacks}; leave keep_aspect out"
        )
    multiple = own.ensure_multiple_of if own.ensure_multiple_of > 1 else MULTIPLE
    changes = {"do_resize": True, "keep_aspect_ratio": True, "ensure_multiple_of": multiple}
    if isinstance(processor, DPTImageProcessor):
        return type(processor).from_config({**processor.config.to_dict(), **changes})
    return partial(processor, **changes)


def cut_padding(processor: Any, predicted: Tensor, height: int, width: int) -> Tensor:
    """Cut off the border that ZoeDepth's image processor adds around the images.

    Args:
        processor: that prepared the images.
        predicted: (N, H', W') for the images, padded or not.
        height: of the images before.
        width: of the images before.

    Returns:
        (N, height, width), float32, without values beyond those predicted, to which bicubic resizing would come near
        edges (a distance below 0, say); or `predicted` itself where nothing was added.

    Raises:
        TypeError: a processor that pads in another way.

    Source: isl-org/ZoeDepth, zoedepth/models/depth_model.py, `_infer_with_pad_aug`: 3 sqrt(side / 2) pixels a side.
    """
    if not getattr(processor, "do_pad", False):
        return predicted
    post_process = getattr(processor, "post_process_depth_estimation", None)
    if post_process is None or "source_sizes" not in inspect.signature(post_process).parameters:
        raise TypeError(
            f"feature_extractor must not pad, unless it is ZoeDepth's, got {show(processor)}; set its do_pad to False"
        )
    top, left = (int(math.sqrt(side / 2) * 3) for side in (height, width))
    size = height + 2 * top, width + 2 * left
    padded = F.interpolate(predicted.float()[:, None], size=size, mode="bicubic", align_corners=False)[:, 0]
    low, high = predicted.float().amin(dim=(1, 2), keepdim=True), predicted.float().amax(dim=(1, 2), keepdim=True)
    return padded[:, top : top + height, left : left + width].clamp(low, high)
