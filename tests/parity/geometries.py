"""Tiny geometries of the networks, and networks of both sides with the same random weights."""

from __future__ import annotations

import diffusers
import torch
import transformers
from torch import Tensor, nn

from depthdiff.models.clip import CLIPTextConfig, CLIPTextModel
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.models.vae import AutoencoderKL

SD2 = {
    "sample_size": 16,
    "in_channels": 5,
    "block_out_channels": (16, 24, 32, 48),
    "attention_head_dim": (2, 3, 4, 6),
    "cross_attention_dim": 20,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
SD1 = {
    "block_out_channels": (16, 24),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 20,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
SHORT = {
    **SD2,
    "block_out_channels": (16, 24, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 3, 4),
    "layers_per_block": 1,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 24, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 17,
    "hidden_act": "gelu",
    "pad_token_id": 1,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
GEOMETRIES = {
    "unet": {
        "sd2": SD2,
        "sd1": SD1,
        "uneven": {
            **SD2,
            "block_out_channels": (24, 36, 48),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": (2, 3, 4),
            "cross_attention_dim": (20, 20, 20),
            "transformer_layers_per_block": (2, 1, 3),
            "layers_per_block": (1, 3, 2),
            "norm_num_groups": 6,
            "norm_eps": 1e-3,
        },
        "short": SHORT,
        "plain middle": {**SD1, "mid_block_type": "UNetMidBlock2D", "upcast_attention": True},
        "no middle": {**SD1, "mid_block_type": None},
        "angles": {**SD1, "flip_sin_to_cos": False, "freq_shift": 1},
    },
    "vae": {
        "sd": VAE,
        "one level": {"block_out_channels": (16,), "norm_num_groups": 4},
        "bare": {**VAE, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
    },
    "text": {
        "sd2": TEXT,
        "sd1": {**TEXT, "hidden_act": "quick_gelu", "eos_token_id": 2, "num_hidden_layers": 2},
        "strong": {**TEXT, "initializer_factor": 2.0, "initializer_range": 0.1, "num_hidden_layers": 2},
    },
}
CASES = [(kind, name) for kind, geometries in GEOMETRIES.items() for name in geometries]
MAIN = [("unet", "sd2"), ("unet", "sd1"), ("vae", "sd"), ("text", "sd2")]
SIDES = ("ours", "reference")
KINDS = {
    "unet": (UNet2DConditionModel, diffusers.UNet2DConditionModel),
    "vae": (AutoencoderKL, diffusers.AutoencoderKL),
    "text": (CLIPTextModel, transformers.CLIPTextModel),
}


def build(kind: str, name: str, side: str) -> nn.Module:
    """Construct a network of one side, in train mode, with the weights that the random generator gives."""
    config = GEOMETRIES[kind][name]
    network = KINDS[kind][SIDES.index(side)]
    if kind != "text":
        return network(**config)
    return network((CLIPTextConfig if side == "ours" else transformers.CLIPTextConfig)(**config))


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Move every weight, biases and norms too, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return network


def copy_weights(ours: nn.Module, reference: nn.Module) -> None:
    """Load the reference's weights into ours; the text encoder's get the level that transformers 5 has dropped."""
    prefix = "text_model." if type(ours).__name__ == "CLIPTextModel" else ""
    ours.load_state_dict({prefix + key: value for key, value in reference.state_dict().items()})


def pair(kind: str, name: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Build (ours, reference) with the same random weights, in eval mode."""
    torch.manual_seed(seed)
    reference = randomize(build(kind, name, "reference"), seed)
    ours = build(kind, name, "ours")
    copy_weights(ours, reference)
    return ours.eval(), reference.eval()


def plain(path: str) -> str:
    """Return a module's path without the `text_model` level."""
    return path.removeprefix("text_model").removeprefix(".")


def paths(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path, without the `text_model` level and its owner."""
    return {plain(path): module for path, module in network.named_modules()}


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet_inputs(name: str, rows: int = 2, height: int = 20, width: int = 12, tokens: int = 7) -> dict[str, object]:
    """Return a UNet's arguments: two rows, not square, no multiple of what the levels halve; a step for each row."""
    config = GEOMETRIES["unet"][name]
    return {
        "sample": draw(rows, config.get("in_channels", 4), height, width),
        "timestep": torch.arange(rows) * 200 + 37,
        "encoder_hidden_states": draw(rows, tokens, 20, seed=6),
    }


def text_inputs(rows: int = 3, tokens: int = 17) -> Tensor:
    """Return token numbers with the end of the text at a different place in each row."""
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(7))
    for row in range(rows):
        ids[row, 5 + 4 * row :] = 98
    return ids


def call(kind: str, name: str, network: nn.Module) -> dict[str, Tensor]:
    """Call a network as the pipeline does; return the results by name."""
    if kind == "unet":
        return {"sample": network(**unet_inputs(name)).sample}
    if kind == "vae":
        posterior = network.encode(draw(2, 3, 24, 16)).latent_dist
        size = (2, 4, 6, 4) if name != "one level" else (2, 4, 24, 16)
        return {"parameters": posterior.parameters, "sample": network.decode(draw(*size, seed=8)).sample}
    output = network(text_inputs(), output_hidden_states=True)
    states = {f"hidden_states.{index}": state for index, state in enumerate(output.hidden_states)}
    return {"last": output.last_hidden_state, "pooler": output.pooler_output, **states}


def distance(mine: Tensor, reference: Tensor) -> float:
    """Return the relative L2 distance of two tensors of one shape."""
    assert mine.shape == reference.shape
    assert mine.dtype == reference.dtype
    return ((mine - reference).norm() / reference.norm().clamp(min=1e-12)).item()
