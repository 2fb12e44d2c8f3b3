"""The manifest of the public files agrees with the networks that this package builds."""

from math import floor, log10
from pathlib import Path

import pytest
import torch
from random_checkpoint import GEOMETRIES

from depthdiff import AutoencoderKL, CLIPTextModel, DPTForDepthEstimation, UNet2DConditionModel
from depthdiff.checkpoint.download import MOVED
from depthdiff.checkpoint.weights import PICKLE, SAFETENSORS, weight_files

tomllib = pytest.importorskip("tomllib")  # Python 3.11
PATH = Path(__file__).parent.parent / "weights" / "manifest.toml"
NETWORKS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "depth_estimator": DPTForDepthEstimation,
}
UNUSED = {"depth_estimator": 2 * 768 + 2 * (256 * 256 * 9 + 256)}
"""Published weights that no layer of ours reads: a norm and one residual unit."""


@pytest.fixture(scope="module")
def manifest():
    return tomllib.loads(PATH.read_text(encoding="utf-8"))


def test_sizes_are_those_of_the_networks(manifest):
    files = {file["path"]: file for file in manifest["file"]}
    assert len(files) == len(manifest["file"])
    for name, kind in NETWORKS.items():
        with torch.device("meta"):
            count = kind.from_config(GEOMETRIES["full"][name]).num_parameters()
        for suffix in (SAFETENSORS, PICKLE):
            for variant, width in ((None, 4), ("fp16", 2)):
                file = files[f"{name}/{weight_files(kind.weights_name, variant, suffix)[0]}"]
                assert file["weights"] == count + UNUSED.get(name, 0)
                assert file["dtype"] == ("float32" if width == 4 else "float16")
                least = file["weights"] * width
                if "size" in file:
                    assert least < file["size"] < least * 1.001
                elif "about" in file:
                    digit = 10 ** (floor(log10(file["about"])) - 2)
                    assert abs(file["about"] - least) <= 0.5 * digit + 200_000


def test_what_is_not_exact_says_so(manifest):
    for file in manifest["file"]:
        assert {"size", "about"} & file.keys() or file["path"].endswith(".bin")
        assert not {"size", "about"} <= file.keys()
    ids = [repository["id"] for repository in manifest["repository"]]
    assert {*MOVED, *MOVED.values()} <= set(ids)
