"""In the manner of an exporter: `torch.jit.trace` and `torch.export` of UNet, VAE and text encoder, saved and run."""

import functools

import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from PIL import Image

SEED = 0


class Wrapped(torch.nn.Module):
    """A traced network in the place of the UNet."""

    def __init__(self, traced, unet):
        super().__init__()
        self.traced, self.in_channels = traced, unet.config.in_channels
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype

    def forward(self, latent_model_input, t, encoder_hidden_states, **kwargs):
        return self.traced(latent_model_input, t, encoder_hidden_states)


class Decoder(torch.nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, z):
        return self.vae.decode(z, return_dict=False)[0]


@torch.no_grad()
def main(checkpoint, photo):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    image = Image.open(photo).convert("RGB").resize((96, 64))
    torch.manual_seed(SEED)
    sample, context = torch.randn(2, 5, 8, 12), torch.randn(2, 77, pipe.unet.config.cross_attention_dim)
    t, z, ids = torch.tensor(501), torch.randn(1, 4, 8, 12), torch.randint(0, 400, (1, 77))
    unet = pipe.unet
    program = torch.export.export(unet, (sample, t, context), strict=False)
    torch.export.save(program, "unet.pt2")
    unet.forward = functools.partial(unet.forward, return_dict=False)
    traced = torch.jit.trace(unet, (sample, t, context), check_trace=False)
    traced.save("unet.pt")
    traced = torch.jit.load("unet.pt")
    exported = program.module()(sample, t, context)
    decoder = torch.jit.trace(Decoder(pipe.vae), z, check_trace=False)
    encoder = torch.export.export(pipe.text_encoder, (ids,), strict=False).module()
    results = [traced(sample, t, context)[0], exported.sample, decoder(z), encoder(ids).last_hidden_state]
    pipe.unet = Wrapped(traced, unet)
    generator = torch.manual_seed(SEED)
    return results, pipe("a cabin", image, None, 0.6, 5, generator=generator, output_type="np").images
