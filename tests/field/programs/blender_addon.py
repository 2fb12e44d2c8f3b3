"""In the manner of a Blender add-on: seamless axes, previews while it works, pixels as flat RGBA floats."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image

SEED = 0


def seamless(model, x, y):
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):

            def forward(inputs, weight, bias, module=module):
                pad = module._reversed_padding_repeated_twice
                inputs = F.pad(inputs, (pad[0], pad[1], 0, 0), "circular" if x else "constant")
                inputs = F.pad(inputs, (0, 0, pad[2], pad[3]), "circular" if y else "constant")
                return F.conv2d(inputs, weight, bias, module.stride, 0, module.dilation, module.groups)

            module._conv_forward = forward


def unseamless(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            del module._conv_forward


class Addon:
    def __init__(self, checkpoint):
        self.pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
        self.pipe.scheduler = PNDMScheduler.from_config(self.pipe.scheduler.config)
        self.previews = []
        self.factors = torch.tensor([[0.3, 0.2, 0.2], [0.2, 0.3, 0.2], [-0.2, 0.2, 0.3], [-0.2, 0, -0.5]])

    def preview(self, step, timestep, latents):
        self.previews.append((torch.einsum("bchw,cr->bhwr", latents, self.factors) / 4 + 0.5).clamp(0, 1))

    def preview_at_end(self, pipe, step, timestep, tensors):
        self.preview(step, timestep, tensors["latents"])
        return tensors

    def project(self, photo, seamless_axes="off", **kwargs):
        x, y = {"off": (False, False), "x": (True, False), "xy": (True, True)}[seamless_axes]
        models = (self.pipe.unet, self.pipe.vae)
        [seamless(model, x, y) for model in models]
        kwargs = {"generator": torch.manual_seed(SEED), "output_type": "np", **kwargs}
        result = self.pipe("wooden planks", photo, None, 0.8, 4, **kwargs)
        [unseamless(model) for model in models]
        return np.flipud(np.pad(result.images[0], [(0, 0), (0, 0), (0, 1)], constant_values=1)).ravel()


def main(checkpoint, photo):
    addon, image = Addon(checkpoint), Image.open(photo).convert("RGB")
    pixels = [addon.project(image, axes, callback_on_step_end=addon.preview_at_end) for axes in ("off", "x", "xy")]
    pixels.append(addon.project(image, "xy", callback=addon.preview, callback_steps=2))
    return pixels, torch.cat(addon.previews)
