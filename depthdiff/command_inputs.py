"""What the command reads: photo, depth map and mask, brought to the size that is asked for."""

from __future__ import annotations

import argparse
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from depthdiff.call_options import NAMES, CallOptions
from depthdiff.checkpoint.hub import BUNDLED, bundled, read_json
from depthdiff.command_checks import FILES, shortcuts, split_option
from depthdiff.depth_files import read_depth_file
from depthdiff.depth_maps import disparity_ends, read_disparity
from depthdiff.image import read_images
from depthdiff.masks import read_mask
from depthdiff.picture_files import open_image
from depthdiff.sizes import Fit, wanted_size


@dataclass(frozen=True)
class Inputs:
    """What the files of a command hold.

    Attributes:
        photo: to start from; None where only a depth map is given.
        depth_map: (1, H, W), disparity; None where it is to be estimated.
        mask: (1, H, W), 1 is repainted; None repaints all.
        wanted: height and width of the pictures without a photo; those of the depth map if None.
    """

    photo: Image.Image | None
    depth_map: Tensor | None
    mask: Tensor | None
    wanted: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the photo, or of the depth map."""
        if self.photo is not None:
            return self.photo.height, self.photo.width
        assert self.depth_map is not None
        return self.depth_map.shape[1], self.depth_map.shape[2]


def read_inputs(options: argparse.Namespace) -> Inputs:
    """Read the files, and refuse options that do not fit them.

    Raises:
        ValueError: a damaged file, or options that do not fit each other.
    """
    photo: Any = None
    depth_map = mask = None
    if options.image is not None:
        photo = read_images(open_image(options.image, "image"))[0]
    if options.depth is not None:
        given = read_depth_file(options.depth, "--depth")
        depth_map = read_disparity(given, options.depth_invert, options.depth_range, "--depth")
    if options.mask is not None:
        mask = read_mask(open_image(options.mask, "--mask"), "--mask")
    try:
        chosen = CallOptions(
            **options_of_call(options),
            resize_mode=options.resize_mode,
            depth_keep_aspect=options.depth_keep_aspect,
            height=options.height,
            width=options.width,
            mask_image=mask,
        )
        chosen.check(photo, depth_map, options.strength, True, factor_of(options.model), shortcuts(options).deep_cache)
    except ValueError as error:
        raise ValueError(in_command_line(str(error))) from error
    return Inputs(photo, depth_map, mask)


def in_command_line(text: str) -> str:
    """Write the options of a call in an error as those of the command."""
    text = text.replace("mask_image", "mask").replace("depth_map", "depth").replace('start="noise"', "start noise")
    names = "|".join((*NAMES, "mask", "depth"))
    return re.sub(rf"\b({names})\b", lambda found: f"--{found[0].replace('_', '-')}", text)


def factor_of(model: str | None) -> int:
    """Return how many pixels a latent stands for, as far as a folder says so before it is loaded; else 1."""
    config = (bundled() if model in (None, BUNDLED) else Path(model)) / "vae" / "config.json"
    widths = read_json(config).get("block_out_channels") if config.is_file() else None
    return 2 ** (len(widths) - 1) if isinstance(widths, list) and widths else 1


def options_of_call(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the pipeline is to do beside what the command does itself: reading, sizes and masks."""
    ends = disparity_ends(options.depth_invert, options.depth_range)
    return {
        "start": options.start,
        "mask_blur": options.mask_blur,
        "mask_content": options.mask_content,
        "depth_range": None if ends is None else ends[::-1],  # of disparities, which the command makes of what it reads
        "prompt_syntax": options.prompt_syntax,
        "seamless": options.seamless,
        "windows": options.windows,
        "guidance_rescale": options.guidance_rescale,
    }


def fit_inputs(inputs: Inputs, options: argparse.Namespace, pipe: Any) -> tuple[Inputs, str | None]:
    """Bring what was read to the size that is asked for, and say what was done.

    Without any, what is far too large for the bundled model comes to what that knows. Other models are left alone: the
    published one's config says 256 pixels, and was trained on 512.
    """
    own, factor = inputs.size, pipe.vae_scale_factor
    for name in ("height", "width"):
        if (getattr(options, name) or 0) % factor:
            raise ValueError(f"--{name} must be a multiple of {factor} with this model, got {getattr(options, name)}")
    if options.height is not None or options.width is not None:
        fit = Fit(own, wanted_size(options.height, options.width, own, factor), options.resize_mode or "crop")
    else:
        size, trained = options.size, pipe.unet.config.sample_size
        if size is None and pipe.name_or_path == BUNDLED and isinstance(trained, int):
            size = trained * factor if min(own) > 1.5 * trained * factor else None
        if size is None or size == min(own):
            return inputs, None
        height, width = (round(side * size / min(own)) for side in own)
        fit = Fit(own, (height, width), "stretch")
    photo, depth_map, mask, wanted = inputs.photo, inputs.depth_map, inputs.mask, None
    if photo is None:
        wanted = wanted_size(None, None, fit.wanted, factor)
    else:
        photo = fit.images([photo])[0]  # type: ignore[assignment]
    depth_map, mask = (None if maps is None else fit.maps(maps) for maps in (depth_map, mask))
    what = "depth map" if photo is None else "photo"
    said = fit.text() if options.size is None and options.resize_mode else fit.text().replace(": stretched", "")
    return Inputs(photo, depth_map, mask, wanted), f"{what} resized from {said}"


def checksums(options: argparse.Namespace) -> dict[str, str]:
    """Return the SHA-256 of each file that a picture depends on, but for the model's: name of the option -> sum."""
    files = {name: getattr(options, name) for name in FILES}
    for name in ("lora", "embedding"):
        files |= {f"{name} {i}": Path(split_option(text)[0]) for i, text in enumerate(getattr(options, name), 1)}
    return {name: checksum(path) for name, path in files.items() if path is not None and path.is_file()}


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
