"""Depth-to-image in one file: the library's use, nothing hidden.

python scripts/depth2img.py CHECKPOINT PHOTO "PROMPT" RESULT.png
"""

import sys

import torch
from PIL import Image

from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline


def main(checkpoint: str, photo: str, prompt: str, result: str) -> None:
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    run = pipe.prepare(
        prompt,
        Image.open(photo),
        strength=0.8,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
    )
    for step in pipe.denoise(run):  # the loop is yours: look at a step, or change step.latents
        print(f"step {step.index + 1} of {len(run)}, timestep {int(step.timestep)}")
    pipe.decode(run.latents)[0].save(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
