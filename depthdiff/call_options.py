"""Options of a call that diffusers' pipeline does not have; each is off by default.

`StableDiffusionDepth2ImgPipeline.__call__` and `prepare` take them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from depthdiff.arguments import sort_out
from depthdiff.checks import brief, check_flag, check_number, show
from depthdiff.depth_maps import check_depth_options, disparity_ends
from depthdiff.image import ImageInput, is_latents
from depthdiff.prompt_syntax import check_prompt_syntax
from depthdiff.sizes import MODES

AXES: Mapping[Any, str] = {False: "", True: "xy", "x": "x", "y": "y"}
LARGEST = 2**14
"""Pixels of a side."""
HIRES_STRENGTH, LARGEST_FACTOR = 0.35, 4


@dataclass(frozen=True, eq=False)
class CallOptions:
    """Options of a call; None stands for a default that depends on others.

    Attributes:
        height: of the pictures in pixels, a multiple of the autoencoder's factor (8 for Stable Diffusion); without an
            image that of the depth map if None, else that of the image. Of height and width, one that is None follows
            from the other and the aspect.
        width: of the pictures in pixels, as `height`.
        resize_mode: how the image, its depth map and its mask come to `height` and `width` where the aspect differs:
            "crop" what is too much, the centre stays (the default), "pad" with the pixels of the border, or "stretch".
        start: "image", its noisy latents, or "noise", so that no colour of the image leaks; needs strength 1.
        mask_image: white is repainted, black keeps the image to the last bit: PIL images, arrays or tensors of any size
            (see `depthdiff.masks.read_mask`).
        mask_blur: deviation, in pixels, of the Gaussian that feathers the mask's edge in the picture; it ends at three
            times that (4 if None).
        mask_content: what is repainted starts from the "original" or from "noise" ("original" if None).
        depth_invert: True for maps of distances, in which far is large; "flip" for pictures in which far is white. See
            `depthdiff.depth_maps.read_disparity`. It applies to given and to estimated maps.
        depth_range: (near, far), in the map's own unit; what is beyond counts as these, which become 1 and -1.
        depth_normalize: "each" map by its own extremes, or all of a call by those of the "batch", as frames need it.
        depth_keep_aspect: estimate the depth of an image with its aspect kept.
        prompt_syntax: "a1111" for weights as in `(word:1.3)` and prompts of any length; see `depthdiff.prompt_syntax`.
        seamless: pictures that can be laid side by side without a seam: True, or "x" or "y" for one axis.
        windows: (size, stride) in pixels: the UNet sees one window of this size at a time, and what it predicts is
            averaged where windows overlap; for pictures larger than it was trained on. Source: arXiv:2302.08113.
        guidance_rescale: in [0, 1], how far to bring the deviation of a guided prediction back to that of the one for
            the prompt. Source: arXiv:2305.08891, sec. 3.4.
    """

    height: int | None = None
    width: int | None = None
    resize_mode: Literal["crop", "pad", "stretch"] | None = None
    start: Literal["image", "noise"] = "image"
    mask_image: ImageInput | None = None
    mask_blur: float | None = None
    mask_content: Literal["original", "noise"] | None = None
    depth_invert: bool | Literal["flip"] = False
    depth_range: tuple[float, float] | None = None
    depth_normalize: Literal["each", "batch"] = "each"
    depth_keep_aspect: bool = False
    prompt_syntax: Literal["a1111"] | None = None
    seamless: bool | Literal["x", "y"] = False
    windows: tuple[int, int] | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_number(name, getattr(self, name), 1, LARGEST, whole=True))
        choose("resize_mode", self.resize_mode, (*MODES, None))
        choose("start", self.start, ("image", "noise"))
        choose("mask_content", self.mask_content, ("original", "noise", None))
        if self.mask_blur is not None:
            object.__setattr__(self, "mask_blur", float(check_number("mask_blur", self.mask_blur, 0, 256)))
        read = check_depth_options(self.depth_invert, self.depth_range, self.depth_normalize)
        for name, value in zip(("depth_invert", "depth_range", "depth_normalize"), read, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "depth_keep_aspect", check_flag("depth_keep_aspect", self.depth_keep_aspect))
        check_prompt_syntax(self.prompt_syntax)
        if not isinstance(self.seamless, (bool, str)) or self.seamless not in AXES:
            raise ValueError(f'seamless must be True, False, "x" or "y", got {brief(self.seamless)}')
        object.__setattr__(self, "windows", read_windows(self.windows))
        rescale = float(check_number("guidance_rescale", self.guidance_rescale, 0, 1))
        object.__setattr__(self, "guidance_rescale", rescale)

    @property
    def axes(self) -> str:
        """The axes along which the pictures repeat: "", "x", "y" or "xy"."""
        return AXES[self.seamless]

    def windows_of_latents(self, factor: int) -> tuple[int, int] | None:
        """Return size and stride of the windows in latents."""
        return None if self.windows is None else (self.windows[0] // factor, self.windows[1] // factor)

    @property
    def for_prompts(self) -> dict[str, Any]:
        """What `encode_prompt` needs to know beyond diffusers' arguments."""
        return {} if self.prompt_syntax is None else {"prompt_syntax": self.prompt_syntax}

    @property
    def for_depth(self) -> dict[str, Any]:
        """What `prepare_depth_map` needs to know beyond diffusers' arguments."""
        ends = disparity_ends(self.depth_invert, self.depth_range)
        if ends is None and self.depth_normalize == "each":
            return {}
        return {"ends": "batch" if ends is None else ends}

    @property
    def reads_depth(self) -> bool:
        """Whether disparities are changed before they are normalised."""
        return self.depth_invert is not False or self.depth_range is not None

    def check(
        self,
        image: object,
        depth_map: object,
        strength: float,
        texts: bool,
        factor: int,
        deep_cache: int,
    ) -> None:
        """Refuse options that do not fit each other or the other arguments.

        Args:
            image: of the call.
            depth_map: of the call.
            strength: of the call.
            texts: whether any prompt is given as text.
            factor: pixels that a latent stands for, in height and in width.
            deep_cache: of the call.

        Raises:
            ValueError: names both options and a remedy.
        """
        for name in ("height", "width"):
            if (getattr(self, name) or 0) % factor:
                raise ValueError(f"{name} must be a multiple of {factor}, got {getattr(self, name)}")
        latents, sized = is_latents(image), self.height is not None or self.width is not None
        refuse(
            self.resize_mode is not None and not sized, "resize_mode", "needs height or width, which say to what size"
        )
        refuse(sized and latents, "height and width", "cannot resize latents given as image; pass pixels")
        refuse(
            self.start == "noise" and image is not None and strength < 1,
            'start="noise"', f"needs strength 1, at which nothing of the image is left, got {strength:g}",
        )  # fmt: skip
        masked = self.mask_image is not None
        for name in ("mask_blur", "mask_content"):
            refuse(getattr(self, name) is not None and not masked, name, "needs mask_image")
        refuse(masked and image is None, "mask_image", "needs an image, which is kept outside it; pass image")
        refuse(masked and latents, "mask_image", "needs the image as pixels, which are kept outside it, got latents")
        refuse(
            self.depth_keep_aspect and depth_map is not None,
            "depth_keep_aspect", "applies to estimates, but depth_map is given; leave one out",
        )  # fmt: skip
        refuse(
            self.prompt_syntax is not None and not texts,
            "prompt_syntax", "is about texts, but only embeddings are given; leave it out",
        )  # fmt: skip
        if self.windows is not None:
            refuse(bool(self.axes), "windows", "cannot be seamless as well: a window has borders; leave one out")
            refuse(deep_cache > 1, "windows", "cannot share features between steps; use deep_cache 1")
            refuse(
                any(number % factor for number in self.windows), "windows", f"must be multiples of {factor}, got "
                f"{self.windows}",
            )  # fmt: skip


