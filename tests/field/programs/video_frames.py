"""In the manner of a video script: frame after frame, latents kept between them, results blended in."""

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
            frame = Image.blend(frame, Image.fromarray((previous * 255).round().astype(np.uint8)), 0.3)
        result = pipe(
            image=frame, depth_map=depth[None], prompt_embeds=prompt_embeds, strength=0.6, num_inference_steps=5,
            negative_prompt_embeds=negative_prompt_embeds, generator=torch.Generator().manual_seed(SEED),
            callback_on_step_end=keep_latents, output_type="np",
        )  # fmt: skip
        previous = result.images[0]
        results.append(previous)
    first, second = (torch.stack([torch.from_numpy(result) for result in pair]) for pair in (results[:2], results[2:]))
    latents = pipe.vae.encode(2 * torch.cat([first, second]).permute(0, 3, 1, 2) - 1).latent_dist.mode()
    between = pipe.vae.decode((latents[:-1] + latents[1:]) / 2).sample  # twice the frame rate
    return np.stack(results), pipe.image_processor.postprocess(between, output_type="np")
