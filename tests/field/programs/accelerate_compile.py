"""In the manner of a deployment script: `accelerate.prepare`, offload hooks, a compiled UNet that is saved."""

import accelerate
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from PIL import Image

SEED = 0


def random_lora(unet):
    """A LoRA file's content."""
    generator, state = torch.Generator().manual_seed(2), {}
    for name, module in unet.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_v")):
            down = torch.randn(4, module.in_features, generator=generator) / 4
            state[f"unet.{name}.lora_A.weight"] = down
            state[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator) / 8
    return state


def main(checkpoint, photo):
    image, results = Image.open(photo).convert("RGB").resize((96, 64)), {}
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint).to("cpu", torch.float32)
    lora = random_lora(pipe.unet)

    def paint(name, **kwargs):
        generator = torch.Generator().manual_seed(SEED)
        results[name] = pipe("a barn", image, num_inference_steps=3, generator=generator, output_type="np", **kwargs)[0]

    accelerator = accelerate.Accelerator(cpu=True)
    pipe.unet = accelerator.prepare(pipe.unet)
    pipe.unet.eval()
    paint("prepared")
    pipe.unet = accelerator.unwrap_model(pipe.unet)
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    pipe.vae, _ = accelerate.cpu_offload_with_hook(pipe.vae, execution_device="cpu")
    paint("offloaded")
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    accelerate.hooks.remove_hook_from_module(pipe.vae, recurse=True)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe = pipe.to(torch.float64).to(torch.float32)
    pipe.unet.to(memory_format=torch.channels_last)
    paint("compiled and moved")
    pipe.save_pretrained("saved", safe_serialization=True)
    pipe.load_lora_weights(lora, adapter_name="random")
    paint("lora")
    paint("weaker", cross_attention_kwargs={"scale": 0.5})
    torch.compiler.reset()
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained("saved", low_cpu_mem_usage=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    paint("loaded", strength=0.5)
    return results
