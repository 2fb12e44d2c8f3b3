"""In the manner of diffusers' `train_text_to_image_lora.py`: `add_adapter`, save, load back, fuse."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

SEED = 0


def main(checkpoint, photo):
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    unet, vae, text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False)
    torch.manual_seed(SEED)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
    text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    lora_layers = [p for network in (unet, text_encoder) for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(lora_layers, lr=1e-2)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    image = Image.open(photo).convert("RGB").resize((96, 64))
    depth = pipe.prepare_depth_map(image, None, 1, False, torch.float32, pipe.device).detach()
    latents = vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mode() * vae.config.scaling_factor
    ids = pipe.tokenizer("a sks cup", padding="max_length", truncation=True, return_tensors="pt").input_ids
    unet.train()
    losses = []
    for step in range(5):
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        x = torch.cat([scheduler.add_noise(latents, noise, t), depth], 1)
        loss = F.mse_loss(unet(x, t, text_encoder(ids)[0]).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    unet.eval()

    def paint(**kwargs):
        generator = torch.manual_seed(0)
        return pipe("a sks cup", image, None, 0.8, 3, generator=generator, output_type="np", **kwargs)[0]

    trained = paint()
    layers = [convert_state_dict_to_diffusers(get_peft_model_state_dict(network)) for network in (unet, text_encoder)]
    type(pipe).save_lora_weights(
        save_directory="lora", unet_lora_layers=layers[0], text_encoder_lora_layers=layers[1], safe_serialization=True
    )
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    before = paint()
    pipe.load_lora_weights("lora", weight_name="pytorch_lora_weights.safetensors")
    loaded, weaker = paint(), paint(cross_attention_kwargs={"scale": 0.5})
    pipe.fuse_lora(lora_scale=0.7)
    fused = paint()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    return losses, [trained, before, loaded, weaker, fused, paint()]
