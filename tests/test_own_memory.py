"""Weights in memory of the process's own: nothing that happens to their files changes them."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from depthdiff import StableDiffusionDepth2ImgPipeline


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_files_may_be_cut_off_after_loading(tiny_folder, tmp_path, small_photo, form):
    """A mapped file that is cut off ends the process by a signal; these are no longer looked at."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    if form == "bin":
        for path in folder.rglob("*.safetensors"):
            name = {"model": "pytorch_model"}.get(path.stem, path.stem)
            torch.save(load_file(path), path.with_name(f"{name}.bin"))
            path.unlink()

    def paint(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a toy", small_photo, num_inference_steps=2, generator=generator, output_type="np").images

    mapped = paint(StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder))
    expected = paint(StableDiffusionDepth2ImgPipeline.from_pretrained(folder, low_cpu_mem_usage=False))
    assert np.abs(expected - mapped).max() < 1e-5  # observed: 1.3e-7, as kernels depend on where weights begin
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    for path in folder.rglob(f"*.{form}"):
        path.open("r+b").truncate(0)
    assert np.array_equal(paint(pipe), expected)


def test_other_values_are_refused(tiny_folder):
    with pytest.raises(TypeError, match="low_cpu_mem_usage must be True or False, got str"):
        StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder, low_cpu_mem_usage="no")
