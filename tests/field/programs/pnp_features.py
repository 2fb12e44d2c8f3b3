"""In the manner of plug-and-play and TokenFlow: features and attention of a source are injected."""

import types

import torch
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image

SEED = 0


def register_attention(unet, threshold):
    def sa_forward(self):
        def forward(x, encoder_hidden_states=None, attention_mask=None):
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
            if self.t >= threshold:
                n = len(x) // 3
                q[n : 2 * n], q[2 * n :], k[n : 2 * n], k[2 * n :] = q[:n], q[:n], k[:n], k[:n]
            q, k, v = (self.head_to_batch_dim(y) for y in (q, k, v))
            sim = (q @ k.transpose(1, 2) * self.scale).softmax(dim=-1)
            return self.to_out[0](self.batch_to_head_dim(sim @ v))

        return forward

    for module in unet.modules():
        if module.__class__.__name__ == "BasicTransformerBlock":
            module.attn1.forward, module.attn1.t = sa_forward(module.attn1), 0


def conv_forward(self, input_tensor, temb):
    h = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
    h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
    h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
    if self.t >= 400:
        h[len(h) // 3 :] = h[: len(h) // 3].repeat(2, 1, 1, 1)
    return (self.conv_shortcut(input_tensor) + h) / self.output_scale_factor


@torch.no_grad()
def main(checkpoint, photo):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    pipe.scheduler = DDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    unet, image = pipe.unet, Image.open(photo).convert("RGB").resize((96, 64))
    embeds = pipe.encode_prompt("a fox", pipe.device, 1, True)[::-1]
    embeds = torch.cat([embeds[0], *embeds])
    depth = pipe.prepare_depth_map(image, None, 1, False, torch.float32, pipe.device)
    clean = 0.18215 * pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mean
    pipe.scheduler.set_timesteps(6)
    register_attention(unet, 500)
    unet.up_blocks[1].resnets[1].forward = types.MethodType(conv_forward, unet.up_blocks[1].resnets[1])
    noise = torch.randn(clean.shape, generator=torch.manual_seed(SEED))
    latents = pipe.scheduler.add_noise(clean, noise, pipe.scheduler.timesteps[:1])
    for t in pipe.scheduler.timesteps:
        for module in unet.modules():
            module.t = int(t)
        x = torch.cat([pipe.scheduler.add_noise(clean, noise, t), latents, latents])
        x = torch.cat([x, depth.expand(3, -1, -1, -1)], 1)
        _, uncond, cond = unet(x, t, encoder_hidden_states=embeds)["sample"].chunk(3)
        latents = pipe.scheduler.step(uncond + 7.5 * (cond - uncond), t, latents)["prev_sample"]
    return (pipe.vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