class Options(TypedDict, total=False):
    """The attributes of `CallOptions` as arguments."""

    height: int | None
    width: int | None
    resize_mode: Literal["crop", "pad", "stretch"] | None
    start: Literal["image", "noise"]
    mask_image: ImageInput | None
    mask_blur: float | None
    mask_content: Literal["original", "noise"] | None
    depth_invert: bool | Literal["flip"]
    depth_range: tuple[float, float] | None
    depth_normalize: Literal["each", "batch"]
    depth_keep_aspect: bool
    prompt_syntax: Literal["a1111"] | None
    seamless: bool | Literal["x", "y"]
    windows: tuple[int, int] | None
    guidance_rescale: float


NAMES = tuple(field.name for field in fields(CallOptions))


def read_options(function: Any, handlings: Mapping[str, Any], given: Mapping[str, Any]) -> CallOptions:
    """Read the options of a call.

    Args:
        function: which got them; for messages.
        handlings: of arguments of diffusers, see `depthdiff.arguments.sort_out`.
        given: all that `function` does not name itself.

    Raises:
        TypeError: an unknown name, or a value of a wrong type.
        ValueError: a value out of range.
    """
    return CallOptions(**sort_out(function, handlings, given, NAMES))


def read_hires(hires: object, hires_strength: object) -> tuple[float | None, float]:
    """Return the factor and the strength of a second pass.

    Raises:
        TypeError: not a number.
        ValueError: out of range, or a strength without a factor.
    """
    if hires is None:
        refuse(hires_strength is not None, "hires_strength", "needs hires, the factor by which the picture grows")
        return None, HIRES_STRENGTH
    strength = HIRES_STRENGTH if hires_strength is None else check_number("hires_strength", hires_strength, 0, 1)
    return float(check_number("hires", hires, 1, LARGEST_FACTOR)), float(strength)


def choose(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is not one of some texts (or None)."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        named = " or ".join(repr(choice) for choice in choices if choice is not None)
        raise ValueError(f"{name} must be {named}, got {brief(value)}")


def refuse(wrong: bool, what: str, why: str) -> None:
    """Raise where something is wrong."""
    if wrong:
        raise ValueError(f"{what} {why}")


def read_windows(windows: object) -> tuple[int, int] | None:
    """Return size and stride of the windows in pixels."""
    if windows is None:
        return None
    if not isinstance(windows, (tuple, list)) or len(windows) != 2:
        raise TypeError(f"windows must be two numbers, size and stride in pixels, got {show(windows)}")
    size, stride = (check_number("windows", number, 1, LARGEST, whole=True) for number in windows)
    if stride > size:
        raise ValueError(
            f"windows must be (size, stride) with stride <= size, else there are gaps, got {(size, stride)}"
        )
    return size, stride
