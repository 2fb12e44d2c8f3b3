"""Images and depth maps in and out: PIL, arrays and tensors outside, tensors of fixed shape and range inside.

Letters: N images, C channels, H and W of an image, h and w rounded down to the multiple that the autoencoder needs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from depthdiff.checks import brief, check_dense
from depthdiff.decoding import to_grey, to_rgb

logger = logging.getLogger(__name__)

Array: TypeAlias = "np.ndarray[Any, Any]"
ImageInput: TypeAlias = "Image.Image | Array | Tensor | Sequence[Image.Image] | Sequence[Array] | Sequence[Tensor]"

OUTPUT_TYPES = ("pil", "np", "pt")
REAL = ("bool", "uint", "int", "float8_", "float16", "bfloat16", "float32", "float64")
"""The beginnings of the names of torch's real dtypes."""

WHITE = {"uint8": 255, "uint16": 65535}
SLACK = 1e-3  # by which float images may exceed their range, since resampling can overshoot


def read_images(image: ImageInput, name: str = "image") -> list[Image.Image] | Tensor:
    """Convert any accepted image to one of two forms; nothing is resized.

    PIL images of every mode become RGB, turned as their EXIF tag says; transparency is dropped, not blended; 16-bit
    values are scaled to 8 bits (modes I and F: from 0..1 for floats, 0..255 or 0..65535, whichever holds the maximum).

    Arrays and tensors: (H, W), (C, H, W), (H, W, C), (N, C, H, W), (N, H, W, C), or a list of these with one size; C is
    1 or 3. If both ends could be C, a tensor has channels first and an array has them last. uint8 and uint16 count from
    0 to their maximum; floats are in [0, 1], or in [-1, 1] if any value of the batch is below 0.

    Args:
        image: one image or several.
        name: of the argument, for messages.

    Returns:
        A list of N RGB images of one size, or (N, 3, H, W), float32, in [0, 1].

    Raises:
        TypeError: not an image, mixed kinds, or a dtype that no range belongs to.
        ValueError: empty, of a wrong shape, of different sizes, out of range, or not finite.
    """
    items = _items(image, name)
    if isinstance(items[0], Image.Image):
        images = [to_rgb(item, name) for item in items]
        _check_one_size([(item.height, item.width) for item in images], name)
        return images
    _check_one_device(items, name)
    dtypes = {item.dtype.name if isinstance(item, np.ndarray) else str(item.dtype)[6:] for item in items}
    if len(dtypes) > 1 or dtypes - {*WHITE, "float16", "bfloat16", "float32", "float64"}:
        found = " and ".join(sorted(dtypes))
        raise TypeError(f"{name} must be uint8 (0..255), uint16 or float in [0, 1], got {found}; convert it")
    batches = [_to_nchw(item, name) for item in items]
    _check_one_size([(batch.shape[2], batch.shape[3]) for batch in batches], name)
    pixels, dtype = torch.cat(batches), dtypes.pop()
    if dtype in WHITE:
        return pixels / WHITE[dtype]
    low, high = (float(value) for value in pixels.aminmax())
    if not np.isfinite(high - low):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if low < -1 - SLACK or high > 1 + SLACK:
        raise ValueError(f"{name} must be in [0, 1] or [-1, 1], got {low:g} to {high:g}; divide by 255 or use uint8")
    if low < 0:
        logger.warning("%s has values below 0, down to %g: taken as [-1, 1], not [0, 1]", name, low)
        return (pixels + 1) / 2
    return pixels


def is_latents(image: object) -> bool:
    """Return whether `image` is already encoded: a float tensor (N, 4, h, w), or a list of (4, h, w)."""
    if isinstance(image, (list, tuple)):
        return bool(image) and all(_has_latent_channels(one, 3) for one in image)
    return _has_latent_channels(image, 4)


def _has_latent_channels(x: object, ndim: int) -> bool:
    dense = isinstance(x, Tensor) and not x.is_nested and x.is_floating_point()
    return dense and x.ndim == ndim and x.shape[-3] == 4  # type: ignore[attr-defined]


def image_size(images: list[Image.Image] | Tensor) -> tuple[int, int]:
    """Return (H, W) of what `read_images` returned."""
    height, width = images.shape[2:] if isinstance(images, Tensor) else images[0].size[::-1]
    return height, width


def to_pixels(images: list[Image.Image] | Tensor, multiple_of: int = 8) -> Tensor:
    """Resize what `read_images` returned down to a multiple, and return (N, 3, h, w), float32, in [-1, 1].

    Source: huggingface/diffusers, image_processor.py, `preprocess`: Lanczos for PIL images, nearest for tensors.
    """
    height, width = image_size(images)
    h, w = height - height % multiple_of, width - width % multiple_of
    if not h or not w:
        raise ValueError(f"image must be at least {multiple_of}x{multiple_of} pixels, got {width}x{height}; enlarge it")
    if (h, w) != (height, width):
        logger.info("image resized from %dx%d to %dx%d, a multiple of %d", width, height, w, h, multiple_of)
    if isinstance(images, Tensor):
        return 2 * F.interpolate(images, size=(h, w)) - 1
    arrays = [np.asarray(image.resize((w, h), Image.Resampling.LANCZOS), dtype=np.float32) for image in images]
    return 2 * torch.from_numpy(np.stack(arrays) / np.float32(255)).movedim(3, 1) - 1


