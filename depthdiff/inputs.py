"""The border of the pipeline's call: wrong arguments are named here, before any work starts, and right ones paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor

from depthdiff.image import OUTPUT_TYPES, ImageInput, image_size, is_latents, read_images
from depthdiff.models.clip_text import CLIPTextModel
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.models.vae import AutoencoderKL
from depthdiff.tokenizer import CLIPTokenizer

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "depth_mask")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Refuse what is no number (or no whole number) from `low` to `high`.

    Raises:
        TypeError: not a number.
        ValueError: out of range, or not finite.
    """
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {'an int' if whole else 'a number'}, got {type(value).__name__} {value!r}")
    if not (low <= value <= high and math.isfinite(value)):
        limits = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {limits}, got {value!r}")


def check_prompt(prompt: object, prompt_embeds: object, name: str = "prompt") -> None:
    """Refuse a prompt, or ready embeddings in its place, of a wrong kind.

    Raises:
        TypeError: embeddings that are no tensor.
        ValueError: neither a str nor a list of str, an empty list, both forms at once, or embeddings of a wrong shape.
    """
    if prompt is not None and prompt_embeds is not None:
        raise ValueError(f"Cannot forward both `{name}` and `{name}_embeds`; pass one of them")
    if prompt is not None and not isinstance(prompt, str):
        if not isinstance(prompt, list) or not all(isinstance(one, str) for one in prompt):
            raise ValueError(f"`{name}` has to be of type `str` or `list` of `str` but is {type(prompt).__name__}")
        if not prompt:
            raise ValueError(f"`{name}` must hold at least one text, got an empty list")
    if prompt_embeds is not None:
        if not isinstance(prompt_embeds, Tensor):
            raise TypeError(f"`{name}_embeds` must be a tensor (B, L, C), got {type(prompt_embeds).__name__}")
        if prompt_embeds.ndim != 3 or not prompt_embeds.is_floating_point() or not len(prompt_embeds):
            shape, dtype = tuple(prompt_embeds.shape), prompt_embeds.dtype
            raise ValueError(f"`{name}_embeds` must be a float tensor (B, L, C), got {dtype} of shape {shape}")
        if not prompt_embeds.isfinite().all():
            raise ValueError(f"`{name}_embeds` must be finite, got NaN or infinity")


def check_embeds(prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None, width: int) -> None:
    """Refuse ready embeddings that fit neither each other nor the UNet.

    Args:
        prompt_embeds: (B, L, C).
        negative_prompt_embeds: (B, L, C).
        width: C, as the UNet reads it.

    Raises:
        ValueError: different shapes, or another width.
    """
    for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if embeds is not None and embeds.shape[2] != width:
            raise ValueError(f"`{name}` must be {width} wide, which this UNet reads, got {embeds.shape[2]}")
    if prompt_embeds is not None and negative_prompt_embeds is not None:
        if prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ValueError(
                "`prompt_embeds` and `negative_prompt_embeds` must have the same shape, got "
                f"{tuple(prompt_embeds.shape)} and {tuple(negative_prompt_embeds.shape)}"
            )


def check_generator(generator: object, batch: int) -> None:
    """Refuse what is neither a generator nor a list of one or of `batch`.

    Raises:
        TypeError: something else.
        ValueError: a list of another length.
    """
    if generator is None or isinstance(generator, Generator):
        return
    if not isinstance(generator, (list, tuple)) or not all(isinstance(one, Generator) for one in generator):
        raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
    if len(generator) not in (1, batch):
        raise ValueError(
            f"You have passed a list of generators of length {len(generator)}, but requested an effective batch size "
            f"of {batch}; pass one generator, or one an image"
        )


