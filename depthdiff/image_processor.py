"""Images for the depth estimator: resized, rescaled, normalised.

Letters: B images, H and W of the resized ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from depthdiff.arguments import NO_WEIGHTS, SAVING, sort_out
from depthdiff.checkpoint.hub import fetch, read_json
from depthdiff.checkpoint.transaction import check_folder
from depthdiff.checkpoint.write import write_text
from depthdiff.checks import brief, check_dense, check_number, check_tensor, plain, show
from depthdiff.config import BaseOutput, Config
from depthdiff.image import ImageInput, read_images, to_pil
from depthdiff.image import VaeImageProcessor as VaeImageProcessor  # which scripts import from here

if TYPE_CHECKING:
    from typing_extensions import Self

FILE = "preprocessor_config.json"
MAX_SIDE = 2**14
"""Pixels of a side to resize to."""

TYPES = (None, "DPTImageProcessor", "DPTImageProcessorFast", "DPTImageProcessorPil", "DPTFeatureExtractor")


@dataclass(eq=False)
class DPTImageProcessorConfig(Config):
    """The content of `preprocessor_config.json`.

    Attributes:
        do_resize: whether images are resized.
        size: height and width to resize to; a number is both.
        keep_aspect_ratio: scale both sides by one factor, of the two that `size` asks for the one nearer to 1.
        ensure_multiple_of: both sides are rounded to a multiple of it.
        resample: the filter, by Pillow's number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
        do_rescale: whether 0..255 is multiplied by `rescale_factor`.
        rescale_factor: the factor.
        do_normalize: whether `image_mean` is subtracted and the rest divided by `image_std`.
        image_mean: one for each channel, or one for all.
        image_std: likewise.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "image_processor_type": TYPES,
        "feature_extractor_type": TYPES,
        "do_pad": (None, False),
    }

    POSITIVE: ClassVar[tuple[str, ...]] = ("image_std",)

    do_resize: bool = True
    size: Mapping[str, int] | int = field(default_factory=lambda: {"height": 384, "width": 384})
    keep_aspect_ratio: bool = False
    ensure_multiple_of: int = 1
    resample: int = 3
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] | float = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] | float = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        size = {"height": self.size, "width": self.size} if isinstance(self.size, int) else dict(self.size)
        sides = {name: plain(side) for name, side in size.items()}
        good = all(type(side) is int and 0 < side <= MAX_SIDE for side in sides.values())
        if sides.keys() != {"height", "width"} or not good:
            raise ValueError(f"size must hold a positive height and width up to {MAX_SIDE}, got {str(size)[:80]}")
        object.__setattr__(self, "size", sides)
        if self.resample not in range(6) or self.ensure_multiple_of < 1:
            raise ValueError(
                "resample must be in 0..5 and ensure_multiple_of at least 1, "
                f"got {self.resample} and {self.ensure_multiple_of}"
            )
        for name in ("image_mean", "image_std"):
            if isinstance(self[name], tuple) and len(self[name]) != 3:
                raise ValueError(f"{name} must be 3 numbers, one for each channel, or one for all, got {self[name]}")


@dataclass(frozen=True)
class BatchFeature(BaseOutput):
    """The image processor's result.

    Attributes:
        pixel_values: (B, 3, H, W), float32 tensor or array.
    """

    pixel_values: Any

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BatchFeature:
        """Return the same tensor on `device`, as `dtype` if one is given."""
        return replace(self, pixel_values=self.pixel_values.to(device, dtype=dtype))


