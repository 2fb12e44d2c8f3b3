"""In the manner of CPU deployments: dynamic quantisation, then an engine's object in the UNet's place."""

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image
from torch.ao.quantization import quantize_dynamic

SEED = 0


def compiled_engine(module):
    """Stands for an OpenVINO or TensorRT engine: numpy in, numpy out."""

    def infer(inputs):
        with torch.no_grad():
            tensors = [torch.from_numpy(inputs[name]) for name in ("sample", "timestep", "encoder_hidden_states")]
            return {"out_sample": module(*tensors)[0].numpy()}

    return infer


class EngineUNet:
    def __init__(self, engine, unet):
        self.engine, self.config, self.dtype, self.device = engine, unet.config, unet.dtype, torch.device("cpu")
        self.calls = 0

    def __call__(self, latent_model_input, t, encoder_hidden_states, cross_attention_kwargs=None, return_dict=False):
        self.calls += 1
        outputs = self.engine({
            "sample": latent_model_input.numpy(),
            "timestep": np.atleast_1d(t.numpy()),
            "encoder_hidden_states": encoder_hidden_states.numpy(),
        })  # fmt: skip
        return (torch.from_numpy(outputs["out_sample"]),)


def main(checkpoint, photo):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    image = Image.open(photo).convert("RGB").resize((96, 64))
    plain, results = pipe.unet, {}

    def paint(name):
        generator = torch.Generator().manual_seed(SEED)
        results[name] = pipe("a lighthouse", image, num_inference_steps=4, generator=generator, output_type="np").images

    pipe.text_encoder = quantize_dynamic(pipe.text_encoder, {torch.nn.Linear}, dtype=torch.qint8)
    results["embeds"] = pipe.encode_prompt("a lighthouse", pipe.device, 1, True)[0]
    pipe.text_encoder = type(pipe).from_pretrained(checkpoint).text_encoder
    pipe.unet = quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
    paint("int8")  # rounding of activations makes much of little: only whether it is a picture is asked
    results["int8"] = float(np.isfinite(results["int8"]).all() and results["int8"].std() > 0.01)
    pipe.unet = quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.float16)
    paint("float16")
    pipe.unet = EngineUNet(compiled_engine(plain), plain)
    paint("engine")
    assert pipe.unet.calls == 3
    return results
