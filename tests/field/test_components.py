"""Components from elsewhere in our pipeline, beside diffusers': depth nets, autoencoders, wrapped and quantised UNets.

What `tests/parity/test_pipeline_contract.py` and `tests/test_sharing.py` prove (networks of diffusers and transformers,
a tiny autoencoder, adapters on a compiled UNet) is not repeated here.
"""

from __future__ import annotations

import copy

import accelerate
import diffusers
import numpy as np
import peft
import pytest
import torch
import transformers
from torch.ao.quantization import quantize_dynamic

import depthdiff
from depthdiff import fast
from tests.parity.both import load_both, paint

TOLERANCE = 2e-3  # of full range; observed: at most 5e-5 where nothing else is said


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_both(tiny_folder)


@pytest.fixture
def pair(loaded):
    return [copy.deepcopy(pipe) for pipe in loaded]


def close(pair, photo, other=None, **options):
    """Paint with both: the same, and not what `other` is."""
    one, two = (paint(pipe, photo, **options) for pipe in pair)
    assert one.shape == two.shape and np.abs(one - two).max() < TOLERANCE
    assert other is None or np.abs(one - other).max() > 10 * TOLERANCE
    return one


def depth_nets():
    torch.manual_seed(0)
    shared = {"neck_hidden_sizes": [8, 12, 16, 16], "fusion_hidden_size": 12}
    dpt = transformers.DPTConfig(hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=48,
                                 image_size=64, backbone_out_indices=[0, 1, 2, 3], **shared)  # fmt: skip
    dino = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=4, num_attention_heads=3, image_size=56,
                                     patch_size=14, reshape_hidden_states=False,
                                     out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    anything = transformers.DepthAnythingConfig(backbone_config=dino, reassemble_hidden_size=24, patch_size=14,
                                                head_hidden_size=8, **shared)  # fmt: skip
    nets = transformers.DPTForDepthEstimation(dpt), transformers.DepthAnythingForDepthEstimation(anything)
    for last in (nets[0].head.head[4], nets[1].head.conv3):
        torch.nn.init.constant_(last.bias, 1.0)  # the head ends in a ReLU: keep it alive
    sizes = {"size": {"height": 64, "width": 64}}, {"size": {"height": 56, "width": 84}, "ensure_multiple_of": 14,
                                                    "keep_aspect_ratio": True}  # fmt: skip
    return [(net.eval(), transformers.DPTImageProcessor(**size)) for net, size in zip(nets, sizes, strict=True)]


@pytest.mark.parametrize("number", [0, 1], ids=["DPT", "Depth Anything"])
def test_depth_nets_of_transformers_with_their_own_processors(pair, small_photo, number):
    net, processor = depth_nets()[number]
    before = paint(pair[0], small_photo)
    for pipe in pair:
        pipe.depth_estimator, pipe.feature_extractor = net, processor
    close(pair, small_photo, before)
    close(pair, [small_photo, small_photo.transpose(0)], prompt=["a", "b"])


def test_a_unet_wrapped_by_peft(pair, small_photo):
    """`get_peft_model`, whose wrapper stands for the UNet, with an adapter that changes the picture."""
    before = paint(pair[0], small_photo)
    for pipe in pair:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet = peft.get_peft_model(pipe.unet, config)
    close(pair, small_photo, before)
    for pipe in pair:
        pipe.unet = pipe.unet.merge_and_unload()
    close(pair, small_photo, before)


def test_a_unet_with_weights_of_eight_bits(pair, small_photo):
    """One call: within a picture rounding to int8 makes much of 1e-6, in either package."""
    draw = torch.Generator().manual_seed(0)
    sample, prompts = torch.randn(2, 5, 8, 12, generator=draw), torch.randn(2, 77, 40, generator=draw)
    fast.disable(pair[0])
    found = []
    for pipe in pair:
        exact = pipe.unet
        pipe.unet = quantize_dynamic(exact, {torch.nn.Linear}, dtype=torch.qint8)
        assert pipe.unet is not exact and "quantized" in type(pipe.unet.time_embedding.linear_1).__module__
        with torch.no_grad():
            found.append(pipe.unet(sample, 501, encoder_hidden_states=prompts).sample)
            assert (found[-1] - exact(sample, 501, prompts).sample).abs().max() > 0.01
        assert paint(pipe, small_photo).std() > 0.01
    assert (found[0] - found[1]).abs().max() < 1e-5  # observed: 0


class Callable:
    """A UNet that is not a module, such as an engine's."""

    def __init__(self, unet):
        self.unet, self.config, self.dtype, self.device = unet, unet.config, unet.dtype, unet.device

    def __call__(self, sample, timestep, encoder_hidden_states, **kwargs):
        return self.unet(sample, timestep, encoder_hidden_states, **kwargs)


def test_a_unet_that_is_no_module(pair, small_photo):
    before = paint(pair[0], small_photo)
    for pipe in pair:
        pipe.unet = Callable(pipe.unet)
        pipe.to(torch.float32)
    assert np.abs(close(pair, small_photo) - before).max() < TOLERANCE


def test_accelerates_prepare_and_offloading(pair, small_photo):
    """Weights that are on the meta device between the calls of their layers."""
    before = paint(pair[0], small_photo)
    for pipe in pair:
        pipe.unet = accelerate.Accelerator(cpu=True).prepare(pipe.unet)
    close(pair, small_photo)
    for pipe in pair:
        accelerate.cpu_offload(pipe.unet, execution_device="cpu")
        assert {weight.device.type for weight in pipe.unet.parameters()} == {"meta"}
    assert np.abs(close(pair, small_photo) - before).max() < TOLERANCE
    ours = pair[0]  # transformers' own text encoder fails so
    for network in (ours.text_encoder, ours.depth_estimator):
        accelerate.cpu_offload(network, execution_device="cpu")
    assert np.abs(paint(ours, small_photo) - before).max() < TOLERANCE
    accelerate.cpu_offload(ours.vae, execution_device="cpu")
    assert ours.device.type == "meta" and ours._execution_device.type == "cpu"


def test_a_compiled_unet_moves_and_is_saved_for_both(pair, small_photo, tmp_path):
    before = paint(pair[0], small_photo)
    for pipe, folder in zip(pair, ("ours", "theirs"), strict=True):
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        assert pipe.to(torch.float64).unet.dtype == torch.float64
        pipe.to(torch.float32).save_pretrained(tmp_path / folder)
        assert pipe.config["unet"] == ("diffusers", "UNet2DConditionModel")
        for package in (depthdiff, diffusers):
            again = package.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / folder)
            assert np.abs(paint(again, small_photo) - before).max() < TOLERANCE
