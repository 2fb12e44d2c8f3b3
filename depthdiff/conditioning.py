"""What the UNet is told: the prompts as context, the depth, and the images as latents.

Letters: B batch, P prompts, N negative prompts, L tokens, C their channels, h and w height and width of the latents.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from depthdiff.cache import Cache, fingerprint, state_of
from depthdiff.image import to_pixels
from depthdiff.inputs import expand
from depthdiff.models.clip_text import CLIPTextModel
from depthdiff.models.dpt import DPTForDepthEstimation
from depthdiff.models.gaussian import DiagonalGaussianDistribution
from depthdiff.models.vae import AutoencoderKL
from depthdiff.noise import randn
from depthdiff.precision import finite
from depthdiff.schedulers.plan import Plan
from depthdiff.tokenizer import CLIPTokenizer

logger = logging.getLogger(__name__)


def read_texts(
    texts: list[str],
    negatives: list[str],
    clip_skip: int | None,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    device: torch.device,
    cache: Cache,
) -> Tensor:
    """Encode prompts and negative prompts in one batch, equal ones once.

    Args:
        texts: P prompts.
        negatives: N negative prompts.
        clip_skip: how many of the encoder's last layers to leave out, for the prompts only.
        tokenizer: text to tokens.
        encoder: tokens to context.
        device: where the encoder works.
        cache: where the same texts may have been encoded before.

    Returns:
        (P + N, L, C), the prompts first.
    """
    wanted = [(text, clip_skip) for text in texts] + [(text, None) for text in negatives]
    unique = list(dict.fromkeys(text for text, _ in wanted))
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    ids = tokenizer(unique, padding="max_length", max_length=length, truncation=True).input_ids
    for text, all_ids in zip(unique, tokenizer(unique).input_ids, strict=True):
        if len(all_ids) > length:
            lost = tokenizer.decode(all_ids[length - 1 : -1])
            logger.warning("%r has %d tokens; of the end is not read: %r", text[:40], len(all_ids) - 2, lost)

    def encode(encoder: CLIPTextModel) -> Tensor:
        output = encoder(torch.tensor(ids, device=device), output_hidden_states=clip_skip is not None)
        rows = []
        for text, skip in wanted:
            row = unique.index(text)
            if skip is None:
                rows.append(output.last_hidden_state[row])
            else:
                rows.append(encoder.final_layer_norm(output.hidden_states[-(skip + 1)][row]))
        return torch.stack(rows)

    rows = tuple((tuple(ids[unique.index(text)]), skip) for text, skip in wanted)
    state = state_of(encoder, "text", rows, str(device))
    return cache.get(state, lambda: finite("text_encoder", encoder, encode))


def encode_images(
    images: list[Image.Image] | Tensor, vae: AutoencoderKL, device: torch.device, dtype: torch.dtype, cache: Cache
) -> DiagonalGaussianDistribution:
    """Describe the latents of images, as `dtype`.

    Args:
        images: as `depthdiff.image.read_images` returns them.
        vae: the autoencoder.
        device: where it works.
        dtype: of the latents.
        cache: where the same images may have been encoded before.
    """
    pixels = to_pixels(images, vae.factor)

    def encode(vae: AutoencoderKL) -> Tensor:
        moments: Tensor = vae.encode(pixels.to(device, vae.dtype)).latent_dist.parameters  # type: ignore[union-attr]
        return moments

    state = state_of(vae, "latents", fingerprint(pixels), vae.use_slicing, vae.use_tiling, str(device))
    moments = cache.get(state, lambda: finite("vae", vae, encode))
    return DiagonalGaussianDistribution(moments.to(dtype))


def noisy_latents(
    clean: Tensor | DiagonalGaussianDistribution,
    plan: Plan,
    pictures: int,
    per_prompt: int,
    scaling_factor: float,
    generator: Generator | Sequence[Generator] | None,
) -> Tensor:
    """Give every picture its latents, and add the noise of the first step: (pictures * per_prompt, 4, h, w).

    One generator draws for every image encoded and then the noise; of several, each draws for its own picture.

    Args:
        clean: the latents (N, 4, h, w), or what `encode_images` says of them.
        plan: knows the noise level.
        pictures: before `per_prompt`; a multiple of N.
        per_prompt: pictures of each prompt.
        scaling_factor: of the autoencoder, for what is drawn.
        generator: one, or one a picture.
    """
    if isinstance(clean, Tensor):
        latents = expand(clean, pictures, per_prompt)
    elif isinstance(generator, Sequence) and len(generator) > 1:
        posterior = clean.map(lambda moments: expand(moments, pictures, per_prompt))
        latents = scaling_factor * posterior.sample(generator)
    else:
        latents = expand(scaling_factor * clean.sample(generator), pictures, per_prompt)
    noise = randn(latents.shape, generator, device=latents.device, dtype=latents.dtype)
    return plan.add_noise(latents, noise)


def read_disparity(pixels: Tensor, net: DPTForDepthEstimation, device: torch.device, cache: Cache) -> Tensor:
    """Estimate the disparity (B, H, W), near is large, of pixels (B, 3, H, W) as the depth net's processor makes them.

    Args:
        pixels: float, normalized.
        net: the depth net.
        device: where it works.
        cache: where the depth of the same pixels may have been estimated before.
    """

    def estimate(net: DPTForDepthEstimation) -> Tensor:
        disparity: Tensor = net(pixels.to(device, net.dtype)).predicted_depth
        return disparity

    state = state_of(net, "disparity", fingerprint(pixels), str(device))
    return cache.get(state, lambda: finite("depth_estimator", net, estimate))


def fit_depth(disparity: Tensor, height: int, width: int) -> Tensor:
    """Bring maps (B, H, W) of any size and range to the latents' (B, 1, height, width), in [-1, 1]."""
    resized = F.interpolate(disparity[:, None], size=(height, width), mode="bicubic", align_corners=False)
    return normalize_depth(resized)


def normalize_depth(disparity: Tensor) -> Tensor:
    """Stretch each map to the range the UNet was trained on.

    MiDaS predicts relative inverse depth: no unit, larger is nearer, known only up to scale and shift. Stretching to
    [-1, 1] removes both.

    Args:
        disparity: (B, 1, h, w), float, any range.

    Returns:
        (B, 1, h, w), in [-1, 1]; both ends are reached in every map, but a constant map is -1 everywhere.

    Source: Stability-AI/stablediffusion, scripts/gradio/depth2img.py, `paint`. For constant maps, where that divides by
        zero, we follow training (ldm/models/diffusion/ddpm.py, `LatentDepth2ImageDiffusion.get_input`), which has 0.001
        more in the denominator.
    """
    low, high = disparity.amin(dim=(1, 2, 3), keepdim=True), disparity.amax(dim=(1, 2, 3), keepdim=True)
    extent = torch.where(high > low, high - low, torch.full_like(low, 0.001))
    return 2.0 * (disparity - low) / extent - 1.0
