"""In the manner of a demo that estimates depth with transformers' DPT and passes it as `depth_map=`."""

import numpy as np
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from PIL import Image
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

SEED = 0


def depth_model():
    """A DPT that needs no download."""
    torch.manual_seed(7)
    config = DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=16,
        neck_hidden_sizes=[8, 16, 24, 32], fusion_hidden_size=16, backbone_out_indices=[0, 1, 2, 3],
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    model = DPTForDepthEstimation(config).eval()
    torch.nn.init.constant_(model.head.head[4].bias, 1.0)
    return model, DPTImageProcessor(size={"height": 64, "width": 64})


@torch.no_grad()
def estimate(image):
    model, processor = depth_model()
    inputs = processor(images=image, return_tensors="pt")
    outputs = model(**inputs)
    prediction = processor.post_process_depth_estimation(outputs, target_sizes=[(image.height, image.width)])
    return prediction[0]["predicted_depth"].unsqueeze(0)


def main(checkpoint, photo):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipe = pipe.to("cpu")
    pipe.enable_attention_slicing()
    image = Image.open(photo).convert("RGB")
    depth = estimate(image)
    results = {}
    for strength in (0.4, 0.9):
        generator = torch.Generator("cpu").manual_seed(SEED)
        out = pipe(
            prompt="a living room, wooden floor", image=image, depth_map=depth, negative_prompt="blurry",
            strength=strength, num_inference_steps=5, guidance_scale=7.5, generator=generator, output_type="np",
        )  # fmt: skip
        results[strength] = out.images[0]
    gray = (depth - depth.min()) / (depth.max() - depth.min())
    return results, np.asarray(gray[0])
