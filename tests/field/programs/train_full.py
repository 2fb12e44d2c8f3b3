"""In the manner of `train_text_to_image.py`: the whole UNet learns, with EMA, SNR weights and checkpointing."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionDepth2ImgPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

SEED = 0


def main(checkpoint, photo):
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel, compute_snr

    noise_scheduler = DDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(checkpoint, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    unet.train()
    unet.enable_gradient_checkpointing()
    ema = EMAModel(unet.parameters(), decay=0.9, model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2)
    lr_scheduler = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=1, num_training_steps=4)
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint, unet=unet, vae=vae)
    image = Image.open(photo).convert("RGB").resize((64, 64))
    batch = torch.cat([pipe.image_processor.preprocess(image), pipe.image_processor.preprocess(image).flip(3)])
    depth = pipe.prepare_depth_map([image, image.transpose(0)], None, 2, False, torch.float32, pipe.device).detach()
    torch.manual_seed(SEED)
    losses = []
    for step in range(4):
        latents = vae.encode(batch).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents) + 0.1 * torch.randn(2, 4, 1, 1)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (2,)).long()
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        input_ids = tokenizer(
            ["a cup", ""], max_length=tokenizer.model_max_length, padding="max_length", truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        encoder_hidden_states = text_encoder(input_ids, return_dict=False)[0]
        model_pred = unet(torch.cat([noisy_latents, depth], 1), timesteps, encoder_hidden_states, return_dict=False)[0]
        snr = compute_snr(noise_scheduler, timesteps)
        weights = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
        loss = (F.mse_loss(model_pred, noise, reduction="none").mean(dim=(1, 2, 3)) * weights).mean()
        loss.backward()
        losses += [loss.item(), torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0).item()]
        optimizer.step(), lr_scheduler.step(), optimizer.zero_grad()
        ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    pipe.unet = unet.eval()
    pipe.save_pretrained("trained")
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained("trained")
    images = pipe("a cup", image, num_inference_steps=3, generator=torch.manual_seed(SEED), output_type="np").images
    return losses, images
