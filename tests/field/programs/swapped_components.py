"""In the manner of a studio script that shares components: a tiny autoencoder, one UNet for several pipelines."""

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionDepth2ImgPipeline, UNet2DConditionModel
from PIL import Image

SEED = 0


def tiny_autoencoder(levels):
    """Stands for `AutoencoderTiny.from_pretrained("madebyollin/taesd")`."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(5)
    widths, blocks = (16,) * levels, (1,) * levels
    return AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths,
                           num_encoder_blocks=blocks, num_decoder_blocks=blocks).eval()  # fmt: skip


def their_unet(checkpoint):
    """A UNet of diffusers' own class, whatever this pipeline is from."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")


def main(checkpoint, photo):
    image = Image.open(photo).convert("RGB").resize((96, 80))
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    assert isinstance(pipe, StableDiffusionDepth2ImgPipeline)
    call = dict(prompt="a village", image=image, num_inference_steps=4, strength=0.8, output_type="np")
    taesd = tiny_autoencoder(len(pipe.vae.config.block_out_channels))
    previews, results = [], []

    def preview(pipe, i, t, kwargs):
        with torch.no_grad():
            previews.append((taesd.decode(kwargs["latents"]).sample / 2 + 0.5).clamp(0, 1))
        return {}

    def paint(pipe, **kwargs):
        results.append(pipe(**call, generator=torch.manual_seed(SEED), **kwargs).images)

    paint(pipe, callback_on_step_end=preview)
    second = StableDiffusionDepth2ImgPipeline(**pipe.components)
    second.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert second.unet is pipe.unet and pipe.scheduler is not second.scheduler
    paint(second)
    third = StableDiffusionDepth2ImgPipeline.from_pipe(second)
    third.vae = taesd
    paint(third)
    fourth = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint, unet=their_unet(checkpoint), vae=taesd)
    paint(fourth)
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict())
    pipe.unet = unet.eval()
    paint(pipe, guidance_scale=3.0)
    return previews, results