class VaeImageProcessor:
    """Images to pixels for the autoencoder, and back.

    Args:
        vae_scale_factor: height and width become multiples of it.
    """

    def __init__(self, vae_scale_factor: int = 8) -> None:
        self.vae_scale_factor = vae_scale_factor

    def preprocess(self, image: ImageInput) -> Tensor:
        """Convert images of any accepted form (see `read_images`) to pixels (N, 3, h, w), float32, in [-1, 1].

        Latents (N, 4, h, w), or a list of (4, h, w), are returned as one tensor.
        """
        if is_latents(image):
            return image if isinstance(image, Tensor) else torch.stack(list(image))  # type: ignore[arg-type]
        return to_pixels(read_images(image), self.vae_scale_factor)

    def postprocess(self, image: Tensor, output_type: str = "pil") -> Any:
        """Convert the autoencoder's output (N, 3, H, W) to images; "latent" returns it as it is."""
        return image if output_type == "latent" else from_pixels(image, output_type)


def to_pil(images: list[Image.Image] | Tensor) -> list[Image.Image]:
    """Convert what `read_images` returned to N RGB images of 8 bits."""
    if not isinstance(images, Tensor):
        return images
    arrays = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).detach().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def read_maps(depth_map: Any, name: str = "depth_map") -> Tensor:
    """Convert any accepted depth map to one form; the numbers stay as they are, NaN and infinity too.

    PIL images of 8 or 16 bits or floats keep their numbers; colour images are reduced to their luminance. Arrays and
    tensors: (H, W), (N, H, W), (H, W, 1), (N, 1, H, W), (N, H, W, 1), or a list of these with one size; any real dtype.

    Args:
        depth_map: one map or several.
        name: of the argument, for messages.

    Returns:
        (N, H, W), float32.

    Raises:
        TypeError: not a map, mixed kinds, or not numbers.
        ValueError: empty, of a wrong shape, or of different sizes.
    """
    items = _items(depth_map, name)
    _check_one_device(items, name)
    maps = [_to_nhw(to_grey(item, name) if isinstance(item, Image.Image) else item, name) for item in items]
    _check_one_size([(one.shape[1], one.shape[2]) for one in maps], name)
    return torch.cat(maps)


def read_depth(depth_map: Any, name: str = "depth_map") -> Tensor:
    """Convert any accepted depth map without holes to one form; larger is nearer, in any unit.

    Holes are the matter of `depthdiff.depth_maps.read_disparity`.

    Args:
        depth_map: one map or several, in any form of `read_maps`.
        name: of the argument, for messages.

    Returns:
        (N, H, W), float32.

    Raises:
        TypeError: not a map, mixed kinds, or not numbers.
        ValueError: empty, of a wrong shape, of different sizes, or not finite.
    """
    depth = read_maps(depth_map, name)
    if not depth.isfinite().all():
        raise ValueError(f"{name} must be finite in float32, got NaN or infinity; fill the holes, far is small")
    return depth