class DPTImageProcessor:
    """Prepare images for the depth estimator, with the interface and the numbers of transformers' class of that name.

    Args:
        config: of the checkpoint; kept as an attribute.

    Source: huggingface/transformers, models/dpt, the processor on Pillow; the one on torchvision resizes with other
        numbers.
    """

    config_class: ClassVar[type[DPTImageProcessorConfig]] = DPTImageProcessorConfig

    def __init__(self, config: DPTImageProcessorConfig | None = None) -> None:
        if config is not None and not isinstance(config, DPTImageProcessorConfig):
            raise TypeError(f"config must be a DPTImageProcessorConfig, got {show(config)}; from_config takes dicts")
        self.config = DPTImageProcessorConfig() if config is None else config

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config.to_dict(), indent=2, sort_keys=True)}"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the processor from a config or from the parsed JSON of one."""
        known = isinstance(config, DPTImageProcessorConfig)
        return cls(config if known else DPTImageProcessorConfig.from_dict(config))  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **unused: Any,
    ) -> Self:
        """Load the processor from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path: a folder that holds `preprocessor_config.json`, or a Hub id.
            subfolder: of the folder or repository, such as "feature_extractor".
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored; huggingface_hub's own cache if absent.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.
            **unused: an argument of diffusers or transformers in `depthdiff.arguments.NO_WEIGHTS`.

        Raises:
            CheckpointError: the file is missing or damaged, or belongs to another kind of processor.
            TypeError: an unknown argument.
        """
        token = sort_out(cls.from_pretrained, NO_WEIGHTS, {"token": token, **unused}, ("token",))["token"]
        folder = fetch(
            pretrained_model_name_or_path, (FILE,), subfolder=subfolder, revision=revision, cache_dir=cache_dir,
            token=token, local_files_only=local_files_only, force_download=force_download,
        )  # fmt: skip
        return cls.from_config(read_json(folder / FILE))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **unused: Any) -> None:
        """Write `preprocessor_config.json`, which transformers loads too.

        Args:
            save_directory: the folder; made if it does not exist.
            **unused: arguments of diffusers in `depthdiff.arguments.SAVING`.

        Raises:
            TypeError: an unknown argument.
        """
        sort_out(self.save_pretrained, SAVING, unused)
        folder = check_folder("save_directory", save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {**self.config.to_dict(), "image_processor_type": "DPTImageProcessor"}
        write_text(folder / FILE, json.dumps(values, indent=2, sort_keys=True) + "\n")

    def __call__(self, images: ImageInput, return_tensors: Literal["pt", "np"] = "pt") -> BatchFeature:
        """Convert images to the depth estimator's input.

        Args:
            images: whatever `depthdiff.image.read_images` takes, and in a list also of different sizes; float images
                are rounded to 8 bits first, like those of a file.
            return_tensors: "pt" for a tensor, "np" for an array.

        Returns:
            `.pixel_values`, (B, 3, H, W), float32.

        Raises:
            TypeError: not an image.
            ValueError: a bad image (see `read_images`), results of different sizes, or an unknown `return_tensors`.
        """
        if not isinstance(return_tensors, str) or return_tensors not in ("pt", "np"):
            raise ValueError(f'return_tensors must be "pt" or "np", got {brief(return_tensors)}')
        items = list(images) if isinstance(images, (list, tuple)) and images else [images]
        arrays = [self._prepare(one) for item in items for one in _to_uint8(item)]
        if len({array.shape for array in arrays}) > 1:
            sizes = ", ".join(f"{array.shape[2]}x{array.shape[1]}" for array in arrays[:8])
            raise ValueError(f"images become {sizes}, which make no tensor; pass images of one size, or one at a time")
        batch = np.ascontiguousarray(np.stack(arrays))
        return BatchFeature(batch if return_tensors == "np" else torch.from_numpy(batch))

    def post_process_depth_estimation(
        self, outputs: Any, target_sizes: Iterable[tuple[int, int]] | Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """Resize predicted depth, for instance to the sizes of the images.

        Args:
            outputs: of the depth estimator: `.predicted_depth` (B, H, W).
            target_sizes: B pairs (height, width); None keeps (H, W).

        Returns:
            B dicts of "predicted_depth", (height, width), resized bicubic.

        Raises:
            TypeError: no depth, or sizes that are not pairs of numbers.
            ValueError: a number of sizes other than that of predictions.
        """
        depths = check_tensor("predicted_depth", getattr(outputs, "predicted_depth", outputs), "(B, H, W)", 3)
        if target_sizes is None:
            return [{"predicted_depth": depth} for depth in depths]
        sizes = _sizes(target_sizes)
        if len(sizes) != len(depths):
            raise ValueError(f"target_sizes must hold {len(depths)} pairs, one for each prediction, got {len(sizes)}")
        return [
            {"predicted_depth": F.interpolate(depth[None, None], size=size, mode="bicubic", align_corners=False)[0, 0]}
            for depth, size in zip(depths, sizes, strict=True)
        ]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which an image of this height and width is resized."""
        height, width = (check_number(*side, 1, whole=True) for side in (("height", height), ("width", width)))
        size, multiple = dict(self.config.size), self.config.ensure_multiple_of  # type: ignore[arg-type]
        scales = size["height"] / height, size["width"] / width
        if self.config.keep_aspect_ratio:
            nearer = scales[1] if abs(1 - scales[1]) < abs(1 - scales[0]) else scales[0]
            scales = nearer, nearer
        return round(scales[0] * height / multiple) * multiple, round(scales[1] * width / multiple) * multiple

    def _prepare(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """Convert one RGB image to (3, H, W), float32."""
        config = self.config
        if config.do_resize:
            height, width = self.output_size(image.height, image.width)
            if not height or not width:
                found = f"{image.width}x{image.height}"
                raise ValueError(f"images of {found} would be resized to {width}x{height}; crop them")
            image = image.resize((width, height), Image.Resampling(config.resample))
        values = np.asarray(image)
        if config.do_rescale:
            values = values.astype(np.float64) * config.rescale_factor
        values = values.astype(np.float32)
        if config.do_normalize:
            mean, std = (np.asarray(number, dtype=np.float32) for number in (config.image_mean, config.image_std))
            values = (values - mean) / std
        return np.moveaxis(values, -1, 0)


def _sizes(target_sizes: Any) -> list[tuple[int, int]]:
    if isinstance(target_sizes, Tensor):
        check_dense("target_sizes", target_sizes)
    if isinstance(target_sizes, (Tensor, np.ndarray)):
        target_sizes = target_sizes.tolist()
    pairs: Any = target_sizes if isinstance(target_sizes, (list, tuple)) else [None]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"target_sizes must be pairs of height and width, got {show(target_sizes)}")
    return [
        (check_number("height", h, 1, MAX_SIDE, whole=True), check_number("width", w, 1, MAX_SIDE, whole=True))
        for h, w in pairs
    ]


def _to_uint8(image: Any) -> list[Image.Image]:
    """Read one item of the argument as RGB images of 8 bits."""
    return to_pil(read_images(image, "images"))
