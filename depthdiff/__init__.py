"""Stable Diffusion 2 depth-to-image, from scratch in pure PyTorch; read `depthdiff.pipeline` first."""

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
