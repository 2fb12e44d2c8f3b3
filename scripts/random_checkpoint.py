"""Write a checkpoint of random weights in the published layout: the architecture without the training.

It makes noise, not pictures; tests, benchmarks and the demo use it where the real 5 GB are out of reach.

    python scripts/random_checkpoint.py FOLDER [--geometry tiny|small|full] [--dtype float32|float16|bfloat16]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthdiff import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    DPTForDepthEstimation,
    DPTImageProcessor,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
)

VOCABULARY = Path(__file__).parent.parent / "tests" / "data" / "tokenizer"

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def bit(hidden_sizes: list[int], depths: list[int], embedding_size: int, num_groups: int) -> dict[str, Any]:
    """Describe a backbone as the published config does."""
    return {
        "model_type": "bit",
        "hidden_sizes": hidden_sizes,
        "depths": depths,
        "embedding_size": embedding_size,
        "num_groups": num_groups,
        "layer_type": "bottleneck",
        "global_padding": "SAME",
        "embedding_dynamic_padding": True,
        "out_features": ["stage1", "stage2", "stage3"],
    }


def vae(widths: list[int], layers: int, groups: int, sample_size: int) -> dict[str, Any]:
    """Describe an autoencoder as the published config does."""
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "sample_size": sample_size,
    }


def dpt(
    hidden: int, layers: int, heads: int, size: int, neck: list[int], fusion: int, taps: list[int]
) -> dict[str, Any]:
    """Describe a hybrid depth net as the published config does, but for its backbone."""
    return {
        "is_hybrid": True,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "image_size": size,
        "neck_hidden_sizes": neck,
        "fusion_hidden_size": fusion,
        "backbone_out_indices": taps,
        "readout_type": "project",
        "reassemble_factors": [1, 1, 1, 0.5],
        "neck_ignore_stages": [0, 1],
    }


GEOMETRIES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "unet": {
            "sample_size": 64,
            "in_channels": 5,
            "block_out_channels": [32, 48, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": [2, 3, 4],
            "cross_attention_dim": 40,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "use_linear_projection": True,
        },
        "vae": vae([8, 16, 24, 32], 1, 4, 64),
        "text_encoder": {
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "hidden_act": "gelu",
        },
        "depth_estimator": {
            **dpt(48, 5, 4, 64, [16, 32, 40, 56], 24, [0, 1, 2, 4]),
            "backbone_config": bit([16, 32, 64], [1, 2, 1], 8, 4),
            "backbone_featmap_shape": [1, 64, 4, 4],
        },
    },
    "small": {
        "unet": {
            "sample_size": 64,
            "in_channels": 5,
            "block_out_channels": [64, 96, 128, 160],
            "attention_head_dim": [2, 3, 4, 5],
            "cross_attention_dim": 96,
            "layers_per_block": 2,
            "use_linear_projection": True,
        },
        "vae": vae([32, 64, 64, 96], 2, 32, 128),
        "text_encoder": {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "hidden_act": "quick_gelu",
        },
        "depth_estimator": {
            **dpt(96, 6, 6, 128, [32, 64, 80, 112], 40, [1, 2, 4, 5]),
            "backbone_config": bit([32, 64, 128], [2, 1, 3], 16, 8),
            "backbone_featmap_shape": [1, 128, 8, 8],
        },
    },
    "full": {  # Stable Diffusion 2 depth: 1.41 billion weights
        "unet": {
            "sample_size": 64,
            "in_channels": 5,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        "vae": vae([128, 256, 512, 512], 2, 32, 256),
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
            "vocab_size": 49408,
        },
        "depth_estimator": {
            **dpt(768, 12, 12, 384, [256, 512, 768, 768], 256, [2, 5, 8, 11]),
            "backbone_config": bit([256, 512, 1024], [3, 4, 9], 64, 32),
            "backbone_featmap_shape": [1, 1024, 24, 24],
        },
    },
}


def randomize(model: nn.Module, seed: int) -> None:
    """Fill a network with weights under which signals neither die nor explode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                is_scale = "norm" in name and name.endswith("weight")
                parameter.normal_(1.0 if is_scale else 0.0, 0.1, generator=generator)
            if name in ("head.conv3.bias", "head.head.4.bias"):
                parameter.fill_(3.0)  # the depth head ends in a ReLU: keep it alive


def load_tokenizer() -> CLIPTokenizer:
    """Make a tokenizer of Stable Diffusion 2's kind, which pads with "!", from a small vocabulary."""
    vocab = json.loads((VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
    merges = (VOCABULARY / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return CLIPTokenizer(vocab, [line for line in merges if line], pad_token="!", model_max_length=77)


def build_pipeline(geometry: str = "tiny", seed: int = 0) -> StableDiffusionDepth2ImgPipeline:
    """Build a pipeline of random weights."""
    configs, tokenizer = GEOMETRIES[geometry], load_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    networks = {
        "unet": UNet2DConditionModel.from_config(configs["unet"]),
        "vae": AutoencoderKL.from_config(configs["vae"]),
        "text_encoder": CLIPTextModel.from_config(text | configs["text_encoder"]),
        "depth_estimator": DPTForDepthEstimation.from_config(configs["depth_estimator"]),
    }
    for i, network in enumerate(networks.values()):
        randomize(network, seed + i)
        network.eval()
    size = configs["depth_estimator"]["image_size"]
    return StableDiffusionDepth2ImgPipeline(
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(**SCHEDULER),
        feature_extractor=DPTImageProcessor.from_config({"size": {"height": size, "width": size}}),
        **networks,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = build_pipeline(arguments.geometry, arguments.seed)
    pipeline.to(getattr(torch, arguments.dtype)).save_pretrained(arguments.folder)
    print(f"wrote {arguments.folder}: random weights, which make noise, not pictures")


if __name__ == "__main__":
    main()
