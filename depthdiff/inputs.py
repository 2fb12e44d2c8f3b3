"""The checks of the pipeline's arguments, before any work starts, and the pairing of good ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from depthdiff.checks import brief, check_dense, check_generators, check_number, check_tensor, plain, show
from depthdiff.image import OUTPUT_TYPES, ImageInput, image_size, is_latents, read_images

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "depth_mask")
MAX_IMAGES = 1000  # of one call; more do not fit in any memory
LARGEST_SCALE = 1e6  # of guidance and adapters; larger products may overflow float32

SHORTEST = 2
"""Tokens of a text: its start and its end."""


def check_prompt(prompt: object, prompt_embeds: object, name: str = "prompt") -> None:
    """Refuse a prompt, or embeddings instead, of a wrong kind."""
    if prompt is not None and prompt_embeds is not None:
        raise ValueError(f"Cannot forward both `{name}` and `{name}_embeds`; pass one of them")
    if prompt is not None and not isinstance(prompt, str):
        if not isinstance(prompt, list) or not all(isinstance(one, str) for one in prompt):
            raise ValueError(f"`{name}` has to be of type `str` or `list` of `str` but is {type(prompt).__name__}")
        if not prompt:
            raise ValueError(f"`{name}` must hold at least one text, got an empty list")
    if prompt_embeds is not None:
        if not check_tensor(f"`{name}_embeds`", prompt_embeds, "(B, L, C)", 3).isfinite().all():
            raise ValueError(f"`{name}_embeds` must be finite, got NaN or infinity")


def check_prompts(
    pipe: Any, prompt: Any, negative_prompt: Any, embeds: Any, negative_embeds: Any, clip_skip: Any, guided: bool
) -> int | None:
    """Refuse prompts that a pipeline cannot encode; return `clip_skip` as a number."""
    check_prompt(prompt, embeds)
    check_prompt(negative_prompt, negative_embeds, "negative_prompt")
    if prompt is None and embeds is None:
        raise ValueError("Provide either `prompt` or `prompt_embeds`; both are None")
    reads = prompt is not None or (guided and negative_embeds is None)
    pipe._need(*(pipe.FOR_TEXT if reads or clip_skip is not None else ()))
    width = None if pipe.unet is None else max(widths_read(pipe.unet))
    check_embeds(embeds, negative_embeds, width, beside_text=reads)
    if clip_skip is None:
        return None
    return check_number("clip_skip", clip_skip, 0, pipe.text_encoder.config.num_hidden_layers - 1, whole=True)


def read_numbers(
    strength: object = 1.0,
    guidance_scale: object = 1.0,
    num_images_per_prompt: object = 1,
    num_inference_steps: object = 1,
    eta: object = 0.0,
    scheduler: Any = None,
) -> tuple[float, Any, int, int, float]:
    """Return the numbers of a call as Python's own; `scheduler` limits the steps."""
    return (
        check_number("strength", strength, 0, 1),
        read_guidance(guidance_scale),
        check_number("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES, whole=True),
        check_steps(num_inference_steps, getattr(scheduler, "config", {})),
        check_number("eta", eta, 0, 1),
    )


def read_guidance(guidance_scale: object) -> float | tuple[float, ...]:
    """Return one guidance scale, or some, one a picture, as Python's own.

    Raises:
        TypeError: not a number.
        ValueError: negative, infinite, or none at all.
    """
    given: Any = plain(guidance_scale)
    if isinstance(given, (Tensor, np.ndarray)) and given.ndim == 1:
        given = given.tolist()
    scales = list(given) if isinstance(given, (list, tuple)) else [given]
    if not scales:
        raise ValueError("guidance_scale must be a number, or one a picture, got an empty list")
    for scale in map(plain, scales):
        if isinstance(scale, (int, float)) and not isinstance(scale, bool) and -LARGEST_SCALE <= scale < 0:
            raise ValueError(
                f"guidance_scale must be at least 0, got {scale}: it is off up to 1 (arXiv:2207.12598); to lead away "
                "from a text, pass that as negative_prompt"
            )
    numbers = [check_number("guidance_scale", scale, 0, LARGEST_SCALE) for scale in scales]
    return tuple(map(float, numbers)) if len(numbers) > 1 else numbers[0]


def is_guided(guidance_scale: float | tuple[float, ...]) -> bool:
    """Return whether guidance is on, for any picture."""
    return (max(guidance_scale) if isinstance(guidance_scale, tuple) else guidance_scale) > 1


def check_scales(guidance_scale: float | tuple[float, ...], batch: int) -> None:
    """Refuse a number of guidance scales that is not that of the pictures."""
    if isinstance(guidance_scale, tuple) and len(guidance_scale) != batch:
        raise ValueError(
            f"guidance_scale must be one number, or {batch}, one a picture, got a list of {len(guidance_scale)}"
        )


def check_steps(num_inference_steps: object, config: Mapping[str, Any]) -> int:
    """Refuse fewer steps than one, or more than the training had."""
    count = check_number("num_inference_steps", num_inference_steps, whole=True)
    limit = config.get("num_train_timesteps")
    if not 1 <= count <= (limit or count):
        raise ValueError(f"num_inference_steps must be from 1 to {limit}, got {show(count).removeprefix('int ')}")
    return count


def check_latents(latents: object, channels: int) -> None:
    """Refuse what cannot be latents (B, channels, h, w) to decode."""
    if check_tensor("latents", latents, f"(B, {channels}, h, w)", 4).shape[1] != channels:
        raise ValueError(f"latents must have {channels} channels, got {latents.shape[1]}")  # type: ignore[attr-defined]


def check_embeds(
    prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None, width: int | None, beside_text: bool = False
) -> None:
    """Refuse embeddings (B, L, C) that differ in shape, whose C is not `width`, or whose L is too short for a text."""
    for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if embeds is not None and width is not None and embeds.shape[2] != width:
            raise ValueError(f"`{name}` must be {width} wide, which this UNet reads, got {embeds.shape[2]}")
        if embeds is not None and beside_text and embeds.shape[1] < SHORTEST:
            raise ValueError(
                f"`{name}` must have at least {SHORTEST} tokens, start and end, beside a prompt given as text, got "
                f"{embeds.shape[1]}; pass both as embeddings"
            )
    if prompt_embeds is not None and negative_prompt_embeds is not None:
        if prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ValueError(
                "`prompt_embeds` and `negative_prompt_embeds` must have the same shape, got "
                f"{tuple(prompt_embeds.shape)} and {tuple(negative_prompt_embeds.shape)}"
            )


def check_generator(generator: object, batch: int) -> None:
    """Refuse what is neither a generator nor a list of one or of `batch`."""
    check_generators("generator", generator)
    if isinstance(generator, (list, tuple)) and len(generator) not in (1, batch):
        raise ValueError(
            f"You have passed a list of generators of length {len(generator)}, but requested an effective batch size "
            f"of {batch}; pass one generator, or one an image"
        )


def check_callbacks(
    callback: object, callback_steps: object, callback_on_step_end: object, tensor_inputs: object
) -> tuple[int, list[str]]:
    """Refuse callbacks that cannot be called; return every how many steps, and the names of tensors."""
    for name, function in (("callback", callback), ("callback_on_step_end", callback_on_step_end)):
        if function is not None and not isinstance(function, Callable):  # type: ignore[arg-type]
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    names = () if tensor_inputs is None else tensor_inputs
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"callback_on_step_end_tensor_inputs must be a list of names, got {show(names)}")
    unknown = [show(name) for name in names if not isinstance(name, str) or name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` has to be in {list(CALLBACK_TENSORS)}, but found {unknown}"
        )
    every = 1 if callback_steps is None else check_number("callback_steps", callback_steps, 1, whole=True)
    return every, list(names)


def widths_read(unet: Any) -> tuple[int, ...]:
    """List the widths of the embeddings that a UNet reads."""
    width = unet.config.cross_attention_dim
    return tuple(width) if isinstance(width, (tuple, list)) else (width,)


def check_fit(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any) -> None:
    """Refuse components that cannot work together; those that are None are not checked."""
    if unet is not None and vae is not None:
        wanted, found = vae.config.latent_channels + 1, unet.config.in_channels
        if found != wanted:
            raise ValueError(
                f"unet must take {wanted} channels, the latents' and one of depth, got {found}; "
                "use the UNet of a depth-to-image checkpoint"
            )
    if unet is not None and text_encoder is not None:
        width, read = text_encoder.config.hidden_size, set(widths_read(unet))
        if read != {width}:
            raise ValueError(f"text_encoder is {width} wide, but the unet reads {read}; use those of one checkpoint")
    if tokenizer is not None and text_encoder is not None and len(tokenizer) > text_encoder.config.vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, but text_encoder knows {text_encoder.config.vocab_size}; "
            "use those of one checkpoint"
        )


def read_output_type(output_type: object) -> Any:
    """Return the kind of result; "numpy" is an old name of "np"."""
    if isinstance(output_type, str) and output_type == "numpy":
        return "np"
    if not isinstance(output_type, str) or output_type not in (*OUTPUT_TYPES, "latent"):
        raise ValueError(f"output_type must be one of {', '.join((*OUTPUT_TYPES, 'latent'))}, got {brief(output_type)}")
    return output_type


def check_kwargs(kwargs: object) -> float:
    """Return the "scale" of `cross_attention_kwargs`, by which the active adapters are multiplied."""
    if kwargs is None:
        return 1.0
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"cross_attention_kwargs must be a dict or None, got {show(kwargs)}")
    for key in kwargs:
        if not isinstance(key, str):
            raise TypeError(f"cross_attention_kwargs must have texts as keys, got {show(key)}")
    if kwargs.get("scale") is None:
        return 1.0
    return float(check_number("scale", kwargs.get("scale", 1.0), -LARGEST_SCALE, LARGEST_SCALE))


def batch_size(counts: Mapping[str, int]) -> int:
    """Return the largest length of the arguments (name -> length); the others must be divisors, and are repeated."""
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


def pair_texts(negatives: list[str], count: int) -> list[str]:
    """Repeat negative prompts as a whole until there is one for each of `count` prompts."""
    if count % len(negatives):
        raise ValueError(f"`negative_prompt` has batch size {len(negatives)}, but `prompt` {count}; they must pair")
    return repeat(negatives, count)


def paired(items: Any, count: int | None, pictures: int) -> Any:
    """Repeat images or maps as a whole until there is one for each picture; a single one stays as it is."""
    if items is None or count is None or count in (1, pictures):
        return items
    if isinstance(items, (list, tuple)):
        return list(items) * (pictures // count)
    lists = [items] * (pictures // count)
    return torch.cat(lists) if isinstance(items, Tensor) else np.concatenate(lists)


def repeat_rows(name: str, embeds: Tensor | None, count: int) -> Tensor | None:
    """Repeat embeddings (N, L, C) as a whole until there are `count` rows."""
    if embeds is None:
        return None
    if count % len(embeds):
        raise ValueError(f"`{name}` has batch size {len(embeds)}, but `prompt` {count}; they must pair")
    return torch.cat([embeds] * (count // len(embeds)))


def read_start(image: ImageInput | None, depth_map: object, factor: int) -> list[Image.Image] | Tensor:
    """Return the result of `depthdiff.image.read_images`, or latents (N, 4, h, w); `factor` is pixels per latent."""
    if image is None:
        raise ValueError("`image` input cannot be undefined; pass the image to start from, or a depth_map alone")
    if not is_latents(image):
        images = read_images(image)
        height, width = image_size(images)
        if min(height, width) < factor:
            raise ValueError(f"`image` must be at least {factor}x{factor} pixels, got {height}x{width}")
        return images
    if depth_map is None:
        raise ValueError("`image` holds latents, from which no depth can be estimated; pass `depth_map` as well")
    return read_latents(image)


def read_latents(image: Any) -> Tensor:
    """Return latents (N, 4, h, w), given as such or as a list of (4, h, w)."""
    if not isinstance(image, Tensor):
        for one in image:
            check_dense("`image`", one)
        kinds = {(tuple(one.shape), one.dtype, one.device) for one in image}
        if len(kinds) > 1:
            found = " and ".join(sorted(f"{dtype} {shape} on {device}" for shape, dtype, device in kinds)[:3])
            raise ValueError(f"`image` latents must be of one shape, dtype and device, got {found}")
        image = torch.stack(list(image))
    if not check_tensor("`image`", image, "(B, 4, h, w) or an image", 4).isfinite().all():
        raise ValueError("`image` latents must be finite, got NaN or infinity")
    return image
