"""In the manner of a repository that brings its own depth by overriding `prepare_depth_map`."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image, ImageDraw

SEED = 0


class RenderedDepthPipeline(StableDiffusionDepth2ImgPipeline):
    """Depth that a renderer wrote, in metres, with 0 where there is no surface."""

    near, far = 0.5, 4.0

    def prepare_depth_map(self, image, depth_map, batch_size, do_classifier_free_guidance, dtype, device):
        if depth_map is None:  # nothing rendered: the published way
            return super().prepare_depth_map(image, depth_map, batch_size, do_classifier_free_guidance, dtype, device)
        depth = torch.as_tensor(np.asarray(depth_map), dtype=torch.float32, device=device)[None, None]
        inverse = torch.where(depth > 0, 1 / depth.clamp(self.near, self.far), torch.zeros_like(depth))
        w, h = image.size if isinstance(image, Image.Image) else image[0].size
        size = (h // self.vae_scale_factor, w // self.vae_scale_factor)
        inverse = F.interpolate(inverse, size=size, mode="bilinear", antialias=True)
        low, high = torch.aminmax(inverse)
        inverse = (2.0 * (inverse - low) / (high - low) - 1.0).to(dtype)
        inverse = inverse.repeat(batch_size, 1, 1, 1)
        return torch.cat([inverse] * 2) if do_classifier_free_guidance else inverse


def render(size):
    """A ball in front of a wall, as a z-buffer."""
    canvas = Image.new("F", size, 0.0)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, size[0], size[1] // 2), fill=3.5)
    draw.ellipse((30, 20, 80, 70), fill=1.25)
    return canvas


def main(checkpoint, photo):
    pipe = RenderedDepthPipeline.from_pretrained(checkpoint)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    image = Image.open(photo).convert("RGB")
    call = dict(strength=0.8, num_inference_steps=5, output_type="np")
    rendered = pipe("a ball", image, render(image.size), generator=torch.manual_seed(SEED), **call).images
    pipe.far = 1.5
    closer = pipe("a ball", image=[image], depth_map=render(image.size), guidance_scale=1.0,
                  generator=torch.manual_seed(SEED), **call).images  # fmt: skip
    plain = pipe("a ball", image, num_images_per_prompt=2, generator=torch.manual_seed(SEED), **call).images
    assert type(pipe).__name__ in str(type(pipe)) and isinstance(pipe, StableDiffusionDepth2ImgPipeline)
    return {"rendered": rendered, "closer": closer, "plain": plain}