def check_callbacks(
    callback: object, callback_steps: object, callback_on_step_end: object, tensor_inputs: Sequence[str]
) -> None:
    """Refuse callbacks that could not be called.

    Raises:
        TypeError: not callable.
        ValueError: `callback_steps` not a positive number, or a tensor that the callback cannot have.
    """
    for name, function in (("callback", callback), ("callback_on_step_end", callback_on_step_end)):
        if function is not None and not isinstance(function, Callable):  # type: ignore[arg-type]
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    check_number("callback_steps", callback_steps, 1, whole=True)
    unknown = [name for name in tensor_inputs if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` has to be in {list(CALLBACK_TENSORS)}, but found {unknown}"
        )


def check_fit(
    vae: AutoencoderKL | None,
    text_encoder: CLIPTextModel | None,
    tokenizer: CLIPTokenizer | None,
    unet: UNet2DConditionModel | None,
) -> None:
    """Refuse components that cannot work together; those that are None are not looked at.

    Raises:
        ValueError: names both sides.
    """
    if unet is not None and vae is not None:
        wanted, found = vae.config.latent_channels + 1, unet.config.in_channels
        if found != wanted:
            raise ValueError(
                f"unet must take {wanted} channels, the latents' and one of depth, got {found}; "
                "use the UNet of a depth-to-image checkpoint"
            )
    if unet is not None and text_encoder is not None:
        width, read = text_encoder.config.hidden_size, set(unet.config.per_level("cross_attention_dim"))
        if read != {width}:
            raise ValueError(f"text_encoder is {width} wide, but the unet reads {read}; use those of one checkpoint")
    if tokenizer is not None and text_encoder is not None and len(tokenizer) > text_encoder.config.vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, but text_encoder knows {text_encoder.config.vocab_size}; "
            "use those of one checkpoint"
        )


def check_output_type(output_type: object) -> None:
    """Refuse an unknown kind of result.

    Raises:
        ValueError: always names the known ones.
    """
    if output_type not in (*OUTPUT_TYPES, "latent"):
        raise ValueError(f"output_type must be one of {', '.join((*OUTPUT_TYPES, 'latent'))}, got {output_type!r}")


def read_lora_scale(kwargs: Mapping[str, Any] | None) -> float:
    """Read the only thing that `cross_attention_kwargs` may hold: `scale`, that of the active adapters.

    Raises:
        ValueError: another key, or a scale that is no finite number.
    """
    unknown = sorted(kwargs.keys() - {"scale"}) if kwargs else []
    if unknown:
        raise ValueError(f"cross_attention_kwargs may hold scale alone, got {unknown}: no layer reads them")
    scale = kwargs["scale"] if kwargs else 1.0
    check_number("scale", scale, -1e6, 1e6)
    return float(scale)


def batch_size(counts: Mapping[str, int]) -> int:
    """Find how many pictures are asked for, before `num_images_per_prompt`, from the length of each argument.

    Args:
        counts: argument name -> its length; a length of 1 serves every picture, a divisor of the largest repeats.

    Raises:
        ValueError: lengths that do not pair.
    """
    largest = max(counts, key=lambda name: counts[name])
    for name, count in counts.items():
        if count < 1 or counts[largest] % count:
            raise ValueError(
                f"Cannot duplicate `{name}` of batch size {count} to the {counts[largest]} of `{largest}`; "
                "pass one, or as many as the other"
            )
    return counts[largest]


def repeat(items: list[Any], count: int) -> list[Any]:
    """Repeat a list as a whole until it has `count` items."""
    return items * (count // len(items))


def expand(x: Tensor, pictures: int, per_prompt: int) -> Tensor:
    """Give every picture its own: (N, ...) -> (pictures * per_prompt, ...), pictures of one prompt being neighbours."""
    return torch.cat([x] * (pictures // len(x))).repeat_interleave(per_prompt, dim=0)


def read_start(image: ImageInput | None, depth_map: object, factor: int) -> list[Image.Image] | Tensor:
    """Return what `depthdiff.image.read_images` makes of the images, or the latents (N, 4, h, w) themselves.

    Args:
        image: of the call.
        depth_map: of the call; needed beside latents.
        factor: pixels to a latent, in height and in width.

    Raises:
        TypeError: neither images nor latents.
        ValueError: no image, latents without a depth map, or images that are damaged or too small.
    """
    if image is None:
        raise ValueError("`image` input cannot be undefined; pass the image to start from")
    if not is_latents(image):
        images = read_images(image)
        height, width = image_size(images)
        if min(height, width) < factor:
            raise ValueError(f"`image` must be at least {factor}x{factor} pixels, got {height}x{width}")
        return images
    if depth_map is None:
        raise ValueError("`image` holds latents, from which no depth can be estimated; pass `depth_map` as well")
    latents = torch.stack(image) if isinstance(image, list) else image
    if not isinstance(latents, Tensor) or not latents.isfinite().all():
        raise ValueError("`image` latents must be finite, got NaN or infinity")
    return latents
