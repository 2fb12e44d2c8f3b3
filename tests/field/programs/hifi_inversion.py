"""In the manner of HiFi-123: DDIM inversion of a reference, then denoising that reads its attention, led by depth."""

import torch
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image

SEED = 0


class Injecting(AttnProcessor):
    """Self-attention of the new view reads keys and values of the reference, row 0, beside its own."""

    on = True

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        if encoder_hidden_states is None and self.on and len(hidden_states) > 1:
            reference = hidden_states[:1].expand_as(hidden_states)
            encoder_hidden_states = torch.cat([hidden_states, reference], dim=1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


@torch.no_grad()
def invert(pipe, latents, embeds, depth, steps):
    """Source: arXiv:2105.05233, appendix F: the deterministic step backwards."""
    trajectory, alphas = [latents], pipe.scheduler.alphas_cumprod
    for t in reversed(pipe.scheduler.timesteps):
        now, before = t, t - pipe.scheduler.config.num_train_timesteps // steps
        a, b = alphas[now], alphas[before] if before >= 0 else pipe.scheduler.final_alpha_cumprod
        eps = pipe.unet(torch.cat([latents, depth], 1), t, embeds).sample
        clean = (latents - (1 - b) ** 0.5 * eps) / b**0.5
        latents = a**0.5 * clean + (1 - a) ** 0.5 * eps
        trajectory.append(latents)
    return trajectory[::-1]


def main(checkpoint, photo):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    image = Image.open(photo).convert("RGB").resize((96, 64))
    pipe.scheduler.set_timesteps(6)
    depth = pipe.prepare_depth_map(image, None, 1, False, torch.float32, pipe.device).detach()
    pixels = pipe.image_processor.preprocess(image)
    torch.manual_seed(SEED)
    latents = pipe.prepare_latents(pixels, pipe.scheduler.timesteps[-1:], 1, 1, torch.float32, pipe.device)
    embeds = pipe.encode_prompt("a toy", pipe.device, 1, False)[0].detach()
    trajectory = invert(pipe, latents, embeds, depth, 6)
    pipe.unet.set_attn_processor(Injecting())
    novel = trajectory[0].flip(3).clone()
    for t, reference in zip(pipe.scheduler.timesteps, trajectory):
        novel = novel.detach().requires_grad_()
        x = torch.cat([torch.cat([reference, novel]), torch.cat([depth, depth.flip(3)])], 1)
        eps = pipe.unet(x, t, encoder_hidden_states=embeds.expand(2, -1, -1)).sample[1:]
        step = pipe.scheduler.step(eps, t, novel, eta=0.0)
        loss = ((step.pred_original_sample.mean(1, keepdim=True) - depth.flip(3)) ** 2).mean()
        (gradient,) = torch.autograd.grad(loss, novel)  # depth guidance
        novel = step.prev_sample.detach() - 0.5 * gradient / gradient.norm()
    with torch.no_grad():
        novel = pipe.decode_latents(novel)
    return trajectory, novel, loss.item()
