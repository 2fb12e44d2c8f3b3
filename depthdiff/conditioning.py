"""Conditions of the UNet besides the latents: the embeddings of the prompts, and the depth.

Letters: B texts or maps, L tokens, C their channels, h and w height and width of the latents.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from depthdiff.checks import brief
from depthdiff.models.gaussian import DiagonalGaussianDistribution

logger = logging.getLogger(__name__)


def encode_texts(
    texts: list[str],
    tokenizer: Any,
    encoder: Any,
    device: torch.device,
    clip_skip: int | None = None,
    length: int | None = None,
) -> Tensor:
    """Read texts.

    Args:
        texts: B texts; what is beyond the tokenizer's length is cut off, with a warning.
        tokenizer: text to tokens.
        encoder: tokens to embeddings, as `depthdiff.CLIPTextModel` or that of transformers.
        device: where the encoder works.
        clip_skip: how many of the encoder's last layers to leave out.
        length: L; the encoder's own if None. Beyond that, embeddings of the empty text follow, as compel fills up.

    Returns:
        (B, L, C).
    """
    longest = text_length(tokenizer, encoder)
    if length is not None and length > longest:
        read = [encode_texts(some, tokenizer, encoder, device, clip_skip) for some in (texts, [""] * len(texts))]
        return torch.cat([read[0], *[read[1]] * (length // longest)], dim=1)[:, :length]
    length = longest if length is None else length
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True).input_ids
    for text in dict.fromkeys(texts):
        if lost := cut_words(text, tokenizer, length):
            logger.warning("%r has more than %d tokens; its end is not read: %r", text[:40], length - 2, lost)
    return encode_tokens(torch.tensor(ids, device=device), encoder, clip_skip)


def encode_tokens(tokens: Tensor, encoder: Any, clip_skip: int | None = None) -> Tensor:
    """Read tokens (B, L), int64: embeddings (B, L, C); the other arguments are those of `encode_texts`."""
    if clip_skip is None:
        return encoder(tokens, attention_mask=None)[0]
    states = encoder(tokens, attention_mask=None, output_hidden_states=True).hidden_states
    text_model = getattr(encoder, "text_model", encoder)  # transformers 5 has no such level
    return text_model.final_layer_norm(states[-(clip_skip + 1)])


def text_length(tokenizer: Any, encoder: Any) -> int:
    """Return how many tokens are read at once, start and end included."""
    return int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))


def cut_words(text: str, tokenizer: Any, length: int) -> str:
    """Return the end of a text that is cut off at `length` tokens, or at the tokenizer's; empty if nothing is."""
    ids = tokenizer([text]).input_ids[0]
    kept = min(length, tokenizer.model_max_length) - 1
    learnt = {index: word for word, group in getattr(tokenizer, "learnt_words", {}).items() for index in group}
    runs = groupby(ids[kept:-1], key=learnt.get)  # a word of several vectors is named once
    return " ".join(str(tokenizer.decode(list(run))) if word is None else word for word, run in runs)


def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels (B, 3, H, W): the parameters of a Gaussian (B, 8, h, w), or latents where `vae` returns those."""
    encoded = vae.encode(pixels)
    return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents


def draw_latents(
    encoded: Tensor, channels: int, generator: Generator | Sequence[Generator] | None, copies: int
) -> Tensor:
    """Draw latents from what `encode_images` returns; latents stay as they are.

    One generator draws for every image; of several, each draws for its own picture.

    Args:
        encoded: (B, 2C, h, w), or (B, C, h, w).
        channels: C.
        generator: one, or one a picture.
        copies: pictures of each image, neighbours staying neighbours.

    Returns:
        (B * copies, C, h, w), not yet multiplied by the scaling factor.
    """
    each = isinstance(generator, Sequence) and len(generator) > 1
    if encoded.shape[1] == channels:
        return encoded.repeat_interleave(copies, dim=0)
    if each:
        return DiagonalGaussianDistribution(encoded.repeat_interleave(copies, dim=0)).sample(generator)
    return DiagonalGaussianDistribution(encoded).sample(generator).repeat_interleave(copies, dim=0)


Ends: TypeAlias = "tuple[float, float] | Literal['batch'] | None"
"""What becomes -1 and 1: two disparities (far, near), the extremes of all maps of a call, or those of each map."""


def fit_depth(disparity: Tensor, height: int, width: int, ends: Ends = None) -> Tensor:
    """Resize maps (B, H, W) of any size and range to the latents' (B, 1, height, width), in [-1, 1].

    `ends` and errors are those of `normalize_depth`.
    """
    resized = F.interpolate(disparity[:, None], size=(height, width), mode="bicubic", align_corners=False)
    return normalize_depth(resized, ends)


def normalize_depth(disparity: Tensor, ends: Ends = None) -> Tensor:
    """Stretch each map, or all of them alike, to the range that the UNet was trained on.

    MiDaS predicts relative inverse depth: no unit, larger is nearer, known only up to scale and shift. Stretching to
    [-1, 1] removes both.

    Args:
        disparity: (B, 1, h, w), float, any range.
        ends: None stretches each map by its own extremes. "batch" stretches all by the extremes of them all, so that
            one depth has one value in all frames of a film. Two numbers (far, near) become -1 and 1, and what lies
            beyond them is clamped.

    Returns:
        (B, 1, h, w), in [-1, 1]; with None both ends are reached in every map, but a constant map is -1 everywhere.

    Raises:
        ValueError: `ends` of another kind, or two that are equal or in the wrong order.

    Source: Stability-AI/stablediffusion, scripts/gradio/depth2img.py, `paint`. For constant maps, where that divides by
        zero, we follow training (ldm/models/diffusion/ddpm.py, `LatentDepth2ImageDiffusion.get_input`), which has 0.001
        more in the denominator.
    """
    if isinstance(ends, (tuple, list)):
        low, high = disparity.new_tensor(ends)
        if not low < high:
            raise ValueError(f"ends must be two disparities, far below near, that differ in float32, got {ends}")
        return (2.0 * (disparity - low) / (high - low) - 1.0).clamp(-1.0, 1.0)
    if ends not in (None, "batch"):
        raise ValueError(f'ends must be None, "batch" or two numbers, got {brief(ends)}')
    dims = (1, 2, 3) if ends is None else (0, 1, 2, 3)
    low, high = disparity.amin(dim=dims, keepdim=True), disparity.amax(dim=dims, keepdim=True)
    extent = torch.where(high > low, high - low, torch.full_like(low, 0.001))
    return 2.0 * (disparity - low) / extent - 1.0