def from_pixels(pixels: Tensor, output_type: str = "pil") -> list[Image.Image] | Array | Tensor:
    """Convert pixels (N, 3, H, W) in [-1, 1], clamped, to N RGB images, or to an array or tensor in [0, 1].

    "np" returns (N, H, W, 3), float32; "pt" returns (N, 3, H, W), of the dtype and on the device of `pixels`.
    Source: huggingface/diffusers, image_processor.py, `VaeImageProcessor.postprocess`.
    """
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {brief(output_type)}")
    pixels = (pixels * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return pixels
    array: Array = pixels.detach().permute(0, 2, 3, 1).float().cpu().numpy()
    if output_type == "np":
        return array
    if np.isnan(array).any():
        logger.warning("the pictures hold NaN, shown black; half precision may have overflowed: use float32")
        array = np.nan_to_num(array)
    return [Image.fromarray(one) for one in (array * 255).round().astype(np.uint8)]


def one_map(disparity: Tensor) -> Array:
    """Return the numbers (H, W), float32, of one map in any form of `read_depth`."""
    maps = read_depth(disparity, "disparity").detach().cpu().numpy()
    if len(maps) > 1:
        raise ValueError(f"disparity must be one map, got {len(maps)}; pass them one at a time")
    return maps[0]


def depth_image(disparity: Tensor, bits: Literal[8, 16] = 16) -> Image.Image:
    """Convert a map (H, W) or (1, H, W) to a grey image from black (far) to white (near); a constant one is black."""
    values = one_map(disparity).astype(np.float64)
    values -= values.min()
    scaled = values / (values.max() or 1) * (2**bits - 1)
    return Image.fromarray(scaled.round().astype(np.uint16 if bits == 16 else np.uint8))


def contact_sheet(images: Sequence[Image.Image], labels: Sequence[str] = ()) -> Image.Image:
    """Paste images side by side on white, all as high as the first, with a label under each."""
    if not images or (labels and len(labels) != len(images)):
        raise ValueError(f"images must be some, and labels as many or none, got {len(images)} and {len(labels)}")
    tiles = [to_rgb(image, "images") for image in images]
    height, gap = tiles[0].height, 8
    tiles = [tile.resize((max(round(tile.width * height / tile.height), 1), height)) for tile in tiles]
    size = (gap + sum(tile.width + gap for tile in tiles), height + 2 * gap + (24 if labels else 0))
    sheet, left, font = Image.new("RGB", size, "white"), gap, ImageFont.load_default(16)
    for tile, label in zip(tiles, labels or [""] * len(tiles), strict=True):
        sheet.paste(tile, (left, gap))
        ImageDraw.Draw(sheet).text((left, height + gap + 4), label, fill="black", font=font)
        left += tile.width + gap
    return sheet


def _items(image: Any, name: str) -> list[Any]:
    """Return the images of one argument as a list of one kind."""
    items = list(image) if isinstance(image, (list, tuple)) else [image]
    if not items:
        raise ValueError(f"{name} must hold at least one image, got an empty {type(image).__name__}")
    for kind in (Image.Image, np.ndarray, Tensor):
        if all(isinstance(item, kind) for item in items):
            for item in items if kind is Tensor else ():
                check_dense(name, item)
            return items
    found = ", ".join(sorted({type(item).__name__ for item in items}))
    remedy = "open files with PIL.Image.open" if "str" in found or "Path" in found else "convert them to one kind"
    raise TypeError(f"{name} must be PIL images, arrays or tensors, or a list of one kind, got {found}; {remedy}")


def _check_one_size(sizes: list[tuple[int, int]], name: str) -> None:
    found = ", ".join(f"{w}x{h}" for h, w in dict.fromkeys(sizes))
    if not all(h and w for h, w in sizes):
        raise ValueError(f"{name} must have a height and a width, got {found}")
    if len(set(sizes)) > 1:
        raise ValueError(f"{name} must be of one size, got {found}; resize or crop them, or pass them one at a time")


def _check_one_device(items: list[Any], name: str) -> None:
    devices = {str(item.device) for item in items if isinstance(item, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"{name} must be on one device, got {' and '.join(sorted(devices))}; move them with .to")


def _to_tensor(item: Array | Tensor, name: str) -> Tensor:
    known = item.dtype.kind in "buif" if isinstance(item, np.ndarray) else str(item.dtype)[6:].startswith(REAL)
    if not known:
        raise TypeError(f"{name} must hold real numbers, got dtype {item.dtype}")
    return torch.from_numpy(item.astype(np.float32)) if isinstance(item, np.ndarray) else item.to(torch.float32)


def _to_nchw(item: Array | Tensor, name: str) -> Tensor:
    """Convert one array or tensor to (n, 3, H, W), float32."""
    pixels = _to_tensor(item, name)
    if pixels.ndim in (2, 3):
        pixels = pixels[(None,) * (4 - pixels.ndim)]
    first, last = (pixels.ndim == 4 and pixels.shape[axis] in (1, 3) for axis in (1, 3))
    if not (first or last) or not pixels.numel():
        shapes = "(H, W), (C, H, W), (H, W, C), (N, C, H, W) or (N, H, W, C), C 1 or 3, nothing empty"
        raise ValueError(f"{name} must be {shapes}, got {tuple(item.shape)}; drop an alpha channel with [..., :3]")
    if last and not (first and (item.ndim == 2 or isinstance(item, Tensor))):
        pixels = pixels.movedim(3, 1)
    return pixels.expand(-1, 3, -1, -1)


def _to_nhw(item: Array | Tensor, name: str) -> Tensor:
    """Convert one array or tensor to (n, H, W), float32."""
    depth, shape = _to_tensor(item, name), tuple(item.shape)
    if depth.ndim == 4 and 1 in (shape[1], shape[3]):
        depth = depth.squeeze(1 if shape[1] == 1 else 3)
    elif depth.ndim == 3 and shape[2] == 1 and shape[0] != 1:
        depth = depth.movedim(2, 0)
    elif depth.ndim == 2:
        depth = depth[None]
    colours = depth.ndim == 3 and shape[-1] in (3, 4) and min(shape[0], shape[1]) > 4
    if depth.ndim != 3 or not depth.numel() or colours:
        shapes = "(H, W), (N, H, W), (H, W, 1), (N, 1, H, W) or (N, H, W, 1), nothing empty"
        raise ValueError(f"{name} must be {shapes}, got {shape}; of a colour image pass one channel")
    return depth
