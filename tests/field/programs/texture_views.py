"""In the manner of TEXTure: view after view is painted by its rendered depth, within masks."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

SEED = 0


class StableDiffusion:
    def __init__(self, checkpoint):
        self.vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae").requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(checkpoint, subfolder="text_encoder")
        self.unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").eval()
        self.scheduler = DDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler")

    @torch.no_grad()
    def get_text_embeds(self, prompt):
        ids = [self.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
               for text in ("", prompt)]  # fmt: skip
        return self.text_encoder(torch.cat(ids))[0]

    @torch.no_grad()
    def img2img_step(self, embeds, pixels, depth, update, keep, steps=6, strength=1.0, guidance=7.5):
        depth = F.interpolate(depth, size=(8, 12), mode="bicubic", align_corners=False)
        low, high = torch.aminmax(depth)
        depth = torch.cat([2 * (depth - low) / (high - low) - 1] * 2)
        clean = self.vae.encode(2 * pixels - 1).latent_dist.mode() * self.vae.config.scaling_factor
        update, keep = (F.interpolate(mask, (8, 12), mode="nearest") for mask in (update, keep))
        self.scheduler.set_timesteps(steps)
        noise = torch.randn_like(clean)
        latents = self.scheduler.add_noise(clean, noise, self.scheduler.timesteps[:1])
        for i, t in enumerate(self.scheduler.timesteps):
            noised = self.scheduler.add_noise(clean, noise, t[None])
            mask = update if i % 2 else torch.clamp(update - keep, 0, 1)  # a checkerboard in half of the steps
            latents = latents * mask + noised * (1 - mask)
            x = torch.cat([torch.cat([latents] * 2), depth], dim=1)
            uncond, text = self.unet(x, t, encoder_hidden_states=embeds)["sample"].chunk(2)
            latents = self.scheduler.step(uncond + guidance * (text - uncond), t, latents)["prev_sample"]
        image = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (image / 2 + 0.5).clamp(0, 1)


def main(checkpoint, photo):
    model = StableDiffusion(checkpoint)
    torch.manual_seed(SEED)
    image = np.array(Image.open(photo).convert("RGB").resize((96, 64)))
    texture, views = torch.from_numpy(image / 255.0).float().permute(2, 0, 1)[None], []
    board = (torch.arange(64)[:, None] // 16 + torch.arange(96) // 16).remainder(2).float()[None, None]
    for side, turn in (("front", 0), ("left", 32), ("back", 64)):
        update = torch.zeros(1, 1, 64, 96).index_fill_(3, torch.arange(turn, turn + 32), 1.0)
        depth = texture.roll(turn, 3).mean(1, keepdim=True)
        view = model.img2img_step(model.get_text_embeds(f"a teapot, {side} view"), texture, depth, update, board)
        texture = view * update + texture * (1 - update)
        views.append(view)
    return views, texture
