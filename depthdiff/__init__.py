"""Stable Diffusion 2 depth-to-image, from scratch in pure PyTorch; read `depthdiff.pipeline` first.

Examples:
    >>> import torch
    >>> from PIL import Image
    >>> from depthdiff import StableDiffusionDepth2ImgPipeline
    >>> pipe = StableDiffusionDepth2ImgPipeline.from_pretrained("mini")  # the small model that comes along
    >>> scene = Image.open("docs/scene.png")
    >>> generator = torch.Generator().manual_seed(0)
    >>> pipe("a golden sphere and a blue cube", scene, num_inference_steps=5, generator=generator).images[0].size
    (128, 128)

    The loop is yours:

    >>> run = pipe.prepare("a red ball", scene, strength=0.5, num_inference_steps=8, generator=generator)
    >>> [(step.index, int(step.timestep), tuple(step.latents.shape)) for step in pipe.denoise(run)][-1]
    (3, 1, (1, 4, 32, 32))
    >>> pipe.decode(run.latents)[0].size
    (128, 128)
"""

from depthdiff.config import CheckpointError
from depthdiff.image_processor import DPTImageProcessor
from depthdiff.models.clip_text import CLIPTextConfig, CLIPTextModel
from depthdiff.models.dpt import DPTConfig, DPTForDepthEstimation
from depthdiff.models.unet import UNet2DConditionConfig, UNet2DConditionModel
from depthdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from depthdiff.pipeline import StableDiffusionDepth2ImgPipeline
from depthdiff.run import Run, StableDiffusionPipelineOutput
from depthdiff.sampler import Step
from depthdiff.schedulers.ddim import DDIMScheduler
from depthdiff.schedulers.lms import LMSDiscreteScheduler
from depthdiff.schedulers.pndm import PNDMScheduler
from depthdiff.tokenizer import CLIPTokenizer

__version__ = "0.1.0"

__all__ = [
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionPipelineOutput",
    "Run",
    "Step",
    "UNet2DConditionModel",
    "UNet2DConditionConfig",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "CLIPTextModel",
    "CLIPTextConfig",
    "CLIPTokenizer",
    "DPTForDepthEstimation",
    "DPTConfig",
    "DPTImageProcessor",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "CheckpointError",
]
