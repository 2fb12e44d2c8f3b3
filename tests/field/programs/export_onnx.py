"""In the manner of an ONNX exporter: UNet, decoder and text encoder by `torch.onnx.export`, checked by onnx."""

import onnx
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from onnx.reference import ReferenceEvaluator

SEED = 0


class UNetWrapper(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.unet(sample, timestep, encoder_hidden_states).sample


class TextWrapper(torch.nn.Module):
    def __init__(self, text_encoder):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids):
        return self.text_encoder(input_ids)[0]


class Decode(torch.nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample):
        return self.vae.decode(latent_sample).sample


def export(model, inputs, name):
    torch.onnx.export(
        model.eval(), tuple(inputs.values()), f"{name}.onnx", input_names=list(inputs), output_names=["out"],
        opset_version=18, dynamo=True, verbose=False,
    )  # fmt: skip
    onnx.checker.check_model(f"{name}.onnx")
    session = ReferenceEvaluator(f"{name}.onnx")
    result = session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]
    torch.testing.assert_close(torch.from_numpy(result), model(*inputs.values()), atol=1e-3, rtol=1e-3)
    return result


@torch.no_grad()
def main(checkpoint, photo):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    torch.manual_seed(SEED)
    ids, context = torch.randint(0, 400, (1, 77)), torch.randn(1, 77, pipe.unet.config.cross_attention_dim)
    sample = {"sample": torch.randn(1, 5, 4, 8), "timestep": torch.tensor([321]), "encoder_hidden_states": context}
    return [
        export(UNetWrapper(pipe.unet), sample, "unet"),
        export(TextWrapper(pipe.text_encoder), {"input_ids": ids}, "text_encoder"),
        export(Decode(pipe.vae), {"latent_sample": torch.randn(1, 4, 2, 3)}, "vae_decoder"),
    ]
