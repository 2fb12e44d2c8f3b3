"""Ask the UNet for the noise, and push its answer towards the prompt.

Letters: B pictures, C channels, h and w height and width of the latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from depthdiff.inputs import is_guided
from depthdiff.run import Run, check_tensors
from depthdiff.windows import over_windows


def predict_noise(unet: Any, scheduler: Any, run: Run, timestep: Tensor, number: Tensor | None = None) -> Tensor:
    """Ask the UNet for the noise in the latents, and apply guidance.

    Args:
        unet: the network, or one that approximates it.
        scheduler: the run's.
        run: whose latents, embeddings and depth.
        timestep: for the UNet, a tensor without dimensions.
        number: the same on the CPU, for the scheduler.

    Returns:
        (B, 4, h, w).
    """
    check_tensors(run, run.latents, unet)
    latents, embeds, depth = run.latents, run.prompt_embeds, run.depth
    number = timestep if number is None else number
    guided = run.guides(number)
    if is_guided(run.guidance_scale) and not guided:  # outside its interval: the prompts alone
        embeds = embeds.chunk(2)[1]
    rows = len(embeds)
    depth = depth[-rows:] if len(depth) >= rows else torch.cat([depth] * 2)
    sample = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, number)
    sample = torch.cat([sample.to(depth.dtype), depth], dim=1)  # (2B, 5, h, w)

    def predict(part: Tensor) -> Tensor:
        return unet(
            part,
            timestep,
            encoder_hidden_states=embeds,
            cross_attention_kwargs=run.cross_attention_kwargs,
            return_dict=False,
        )[0]

    noise_pred = over_windows(predict, sample, run.windows)
    if not guided:
        return noise_pred
    uncond, cond = noise_pred.chunk(2)
    return rescale_guidance(apply_guidance(uncond, cond, run.guidance_scale), cond, run.guidance_rescale)


def apply_guidance(uncond: Tensor, cond: Tensor, guidance_scale: float | tuple[float, ...]) -> Tensor:
    """Push a prediction away from the one without the prompt.

    Args:
        uncond: (B, 4, h, w), prediction for the negative prompt.
        cond: (B, 4, h, w), prediction for the prompt.
        guidance_scale: 1 gives `cond`, 0 `uncond`; larger follows the prompt more closely. Of several, one a picture,
            those up to 1 give `cond`, as they do alone, where guidance is off.

    Source: arXiv:2207.12598, eq. 6, with w = guidance_scale - 1.
    """
    if isinstance(guidance_scale, tuple):
        wide = torch.promote_types(cond.dtype, torch.float32)  # as one number is multiplied
        scales = torch.tensor([max(scale, 1.0) for scale in guidance_scale], dtype=wide, device=cond.device)
        return uncond + (scales.view(-1, 1, 1, 1) * (cond - uncond).to(wide)).to(cond.dtype)
    return uncond + guidance_scale * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Bring the deviation of a guided prediction back to that of the one for the prompt.

    Args:
        guided: (B, 4, h, w).
        cond: (B, 4, h, w), prediction for the prompt.
        share: in [0, 1]; 0 changes nothing, 1 does so fully.

    Source: arXiv:2305.08891, eqs. 14 to 16.
    """
    if not share:
        return guided
    deviation, wanted = (x.std(dim=(1, 2, 3), keepdim=True) for x in (guided, cond))
    factor = torch.where(deviation > 0, wanted / deviation, 1.0)  # nothing brings a constant back
    return share * guided * factor + (1 - share) * guided
