"""In the manner of a notebook that gives the pipeline Depth Anything instead of its own depth net."""

import torch
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

SEED = 0


def depth_anything():
    """The architecture, with random weights."""
    torch.manual_seed(3)
    backbone = Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, image_size=56, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=24, patch_size=14, neck_hidden_sizes=[8, 12, 16, 16],
        fusion_hidden_size=12, head_hidden_size=8,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config).eval()
    torch.nn.init.constant_(model.head.conv3.bias, 1.0)
    return model


def main(checkpoint, photo):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(
        checkpoint,
        scheduler=DDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler"),
        depth_estimator=depth_anything(),
        feature_extractor=DPTImageProcessor(
            size={"height": 56, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14
        ),
    )
    init_image = Image.open(photo).convert("RGB")
    generator = torch.manual_seed(SEED)
    images = pipe(
        ["a robot", "an old painting"], image=init_image, num_inference_steps=4, strength=0.75,
        num_images_per_prompt=1, generator=generator, output_type="np",
    ).images  # fmt: skip
    latents = pipe(
        "a robot", init_image, None, 0.6, 5, 1.0, generator=torch.manual_seed(SEED), output_type="latent",
        return_dict=False,
    )[0]  # fmt: skip
    return images, latents
