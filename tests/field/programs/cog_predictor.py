"""In the manner of a Replicate (cog) predictor: `setup` loads once, `predict` is called by the platform."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image

SEED = 0


def make_scheduler(name, config):
    return {
        "PNDM": PNDMScheduler.from_config(config),
        "KLMS": LMSDiscreteScheduler.from_config(config),
        "DDIM": DDIMScheduler.from_config(config),
    }[name]


class Predictor:
    def setup(self, checkpoint):
        """Load the model into memory to make running multiple predictions efficient"""
        self.pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(
            checkpoint, torch_dtype=torch.float32, cache_dir="cache", local_files_only=True
        ).to("cpu")

    @torch.inference_mode()
    def predict(self, prompt, input_image, negative_prompt=None, num_outputs=1, prompt_strength=0.8,
                num_inference_steps=5, guidance_scale=7.5, scheduler="DDIM", seed=None):  # fmt: skip
        if seed is None:
            seed = int.from_bytes(os.urandom(2), "big")
        self.pipe.scheduler = make_scheduler(scheduler, self.pipe.scheduler.config)
        generator = torch.Generator("cpu").manual_seed(seed)
        output = self.pipe(
            prompt=[prompt] * num_outputs if prompt is not None else None,
            negative_prompt=[negative_prompt] * num_outputs if negative_prompt is not None else None,
            image=Image.open(input_image).convert("RGB"), strength=prompt_strength, guidance_scale=guidance_scale,
            generator=generator, num_inference_steps=num_inference_steps,
        )  # fmt: skip
        paths = []
        for i, sample in enumerate(output.images):
            path = Path(tempfile.gettempdir()) / f"out-{os.getpid()}-{i}.png"
            sample.save(path)
            paths.append(path)
        return paths


def main(checkpoint, photo):
    predictor = Predictor()
    predictor.setup(checkpoint)
    outputs = []
    for name in ("DDIM", "KLMS", "PNDM"):
        paths = predictor.predict("two tigers", photo, "bad anatomy", num_outputs=2, scheduler=name, seed=SEED)
        outputs += [np.array(Image.open(path)) for path in paths]
    return outputs
