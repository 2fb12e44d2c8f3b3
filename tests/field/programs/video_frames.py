"""In the manner of a video script: frame after frame, noise kept between them, the last result blended into the next."""

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image

SEED = 0


def read_frames(photo, count):
    """A slow pan over a photograph."""
    image = Image.open(photo).convert("RGB")
    return [image.crop((4 * i, 0, 4 * i + 96, 72)) for i in range(count)]


def smooth(depths, weight=0.6):
    """Depth that does not flicker."""
    kept = [depths[0]]
    for depth in depths[1:]:
        kept.append(weight * depth + (1 - weight) * kept[-1])
    return kept


@torch.no_grad()
def main(checkpoint, photo):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    frames = read_frames(photo, 4)
    inputs = pipe.feature_extractor(images=frames, return_tensors="pt").pixel_values
    depths = smooth(list(pipe.depth_estimator(inputs).predicted_depth))
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt("an oil painting of a cup", "cpu", 1, True, "photo")
    results, previous, kept = [], None, {}

    def keep_latents(pipe, step, timestep, kwargs):
        latents = kwargs["latents"]
        if step == 1 and "latents" in kept:  # the frame before leads this one
            latents = 0.7 * latents + 0.3 * kept["latents"]
        if step == 1:
            kept["latents"] = latents.clone()
        return {"latents": latents}

    for frame, depth in zip(frames, depths):
        if previous is not None:
            frame = Image.blend(frame, Image.fromarray((previous * 255).round().astype(np.uint8)), 0.0)
        result = pipe(
            image=frame, depth_map=depth[None], prompt_embeds=prompt_embeds, strength=0.6, num_inference_steps=5,
            negative_prompt_embeds=negative_prompt_embeds, generator=torch.Generator().manual_seed(SEED),
            callback_on_step_end=keep_latents, output_type="np",
        )  # fmt: skip
        previous = result.images[0]
        results.append(previous)
    latents = pipe("an oil painting", frames[0], generator=torch.Generator().manual_seed(SEED), strength=0.5,
                   num_inference_steps=4, output_type="latent").images  # fmt: skip
    again = pipe("an oil painting", latents, depths[0][None], generator=torch.Generator().manual_seed(SEED),
                 strength=0.3, num_inference_steps=5, output_type="np").images  # fmt: skip
    return np.stack(results), again
