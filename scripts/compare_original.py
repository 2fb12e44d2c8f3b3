"""Compare the single-file loading with the code that wrote the checkpoint: names, shapes, and what the networks return.

The networks are built by Stability AI's own repository, the text encoder by OpenCLIP as there, filled with random
numbers at the full geometry, saved under the names that a whole checkpoint has, and loaded by `from_single_file`. The
stored key lists of the tests are compared with the names too. 6 GB of memory, a minute a network.

    git clone https://github.com/Stability-AI/stablediffusion && pip install einops omegaconf timm open_clip_torch
    python scripts/compare_original.py stablediffusion
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from depthdiff import AutoencoderKL, CLIPTextModel, DPTForDepthEstimation, UNet2DConditionModel
from depthdiff.checkpoint.ldm import PREFIXES

KEYS = Path(__file__).parent.parent / "tests" / "data" / "keys_ldm.txt.gz"
UNET = {
    "image_size": 32,
    "in_channels": 5,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": 1,
    "context_dim": 1024,
    "legacy": False,
    "use_checkpoint": False,
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
}
"""Both from configs/stable-diffusion/v2-midas-inference.yaml."""

Pair = tuple[Tensor, Tensor]

LIMIT = 1e-5
"""Relative L2; seen were 2.7e-6 at most."""


def fill(network: nn.Module) -> nn.Module:
    """Fill a network with random numbers that let a signal pass: norms about 1, products about as large as inputs."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    return network.eval()


def load_part(prefix: str, path: Path, tensors: dict[str, Tensor], cls: Any, network: nn.Module) -> Any:
    """Write the original's network as a single file and load that; its tensors go into `tensors` as well."""
    tensors |= {prefix + key: value.contiguous().clone() for key, value in network.state_dict().items()}
    save_file(tensors, path)
    return cls.from_single_file(path)


def unet(loaded: Callable[[Any, nn.Module], Any]) -> list[Pair]:
    """Predict noise for two latents at two timesteps."""
    theirs = fill(importlib.import_module("ldm.modules.diffusionmodules.openaimodel").UNetModel(**UNET))
    ours = loaded(UNet2DConditionModel, theirs)
    x, timesteps, context = torch.randn(2, 5, 16, 24), torch.tensor([951, 20]), torch.randn(2, 77, 1024)
    return [(theirs(x, timesteps, context), ours(x, timesteps, context).sample)]


def vae(loaded: Callable[[Any, nn.Module], Any]) -> list[Pair]:
    """Encode and decode."""
    parts, theirs = importlib.import_module("ldm.modules.diffusionmodules.model"), nn.Module()
    theirs.encoder, theirs.decoder = parts.Encoder(**VAE), parts.Decoder(**VAE)
    theirs.quant_conv, theirs.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)
    ours = loaded(AutoencoderKL, fill(theirs))
    x, z = torch.randn(2, 3, 64, 96), torch.randn(2, 4, 8, 12)
    mean, logvar = theirs.quant_conv(theirs.encoder(x)).chunk(2, 1)
    posterior = ours.encode(x).latent_dist
    decoded = theirs.decoder(theirs.post_quant_conv(z)), ours.decode(z).sample
    return [(mean, posterior.mean), (logvar.clamp(-30, 20), posterior.logvar), decoded]


def text_encoder(loaded: Callable[[Any, nn.Module], Any]) -> list[Pair]:
    """Encode two prompts; the original's last layer is not used ("penultimate" in its config)."""
    open_clip = importlib.import_module("open_clip")
    theirs = open_clip.create_model("ViT-H-14", pretrained=None)
    del theirs.visual
    ours = loaded(CLIPTextModel, fill(theirs))
    ids = open_clip.tokenize(["two tigers, a painting!", "a café; 3 DOGS running"])
    x = theirs.token_embedding(ids) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:-1]:
        x = block(x, attn_mask=theirs.attn_mask)
    return [(theirs.ln_final(x), ours(ids).last_hidden_state)]


def depth_estimator(loaded: Callable[[Any, nn.Module], Any]) -> list[Pair]:
    """Estimate depth; the bias keeps the ReLU at the end from hiding everything."""
    theirs = fill(importlib.import_module("ldm.modules.midas.midas.dpt_depth").DPTDepthModel())
    theirs.scratch.output_conv[4].bias.fill_(1.0)
    ours = loaded(DPTForDepthEstimation, theirs)
    x = torch.randn(1, 3, 384, 384).clamp(-1, 1)
    return [(theirs(x), ours(x).predicted_depth)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path, help="of github.com/Stability-AI/stablediffusion")
    sys.path.insert(0, str(parser.parse_args().clone))
    with gzip.open(KEYS, "rt") as file:
        stored = {name: tuple(map(int, shape)) for name, *shape in map(str.split, file)}
    print("| network | tensors | of them in the stored list | largest relative difference of a result |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for work in (unet, vae, text_encoder, depth_estimator):
            name, tensors = work.__name__, dict[str, Tensor]()
            pairs = work(partial(load_part, PREFIXES[name], Path(folder) / "part.safetensors", tensors))
            known = sum(stored.get(key) == tuple(value.shape) for key, value in tensors.items())
            there = sum(key.startswith(PREFIXES[name]) for key in stored)
            worst = max(((theirs - ours).norm() / theirs.norm()).item() for theirs, ours in pairs)
            print(f"| {name} | {len(tensors)} | {known} of {there} | {worst:.1e} |", flush=True)
            if not known == there == len(tensors) or not worst < LIMIT:
                sys.exit(f"{name} is not what the original code makes of it")


if __name__ == "__main__":
    main()
