"""In the manner of threestudio and stable-dreamfusion: a loss whose gradient is the UNet's guess paints an image."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image
from torch import nn

SEED = 0


class SpecifyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_tensor, gt_grad):
        ctx.save_for_backward(gt_grad)
        return torch.ones([1])

    @staticmethod
    def backward(ctx, grad_scale):
        return ctx.saved_tensors[0] * grad_scale, None


class StableDiffusion(nn.Module):
    def __init__(self, checkpoint, t_range=(0.02, 0.98)):
        super().__init__()
        pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
        self.pipe, self.vae, self.unet = pipe, pipe.vae, pipe.unet
        self.scheduler = DDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
        self.low, self.high = (int(self.scheduler.config.num_train_timesteps * share) for share in t_range)
        self.alphas = self.scheduler.alphas_cumprod
        self.requires_grad_(False)

    def train_step(self, text_embeddings, pred_rgb, depth, guidance_scale=100.0):
        pred_rgb = F.interpolate(pred_rgb, (64, 64), mode="bilinear")
        t = torch.randint(self.low, self.high + 1, [1], dtype=torch.long)
        latents = self.vae.encode(2 * pred_rgb - 1).latent_dist.sample() * self.vae.config.scaling_factor
        with torch.no_grad():
            noise = torch.randn_like(latents)
            x = torch.cat([self.scheduler.add_noise(latents, noise, t)] * 2)
            uncond, cond = self.unet(torch.cat([x, depth], 1), t, encoder_hidden_states=text_embeddings).sample.chunk(2)
            noise_pred = cond + guidance_scale * (cond - uncond)
        grad = torch.nan_to_num((1 - self.alphas[t]) * (noise_pred - noise))
        return SpecifyGradient.apply(latents, grad), grad.norm()


def main(checkpoint, photo):
    sd = StableDiffusion(checkpoint)
    image = Image.open(photo).convert("RGB").resize((80, 80))
    cond, uncond = sd.pipe.encode_prompt("a stone bust", "cpu", 1, True)
    depth = F.interpolate(sd.pipe.prepare_depth_map(image, None, 1, True, torch.float32, sd.pipe.device), (8, 8))
    torch.manual_seed(SEED)
    texture, norms = nn.Parameter(torch.rand(1, 3, 80, 80)), []
    optimizer = torch.optim.SGD([texture], lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        loss, norm = sd.train_step(torch.cat([uncond, cond]), texture, depth)
        loss.backward()
        norms += [norm.item(), texture.grad.norm().item()]
        optimizer.step()
    return norms, texture.clamp(0, 1)
