"""Repaint a photo with diffusers, as a user's script would: the counterpart of the command `depthdiff`.

python scripts/bench/repaint.py MODEL PROMPT IMAGE OUT STEPS STRENGTH GUIDANCE SEED DEVICE DTYPE
"""

import sys

import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from PIL import Image

model, prompt, image, out, steps, strength, guidance, seed, device, dtype = sys.argv[1:]
pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(
    model, torch_dtype=getattr(torch, dtype), local_files_only=True
).to(device)
pipe.set_progress_bar_config(disable=True)
pipe(
    prompt,
    Image.open(image).convert("RGB"),
    num_inference_steps=int(steps),
    strength=float(strength),
    guidance_scale=float(guidance),
    generator=[torch.Generator().manual_seed(int(seed))],
).images[0].save(out)
