"""Draw the README's picture: a scene, its depth as the bundled model reads it, and three prompts.

python scripts/mini/picture.py docs/scene.png docs/mini.png
"""

from __future__ import annotations

import sys

import torch
from evaluate import GUIDANCE, STEPS
from PIL import Image
from scenes import random_scene, render, to_pictures

from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from depthdiff.image import contact_sheet, depth_image

SCENE = 4_000_050
"""Neither trained on nor part of the evaluation."""

PROMPTS = (
    "a golden sphere and a blue cube, at sunset",
    "a red ball, a white box and a green cone on a wooden table",
    "a purple ball, an orange cube and a cyan cone at night",
)
SHOWN = 192
"""Pixels at which the pictures, of 128, are shown."""


def main(scene_path: str, sheet_path: str) -> None:
    scene = render([random_scene(SCENE)])
    photo = Image.fromarray(to_pictures(scene.image)[0])
    photo.save(scene_path)
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained("mini")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    depth = pipe.estimate_depth(photo)
    results = [
        pipe(
            prompt,
            photo,
            strength=1.0,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        for prompt in PROMPTS
    ]
    tiles = [photo, depth_image(depth[0], bits=8), *results]
    tiles = [tile.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC) for tile in tiles]
    contact_sheet(tiles, ["input", "its depth", "prompt 1", "prompt 2", "prompt 3"]).save(sheet_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
