"""Measure what the approximations of a call save and what they cost, and print it as a Markdown table.

    python scripts/mini/approximations.py MODEL [--scenes 16] [--only deep_cache]

Saved are FLOPs of the UNet over a whole run, of the model's geometry and of the full one at 512x512, counted without
computing anything. The cost is the distance of the latents from the default's, relative to their norm, and what
`evaluate.py` measures of the pictures.
"""

from __future__ import annotations

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from evaluate import BATCH, GUIDANCE, STEPS, Evaluation
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from depthdiff import DDIMScheduler, UNet2DConditionModel
from depthdiff.approximations import approximated, resolve_preset

sys.path.append(str(Path(__file__).parents[1]))
from random_checkpoint import GEOMETRIES

CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"guidance_interval": (0.0, 0.8)},
    {"guidance_interval": (0.2, 1.0)},
    {"guidance_interval": (0.4, 1.0)},
    {"guidance_interval": (0.2, 0.8)},
    {"deep_cache": 2},
    {"deep_cache": 3},
    {"deep_cache": 4},
    {"deep_cache": 5},
    {"token_merging": 0.25},
    {"token_merging": 0.5},
    {"token_merging": 0.75},
    {"deep_cache": 3, "guidance_interval": (0.2, 1.0)},
    {"deep_cache": 3, "guidance_interval": (0.4, 1.0)},
    {"deep_cache": 3, "guidance_interval": (0.2, 1.0), "token_merging": 0.5},
    {"deep_cache": 4, "guidance_interval": (0.2, 1.0)},
    {"preset": "fast"},
)


def unet_flops(unet: UNet2DConditionModel, side: int, options: dict[str, Any], guidance: float) -> float:
    """Count the UNet's operations over a run of one picture at strength 1.

    Args:
        unet: on the meta device, where nothing is computed.
        side: height and width of the latents.
        options: of `pipe(...)`.
        guidance: guidance is on above 1.
    """
    meta, scheduler, chosen = torch.device("meta"), DDIMScheduler(), resolve_preset(**{"preset": None, **options})
    scheduler.set_timesteps(STEPS)
    sample = torch.empty(2, unet.config.in_channels, side, side, device=meta)
    prompt_embeds = torch.empty(2, 77, unet.config.cross_attention_dim, device=meta)
    working = approximated(unet, chosen)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for timestep in scheduler.timesteps:
            share = timestep.item() / scheduler.config.num_train_timesteps
            rows = 1 + (guidance > 1 and chosen.guides(share))
            working(sample[:rows], timestep, encoder_hidden_states=prompt_embeds[:rows])
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--only", metavar="TEXT", default="", help="only choices whose row holds this")
    parser.add_argument("--no-pictures", action="store_true", help="count operations alone")
    arguments = parser.parse_args()
    evaluation = Evaluation(arguments.model, arguments.scenes)
    own = deepcopy(evaluation.pipe.unet).to("meta")
    with torch.device("meta"):
        full = UNet2DConditionModel.from_config(GEOMETRIES["full"]["unet"])
    sides = (evaluation.shown.image.shape[-1] // evaluation.pipe.vae_scale_factor, 64)

    print("| options | saved here | saved in full | error | geometry | outline | colours |")
    print("|---|---|---|---|---|---|---|")
    expected: Tensor | None = None
    whole: dict[UNet2DConditionModel, float] = {}
    for options in CHOICES:
        name = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "default"
        if options and arguments.only not in name:
            continue
        cells = [name]
        for unet, side in zip((own, full), sides, strict=True):
            if unet not in whole:
                whole[unet] = unet_flops(unet, side, {}, arguments.guidance)
            cells.append(f"{1 - unet_flops(unet, side, options, arguments.guidance) / whole[unet]:.0%}")
        if not arguments.no_pictures:
            latents = evaluation.paint(1.0, arguments.guidance, evaluation.captions, output_type="latent", **options)
            expected = latents if expected is None else expected
            pictures = torch.cat([evaluation.pipe.decode(some, "pt") for some in latents.split(BATCH)])
            scores = evaluation.scores(pictures)
            cells.append(f"{((latents - expected).norm() / expected.norm()).item():.3f}")
            cells += [f"{scores['geometry']:.3f}", f"{scores['outline']:.3f}", f"{scores['colours']:.1%}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
