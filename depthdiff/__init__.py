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

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthdiff.config import CheckpointError
    from depthdiff.image_processor import DPTImageProcessor
    from depthdiff.models.autoencoder_tiny import AutoencoderTiny
    from depthdiff.models.clip import CLIPTextConfig, CLIPTextModel
    from depthdiff.models.dpt import DPTConfig, DPTForDepthEstimation
    from depthdiff.models.unet import UNet2DConditionModel
    from depthdiff.models.vae import AutoencoderKL
    from depthdiff.pipeline import StableDiffusionDepth2ImgPipeline
    from depthdiff.pipeline_utils import DiffusionPipeline
    from depthdiff.run import Run, StableDiffusionPipelineOutput, Step
    from depthdiff.schedulers.ddim import DDIMInverseScheduler, DDIMScheduler
    from depthdiff.schedulers.ddpm import DDPMScheduler
    from depthdiff.schedulers.deis import DEISMultistepScheduler
    from depthdiff.schedulers.dpm_sde import DPMSolverSDEScheduler
    from depthdiff.schedulers.dpm_singlestep import DPMSolverSinglestepScheduler
    from depthdiff.schedulers.dpm_solver import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler
    from depthdiff.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
    from depthdiff.schedulers.heun import HeunDiscreteScheduler, KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
    from depthdiff.schedulers.lcm import LCMScheduler, TCDScheduler
    from depthdiff.schedulers.lms import LMSDiscreteScheduler
    from depthdiff.schedulers.pndm import PNDMScheduler
    from depthdiff.schedulers.sa_solver import SASolverScheduler
    from depthdiff.schedulers.unipc import UniPCMultistepScheduler
    from depthdiff.tokenizer import CLIPTokenizer

__version__ = "0.1.0"

__all__ = [
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionPipelineOutput",
    "DiffusionPipeline",
    "Run",
    "Step",
    "UNet2DConditionModel",
    "AutoencoderKL",
    "AutoencoderTiny",
    "CLIPTextModel",
    "CLIPTextConfig",
    "CLIPTokenizer",
    "DPTForDepthEstimation",
    "DPTConfig",
    "DPTImageProcessor",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "CheckpointError",
]

HOMES = {
    "StableDiffusionDepth2ImgPipeline": "pipeline",
    "StableDiffusionPipelineOutput": "run",
    "DiffusionPipeline": "pipeline_utils",
    "Run": "run",
    "Step": "run",
    "UNet2DConditionModel": "models.unet",
    "AutoencoderKL": "models.vae",
    "AutoencoderTiny": "models.autoencoder_tiny",
    "CLIPTextModel": "models.clip",
    "CLIPTextConfig": "models.clip",
    "CLIPTokenizer": "tokenizer",
    "DPTForDepthEstimation": "models.dpt",
    "DPTConfig": "models.dpt",
    "DPTImageProcessor": "image_processor",
    "DDIMScheduler": "schedulers.ddim",
    "PNDMScheduler": "schedulers.pndm",
    "LMSDiscreteScheduler": "schedulers.lms",
    "DDPMScheduler": "schedulers.ddpm",
    "EulerDiscreteScheduler": "schedulers.euler",
    "EulerAncestralDiscreteScheduler": "schedulers.euler",
    "HeunDiscreteScheduler": "schedulers.heun",
    "KDPM2DiscreteScheduler": "schedulers.heun",
    "KDPM2AncestralDiscreteScheduler": "schedulers.heun",
    "DPMSolverMultistepScheduler": "schedulers.dpm_solver",
    "DPMSolverSinglestepScheduler": "schedulers.dpm_singlestep",
    "DPMSolverSDEScheduler": "schedulers.dpm_sde",
    "DEISMultistepScheduler": "schedulers.deis",
    "UniPCMultistepScheduler": "schedulers.unipc",
    "SASolverScheduler": "schedulers.sa_solver",
    "LCMScheduler": "schedulers.lcm",
    "TCDScheduler": "schedulers.lcm",
    "DDIMInverseScheduler": "schedulers.ddim",
    "DPMSolverMultistepInverseScheduler": "schedulers.dpm_solver",
    "CheckpointError": "config",
}
"""Public name -> its module."""


if not TYPE_CHECKING:  # whose names are those above

    def __getattr__(name: str) -> Any:
        """Import everything when the first public name, or module of the package, is asked for.

        So the command can set up its process, and a program ask for the version, before torch is imported.
        """
        spec = None if name in HOMES or name[:1] == "_" or not name.isidentifier() else find_spec(f"{__name__}.{name}")
        if name not in HOMES and (spec is None or spec.origin is None):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        modules = {home: import_module(f"{__name__}.{home}") for home in HOMES.values()}
        return getattr(modules[HOMES[name]], name) if name in HOMES else import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """List what is there and what can be asked for."""
    return [*globals(), *HOMES]
