"""Half precision on a CUDA device beside diffusers; skipped where there is none."""

import diffusers
import numpy as np
import pytest
import torch
from random_checkpoint import build_pipeline

import depthdiff

pytestmark = pytest.mark.gpu


def paint(package, folder, image, device, dtype):
    pipe = package.StableDiffusionDepth2ImgPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 6, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipe.to(device)("two tigers", image, **arguments).images


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_to_float32_as_the_references(tmp_path, small_photo, dtype):
    folder = tmp_path / "checkpoint"
    build_pipeline("small").save_pretrained(folder)
    exact = paint(depthdiff, folder, small_photo, "cpu", torch.float32)
    ours, theirs = (
        np.abs(paint(package, folder, small_photo, "cuda", dtype) - exact).mean() for package in (depthdiff, diffusers)
    )
    assert ours <= 1.5 * theirs + 1e-3
