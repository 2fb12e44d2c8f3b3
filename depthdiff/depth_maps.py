"""Depth in the conventions of those who make it: disparity or distance, near large or far large, with or without a sky.

Letters: N maps, H and W of a map, C channels.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from depthdiff.checks import brief, check_dense, check_number, plain, show
from depthdiff.image import one_map, read_maps

logger = logging.getLogger(__name__)

Invert: TypeAlias = "bool | Literal['flip']"
Range: TypeAlias = "tuple[float, float] | None"

NORMALIZE = ("each", "batch")
"""What of several maps becomes -1 and 1: the extremes of each, or those of them all."""

LEAST = 1e-37
"""The least distance: of a smaller one, the disparity would be no number of float32."""


def read_disparity(
    depth_map: Any, invert: Invert = False, depth_range: Range = None, name: str = "depth_map"
) -> Tensor:
    """Convert depth of any convention to disparity: finite, near is large.

    Holes: NaN, and the infinity at the far end (minus infinity in disparities, plus infinity in distances), are the
    sky. They become as far as the farthest finite value of their map, or as the far end of `depth_range`. A warning
    says what share this was.

    Args:
        depth_map: one map or several, in any form of `depthdiff.image.read_maps`.
        invert: False for disparities, near is large, in any unit. True for distances such as metric depth or Blender's
            Z pass, far is large and 0 is at the camera: the disparity is 1 / distance. "flip" for a picture in which
            white is far: the values are negated, which keeps their spacing.
        depth_range: (near, far) in the map's own unit, before inversion; what is nearer counts as near, what is farther
            as far.
        name: of the argument, for messages.

    Returns:
        (N, H, W), float32.

    Raises:
        TypeError: not a map, mixed kinds, not numbers, or an option of a wrong type.
        ValueError: a bad map (see `read_maps`) or option (see `check_depth_options`), distances that are not positive,
            an infinity at the near end, or a map without any finite value.
    """
    invert, depth_range, _ = check_depth_options(invert, depth_range)
    maps = _fill(read_maps(depth_map, name), invert, depth_range, name)
    if invert is True and not (lowest := float(maps.min())) >= LEAST:
        raise ValueError(
            f"{name} must hold distances above 0 where it is inverted, got {lowest:g}; mark unknown ones by NaN, or "
            'use invert="flip" for a picture in which white is far'
        )
    if depth_range is not None:
        maps = maps.clamp(min(depth_range), max(depth_range))
    if invert is True:
        return 1 / maps
    return -maps if invert == "flip" else maps


def disparity_ends(invert: Invert, depth_range: Range) -> Range:
    """Return the disparities (far, near) that become -1 and 1, so that the frames of a film share one scale.

    Args:
        invert: as in `read_disparity`.
        depth_range: as in `read_disparity`; without it the answer is None, and each map has its own scale.

    Raises:
        TypeError: an option of a wrong type.
        ValueError: a bad option; see `check_depth_options`.
    """
    invert, depth_range, _ = check_depth_options(invert, depth_range)
    if depth_range is None:
        return None
    near, far = depth_range
    if invert is True:
        return 1 / far, 1 / near
    return (-far, -near) if invert == "flip" else (far, near)


def check_depth_options(
    invert: object = False, depth_range: object = None, normalize: object = "each"
) -> tuple[Invert, Range, str]:
    """Return the options of depth as Python's own, before any work.

    Args:
        invert: see `read_disparity`.
        depth_range: see `read_disparity`.
        normalize: "each" stretches each map by its own extremes, "batch" all by those of them all.

    Raises:
        TypeError: an option of a wrong type.
        ValueError: an unknown choice, ends in the wrong order or no distances, or a range together with "batch".
    """
    invert = plain(invert)
    if not isinstance(invert, (bool, str)):
        raise TypeError(f'depth_invert must be False, True (distances) or "flip" (white is far), got {show(invert)}')
    if invert not in (False, True, "flip"):
        raise ValueError(f'depth_invert must be False, True (distances) or "flip" (white is far), got {brief(invert)}')
    if not isinstance(normalize, str) or normalize not in NORMALIZE:
        raise ValueError(f"depth_normalize must be one of {', '.join(NORMALIZE)}, got {brief(normalize)}")
    if depth_range is None:
        return invert, None, normalize  # type: ignore[return-value]
    near, far = _range(depth_range)
    if normalize == "batch":
        raise ValueError('depth_range fixes the scale already, so that depth_normalize="batch" must be left out')
    if invert is True and not min(near, far) >= LEAST:
        raise ValueError(
            f"depth_range must be distances above 0, which are inverted, got {near:g} and {far:g}; "
            'depth_invert="flip" takes any numbers'
        )
    if near == far or (near < far) is not bool(invert):
        order = "near below far with depth_invert" if invert else "near above far, since near is large in disparities"
        hint = "swap them" if invert or near == far else "swap them, or use depth_invert=True for distances"
        raise ValueError(f"depth_range must be (near, far), {order}, got {near:g} and {far:g}; {hint}")
    return invert, (near, far), normalize  # type: ignore[return-value]


def depth_preview(disparity: Any) -> Image.Image:
    """Paint one map (H, W) in colours whose lightness rises from black (far) to white (near); a constant one is black.

    Args:
        disparity: in any form of `depthdiff.image.read_depth`.

    Returns:
        An RGB image.

    Raises:
        TypeError: not a map.
        ValueError: a bad map, or several.

    Source: D. A. Green, "A colour scheme for the display of astronomical intensity images", Bulletin of the
        Astronomical Society of India 39 (2011), sec. 2 (cubehelix): start 0.5, rotations -1.5, hue and gamma 1.
    """
    values = one_map(disparity).astype(np.float64)
    values -= values.min()
    grey = values / (values.max() or 1)
    angle = 2 * math.pi * (0.5 / 3 + 1 - 1.5 * grey)
    amplitude = grey * (1 - grey) / 2
    turn = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    to_rgb = np.array([[-0.14861, 1.78277], [-0.29227, -0.90649], [1.97294, 0.0]])
    colours = grey[..., None] + amplitude[..., None] * (turn @ to_rgb.T)
    return Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))


def _range(depth_range: object) -> tuple[float, float]:
    """Read two numbers that differ as float32 does, where they differ at all."""
    if isinstance(depth_range, Tensor):
        check_dense("depth_range", depth_range)
    values = depth_range.tolist() if isinstance(depth_range, (np.ndarray, Tensor)) else depth_range
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        found = f"{len(values)} values" if isinstance(values, (tuple, list)) else show(depth_range)
        raise TypeError(f"depth_range must be two numbers (near, far), got {found}")
    limit = float(np.finfo(np.float32).max) / 4  # so that the extent is a number of float32 as well
    ends = (
        check_number(f"{which} of depth_range", end, -limit, limit)
        for which, end in zip(("near", "far"), values, strict=True)
    )
    near, far = (float(np.float32(end)) for end in ends)
    return near, far


def _fill(maps: Tensor, invert: Invert, depth_range: Range, name: str) -> Tensor:
    """Make the sky as far as the farthest finite value of its map, or as the far end of the range."""
    finite = maps.isfinite()
    if finite.all():
        return maps
    near_end = math.inf if not invert else -math.inf
    if (maps == near_end).any():
        others = "is it distances, for invert=True?" if not invert else "is near large in it, for invert=False?"
        raise ValueError(
            f"{name} must be finite in float32 at its near end, got {'' if not invert else 'minus '}infinity; {others}"
        )
    if not finite.flatten(1).any(dim=1).all():
        raise ValueError(f"{name} must hold finite values, got a map of NaN and infinity alone")
    if depth_range is not None:
        far = maps.new_full((len(maps), 1, 1), depth_range[1])
    elif invert:
        far = maps.where(finite, maps.new_tensor(-math.inf)).amax(dim=(1, 2), keepdim=True)
    else:
        far = maps.where(finite, maps.new_tensor(math.inf)).amin(dim=(1, 2), keepdim=True)
    share = 100 * (1 - float(finite.float().mean()))
    logger.warning("%s: %.3g %% of the values are unknown (NaN or infinite) and count as farthest", name, share)
    return maps.where(finite, far)
