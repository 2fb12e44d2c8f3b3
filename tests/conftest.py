"""What all tests share: random pipelines, checkpoints on disk, and a photograph."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from random_checkpoint import build_pipeline

DATA = Path(__file__).parent / "data"
SLOW = {
    *("test_mini_training", "test_train_lora", "test_kills", "test_second_device", "test_compile", "test_cuda_graphs"),
    *("test_damaged_folders", "test_damaged_single_files", "test_fuzz_files", "test_gpu_check", "test_benchmark"),
    *("test_calls", "test_hub_trouble", "test_hub_answers", "test_convolution", "test_tiled", "test_disks"),
}
"""Files of tests that take long; CI runs them all."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Skip what needs a GPU where there is none, and long random tests unless `-m fuzz` asks for them; say so."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("fuzz") and "fuzz" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes; a share of it runs; -m fuzz runs the whole"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A photograph, 600x400."""
    with Image.open(DATA / "coffee.png") as image:
        return image.convert("RGB")


@pytest.fixture(scope="session")
def small_photo(photo) -> Image.Image:
    """The same at 120x88: not square, and no multiple of 64."""
    return photo.resize((120, 88))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A checkpoint of random weights with all widths different, written by us."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    build_pipeline("tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def pipe():
    """A fresh tiny pipeline without a progress bar."""
    pipeline = build_pipeline("tiny")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def seed():
    """Make every test's random numbers its own, whatever ran before."""
    torch.manual_seed(0)
