"""In the manner of ComfyUI custom nodes: classes with INPUT_TYPES, images as tensors (B, H, W, C) in [0, 1]."""

import torch
from diffusers import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler, StableDiffusionDepth2ImgPipeline

SEED = 0
SCHEDULERS = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "lms": LMSDiscreteScheduler}


class LoadDepth2Img:
    RETURN_TYPES, FUNCTION, CATEGORY = ("DEPTH_PIPE",), "load", "depth2img"
    cache = {}  # noqa: RUF012

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"path": ("STRING", {"default": ""}), "dtype": (["float32", "bfloat16"],)}}

    def load(self, path, dtype):
        if (path, dtype) not in self.cache:
            pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(path, torch_dtype=getattr(torch, dtype))
            pipe.set_progress_bar_config(disable=True)
            self.cache[path, dtype] = pipe
        return (self.cache[path, dtype],)


class SampleDepth2Img:
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "IMAGE", "LATENT"), ("image", "depth", "latent")
    FUNCTION, CATEGORY = "sample", "depth2img"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        numbers = {"steps": ("INT", {"default": 20}), "cfg": ("FLOAT", {"default": 7.5})}
        choices = {"scheduler": (list(SCHEDULERS),), "seed": ("INT", {"default": 0})}
        return {"required": {"pipe": ("DEPTH_PIPE",), "image": ("IMAGE",), **numbers, **choices}}

    @torch.no_grad()
    def sample(self, pipe, image, positive, negative, steps, cfg, denoise, scheduler, seed):
        pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
        pixels = image.movedim(-1, 1)  # (B, C, H, W)
        pictures = pipe.numpy_to_pil(image.numpy())
        depth = pipe.prepare_depth_map(pictures, None, len(image), False, pipe.dtype, pipe.device)
        latents = pipe(
            [positive] * len(image), image=pixels, depth_map=depth[:, 0], negative_prompt=[negative] * len(image),
            strength=denoise, num_inference_steps=steps, guidance_scale=cfg, output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        out = pipe.decode_latents(latents)
        return torch.from_numpy(out), (depth / 2 + 0.5).movedim(1, -1).expand(-1, -1, -1, 3), {"samples": latents}


def main(checkpoint, photo):
    from diffusers.utils import load_image

    pixels = torch.frombuffer(bytearray(load_image(photo).resize((96, 72)).tobytes()), dtype=torch.uint8)
    image = pixels.view(1, 72, 96, 3).float() / 255
    (pipe,) = LoadDepth2Img().load(checkpoint, "float32")
    node, batch = SampleDepth2Img(), torch.cat([image, image.flip(2)])
    return [node.sample(pipe, batch, "a cup", "blurry", 4, 7.5, 0.75, name, SEED) for name in SCHEDULERS]
