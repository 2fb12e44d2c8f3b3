"""One checkpoint in both packages, and one way to paint with either."""

from __future__ import annotations

import diffusers
import torch

import depthdiff


def load_both(folder):
    """Load our pipeline and diffusers' without progress bars."""
    pipes = [
        package.StableDiffusionDepth2ImgPipeline.from_pretrained(folder, local_files_only=True)
        for package in (depthdiff, diffusers)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def paint(pipe, photo, **options):
    """Paint two tigers in arrays, always from the same seed."""
    call = {"prompt": "two tigers", "image": photo, "num_inference_steps": 4, "strength": 0.8, "output_type": "np"}
    return pipe(**{**call, **options}, generator=torch.Generator().manual_seed(0)).images
