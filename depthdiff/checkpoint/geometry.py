"""From the shapes in a single file to the configs that its authors kept elsewhere.

What does not follow from them is as in the published model: heads of 64 channels, norms of 32 groups, GELU, patches
of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from depthdiff.config import CheckpointError

HEAD_DIM = 64
PATCH = 16
FULL_TEXT_LAYERS = 24
"""Of OpenCLIP ViT-H. The model reads the last but one, so that the last is of no use."""

SAMPLE_SIZE = 64
"""Of the latents that the published UNet was trained on: 512 pixels."""

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""The published config of the scheduler, but for what the model predicts."""


class Shapes:
    """The shapes of a component's tensors, key -> shape, to be asked for sizes; `source` is the file, for errors."""

    def __init__(self, source: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.source, self.shapes = source, shapes
        self.stems = {".".join(parts[:i]) for parts in (key.split(".") for key in shapes) for i in range(len(parts))}

    def size(self, key: str, axis: int = 0) -> int:
        """Return a tensor's size along an axis."""
        if key not in self.shapes or len(self.shapes[key]) <= axis or not self.shapes[key][axis]:
            found = self.shapes.get(key, "missing")
            raise CheckpointError(
                f"{self.source}: {key!r}, from which the network's sizes follow, is {found}; is the file complete?"
            )
        return self.shapes[key][axis]

    def has(self, stem: str) -> bool:
        """Return whether there is a tensor of that name, or one whose name begins with it and a dot."""
        return stem in self.stems or stem in self.shapes

    def count(self, template: str) -> int:
        """Count the modules whose names `template` makes from 0, 1, 2 and so on; there must be one."""
        number = 0
        while self.has(template.format(number)):
            number += 1
        if not number:
            raise CheckpointError(f"{self.source}: {template.format(0)!r} is missing; is the file complete?")
        return number


def _heads(channels: int) -> int:
    return max(channels // HEAD_DIM, 1)


def _unet(shapes: Shapes) -> dict[str, Any]:
    widths: list[int] = []
    layers: list[int] = []
    attended: list[set[bool]] = []
    fresh = True
    for number in range(1, shapes.count("input_blocks.{}")):
        here = f"input_blocks.{number}"
        if shapes.has(f"{here}.0.op"):
            fresh = True
            continue
        if fresh:
            widths.append(shapes.size(f"{here}.0.out_layers.3.weight"))
            layers.append(0)
            attended.append(set())
            fresh = False
        layers[-1] += 1
        attended[-1].add(shapes.has(f"{here}.1.norm"))
    if not widths or fresh:
        raise CheckpointError(f"{shapes.source}: its input_blocks are not a UNet's; is the file complete?")
    number, up_attended = 0, []
    for count in reversed(layers):
        up_attended.append({shapes.has(f"output_blocks.{number + j}.1.norm") for j in range(count + 1)})
        number += count + 1
    if any(len(kinds) > 1 for kinds in (*attended, *up_attended)):
        raise CheckpointError(f"{shapes.source}: a level of the UNet has attention after some layers only")
    middle = "middle_block.1"
    projection = f"{middle}.proj_in.weight"
    shapes.size(projection)
    return {
        "sample_size": SAMPLE_SIZE,
        "in_channels": shapes.size("input_blocks.0.0.weight", 1),
        "out_channels": shapes.size("out.2.weight"),
        "block_out_channels": widths,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if True in kinds else "DownBlock2D" for kinds in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if True in kinds else "UpBlock2D" for kinds in up_attended],
        "attention_head_dim": [_heads(width) for width in widths],
        "cross_attention_dim": shapes.size(f"{middle}.transformer_blocks.0.attn2.to_k.weight", 1),
        "transformer_layers_per_block": shapes.count(middle + ".transformer_blocks.{}"),
        "use_linear_projection": len(shapes.shapes[projection]) == 2,
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    levels = shapes.count("encoder.down.{}")
    return {
        "in_channels": shapes.size("encoder.conv_in.weight", 1),
        "out_channels": shapes.size("decoder.conv_out.weight"),
        "latent_channels": shapes.size("decoder.conv_in.weight", 1),
        "block_out_channels": [shapes.size(f"encoder.down.{i}.block.0.conv2.weight") for i in range(levels)],
        "layers_per_block": shapes.count("encoder.down.0.block.{}"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": 256,
        "use_quant_conv": shapes.has("quant_conv"),
        "use_post_quant_conv": shapes.has("post_quant_conv"),
        "mid_block_add_attention": shapes.has("encoder.mid.attn_1"),
    }


def _text_encoder(shapes: Shapes) -> dict[str, Any]:
    """Leave out the last layer, which is not read, unless the file was made from a folder that lacks it.

    Such a file lacks `text_projection` and `logit_scale` as well, which come after that layer.
    """
    width = shapes.size("token_embedding.weight", 1)
    layers = shapes.count("transformer.resblocks.{}")
    whole = shapes.has("text_projection") or shapes.has("logit_scale") or layers == FULL_TEXT_LAYERS
    return {
        "vocab_size": shapes.size("token_embedding.weight"),
        "hidden_size": width,
        "intermediate_size": shapes.size("transformer.resblocks.0.mlp.c_fc.weight"),
        "num_hidden_layers": layers - whole,
        "num_attention_heads": _heads(width),
        "max_position_embeddings": shapes.size("positional_embedding"),
        "hidden_act": "gelu",
        "bos_token_id": 0,  # these as in the published config; nothing reads them but the pooled output
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _depth_estimator(shapes: Shapes) -> dict[str, Any]:
    vit = "pretrained.model"
    backbone = f"{vit}.patch_embed.backbone"
    if not shapes.has(backbone):
        raise CheckpointError(
            f"{shapes.source}: the depth net has no {backbone}; of MiDaS' networks only DPT-Hybrid is read from a "
            "single file. Pass another as depth_estimator=..."
        )
    width, layers = shapes.size(f"{vit}.cls_token", 2), shapes.count(vit + ".blocks.{}")
    stages = shapes.count(backbone + ".stages.{}")
    hidden = [shapes.size(f"{backbone}.stages.{i}.blocks.0.conv3.weight") for i in range(stages)]
    depths = [shapes.count(f"{backbone}.stages.{i}.blocks." + "{}") for i in range(stages)]
    grid = round((shapes.size(f"{vit}.pos_embed", 1) - 1) ** 0.5)
    taps = max(layers * 3 // 4 - 1, 0), layers - 1
    return {
        "is_hybrid": True,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width),
        "intermediate_size": shapes.size(f"{vit}.blocks.0.mlp.fc1.weight"),
        "image_size": grid * PATCH,
        "patch_size": PATCH,
        "num_channels": shapes.size(f"{backbone}.stem.conv.weight", 1),
        "neck_hidden_sizes": [shapes.size(f"scratch.layer{i}_rn.weight", 1) for i in range(1, 5)],
        "fusion_hidden_size": shapes.size("scratch.layer1_rn.weight"),
        "backbone_out_indices": [min(2, taps[0]), min(5, taps[0]), *taps],  # the first two are not read
        "readout_type": "project",
        "reassemble_factors": [1, 1, 1, 0.5],
        "neck_ignore_stages": [0, 1],
        "backbone_featmap_shape": [1, hidden[-1], grid, grid],
        "backbone_config": {
            "model_type": "bit",
            "layer_type": "bottleneck",
            "embedding_size": shapes.size(f"{backbone}.stem.conv.weight"),
            "hidden_sizes": hidden,
            "depths": depths,
            "global_padding": "SAME",
            "embedding_dynamic_padding": True,
            "out_features": [f"stage{i + 1}" for i in range(stages)],
        },
    }


INFER: Mapping[str, Callable[[Shapes], dict[str, Any]]] = {
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "depth_estimator": _depth_estimator,
}
"""Component -> function that infers its config, or refuses an incomplete file or an unsupported geometry."""

NOT_IN_SHAPES: Mapping[str, tuple[str, ...]] = {
    "unet": ("attention_head_dim", "norm_num_groups", "norm_eps", "act_fn", "upcast_attention", "flip_sin_to_cos",
             "freq_shift", "center_input_sample", "downsample_padding"),
    "vae": ("norm_num_groups", "scaling_factor", "act_fn"),
    "text_encoder": ("num_attention_heads", "hidden_act", "layer_norm_eps"),
    "depth_estimator": ("num_attention_heads", "hidden_act", "layer_norm_eps", "patch_size", "qkv_bias"),
}  # fmt: skip
"""Component -> the settings that change results and do not follow from shapes."""


def guessed_wrongly(component: str, own: Mapping[str, Any], guess: Mapping[str, Any]) -> list[str]:
    """List the settings of `own`, a network's config, that change results and that are not those of `guess`."""
    wrong = [name for name in NOT_IN_SHAPES[component] if _levels(own, name) != _levels(guess, name)]
    backbone = own.get("backbone_config") if component == "depth_estimator" else None
    if backbone:
        for name, default in (("num_groups", 32), ("hidden_act", "relu")):
            if backbone.get(name, default) != guess["backbone_config"].get(name, default):
                wrong.append(f"backbone's {name}")
    return wrong


def _levels(config: Mapping[str, Any], name: str) -> list[Any]:
    value, count = config[name], len(config.get("block_out_channels", (0,)))
    return list(value) if isinstance(value, (tuple, list)) else [value] * count
