"""The names of the single file beside ours: Stability's latent-diffusion code (ldm), OpenCLIP's text tower, MiDaS.

ldm numbers the blocks of a UNet through, and the levels of a decoder from the other end, so that a table holds for one
geometry; it is made from the config. Source: Stability-AI/stablediffusion, ldm/modules; mlfoundations/open_clip,
transformer.py; isl-org/MiDaS, midas/dpt_depth.py; timm, resnetv2.py and vision_transformer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from depthdiff.checkpoint.remap import Table, nest
from depthdiff.checkpoint.tables import same

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.model.",
    "depth_estimator": "depth_model.model.",
}
"""Component -> what its keys begin with."""

SCHEDULE = "a constant of the noise schedule, which the scheduler computes from its config"
IGNORED = {
    **dict.fromkeys(("betas", "alphas_cumprod", "alphas_cumprod_prev"), SCHEDULE),
    **dict.fromkeys(("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"), SCHEDULE),
    **dict.fromkeys(("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"), SCHEDULE),
    **dict.fromkeys(("posterior_variance", "posterior_log_variance_clipped"), SCHEDULE),
    **dict.fromkeys(("posterior_mean_coef1", "posterior_mean_coef2"), SCHEDULE),
    "lvlb_weights": "weights of the training loss",
    "logvar": "a weight of the training loss",
    "scale_factor": "the scaling of the latents, 0.18215 in all published files; the autoencoder's config has it",
    "model_ema.decay": "bookkeeping of the averaged weights of a training",
    "model_ema.num_updates": "bookkeeping of the averaged weights of a training",
}
"""Key -> why no network reads it."""

IGNORED_PREFIXES = {
    "model_ema.": "a second copy of the UNet, averaged over a training; in files to be used the first is the average",
    "first_stage_model.loss.": "the losses that the autoencoder was trained with",
    "loss.": "the losses that the autoencoder was trained with",
}
"""What keys begin with -> why no network reads them."""

SAME_WIDTH = same("norm1", "conv1", "norm2", "conv2")
ATTENTION = same("to_q", "to_k", "to_v", "to_out.0")
BLOCK = {
    **same("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    **nest("attn1", "attn1", ATTENTION),
    **nest("attn2", "attn2", ATTENTION),
}
TRANSFORMER = {
    **same("norm", "proj_in", "proj_out"),
    **nest("transformer_blocks.{k}", "transformer_blocks.{k}", BLOCK),
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESNET = {**SAME_WIDTH, "nin_shortcut": "conv_shortcut"}
VAE_MID = {
    **nest("mid.block_1", "mid_block.resnets.0", SAME_WIDTH),
    **nest("mid.block_2", "mid_block.resnets.1", SAME_WIDTH),
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    **nest("mid.attn_1", "mid_block.attentions.0", {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}),
}
VAE_CODER = {**same("conv_in", "conv_out"), "norm_out": "conv_norm_out", **VAE_MID}
BIT_LAYER = same("conv1", "conv2", "conv3", "norm1", "norm2", "norm3", "downsample.conv", "downsample.norm")
DPT_REFINE = {
    "out_conv": "projection",
    **nest("resConfUnit1", "residual_layer1", {"conv1": "convolution1", "conv2": "convolution2"}),
    **nest("resConfUnit2", "residual_layer2", {"conv1": "convolution1", "conv2": "convolution2"}),
}
DPT_LEVELS = 4
NOT_CALLED = "never called: the coarsest level has no skip"

KEPT = {
    "dpt.layernorm": "pretrained.model.norm",
    "neck.fusion_stage.layers.0.residual_layer1.convolution1": "scratch.refinenet4.resConfUnit1.conv1",
    "neck.fusion_stage.layers.0.residual_layer1.convolution2": "scratch.refinenet4.resConfUnit1.conv2",
}
"""Layers of the depth net that nothing reads but both layouts hold, folder -> single file; a conversion keeps them."""


def transformer(published: str, ours: str, depth: int) -> dict[str, str]:
    """Make the rows of the attention after a residual block, without `{k}`: plain names are looked up, not matched."""
    rows = nest(published, ours, TRANSFORMER)
    return {a.replace("{k}", str(k)): b.replace("{k}", str(k)) for a, b in rows.items() for k in range(depth)}


def per_level(config: Any, name: str) -> tuple[int, ...]:
    """Return a setting that takes one number or one a level as one a level."""
    value = config[name]
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(config["block_out_channels"])


def unet(config: Any) -> Table:
    """Make the table of a UNet."""
    depths = per_level(config, "transformer_layers_per_block")
    rows = {
        **nest("time_embed", "time_embedding", {"0": "linear_1", "2": "linear_2"}),
        "input_blocks.0.0": "conv_in",
        **nest("middle_block.0", "mid_block.resnets.0", RESNET),
        **transformer("middle_block.1", "mid_block.attentions.0", depths[-1]),
        **nest("middle_block.2", "mid_block.resnets.1", RESNET),
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    last, layers = len(config.block_out_channels) - 1, per_level(config, "layers_per_block")
    number = 1
    for i, kind in enumerate(config.down_block_types):
        for j in range(layers[i]):
            rows |= nest(f"input_blocks.{number}.0", f"down_blocks.{i}.resnets.{j}", RESNET)
            if kind == "CrossAttnDownBlock2D":
                rows |= transformer(f"input_blocks.{number}.1", f"down_blocks.{i}.attentions.{j}", depths[i])
            number += 1
        if i < last:
            rows[f"input_blocks.{number}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            number += 1
    number = 0
    for i, kind in enumerate(config.up_block_types):
        has_attention = kind == "CrossAttnUpBlock2D"
        for j in range(layers[last - i] + 1):
            rows |= nest(f"output_blocks.{number}.0", f"up_blocks.{i}.resnets.{j}", RESNET)
            if has_attention:
                rows |= transformer(f"output_blocks.{number}.1", f"up_blocks.{i}.attentions.{j}", depths[last - i])
            number += 1
        if i < last:
            rows[f"output_blocks.{number - 1}.{1 + has_attention}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return Table(rows)


def vae(config: Any) -> Table:
    """Make the table of an autoencoder; ldm counts the decoder's levels from the finest, we from the coarsest."""
    rows = {
        **same("quant_conv", "post_quant_conv"),
        **nest("encoder", "encoder", VAE_CODER),
        **nest("decoder", "decoder", VAE_CODER),
        **nest("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}", VAE_RESNET),
        "encoder.down.{i}.downsample.conv": "encoder.down_blocks.{i}.downsamplers.0.conv",
    }
    levels = len(config.block_out_channels)
    for i in range(levels):
        here = f"decoder.up.{levels - 1 - i}"
        rows |= nest(here + ".block.{j}", f"decoder.up_blocks.{i}.resnets." + "{j}", VAE_RESNET)
        rows[f"{here}.upsample.conv"] = f"decoder.up_blocks.{i}.upsamplers.0.conv"
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    convolved = (f"{coder}.mid_block.attentions.0.{name}" for coder in ("encoder", "decoder") for name in attention)
    return Table(rows, reshaped=tuple(convolved))


def text_layer(published: str, ours: str) -> dict[str, str]:
    """Make the rows of one layer of the text tower; query, key and value are stacked."""
    rows = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2"}
    rows |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    stacked = {
        f"[{i}]{published}.attn.in_proj_{leaf}": f"{ours}.self_attn.{name}.{leaf}"
        for i, name in enumerate(("q_proj", "k_proj", "v_proj"))
        for leaf in ("weight", "bias")
    }
    return nest(published, ours, rows) | stacked


def text_encoder(config: Any) -> Table:
    """Make the table of a text tower, of which the model reads the last layer but one."""
    dropped = text_layer(f"transformer.resblocks.{config.num_hidden_layers}", "")
    return Table(
        {
            "token_embedding": "text_model.embeddings.token_embedding",
            "positional_embedding": "text_model.embeddings.position_embedding.weight",
            **text_layer("transformer.resblocks.{i}", "text_model.encoder.layers.{i}"),
            "ln_final": "text_model.final_layer_norm",
        },
        ignored={
            **dict.fromkeys(dropped, "never read: the UNet looks at the layer before it"),
            "text_projection": "leads to where CLIP compares texts with images; the UNet reads what is before it",
            "logit_scale": "a constant of CLIP's training",
            "attn_mask": "the constant triangle of causal attention; made where it is needed",
        },
    )


def depth_estimator(config: Any) -> Table:
    """Make the table of a hybrid depth net; MiDaS counts levels from 1 and fuses them from the last."""
    vit, post = "pretrained.model", "pretrained.act_postprocess"
    rows = {
        f"{vit}.cls_token": "embeddings.cls_token",
        f"{vit}.pos_embed": "embeddings.position_embeddings",
        f"{vit}.patch_embed.proj": "embeddings.projection",
        **nest(f"{vit}.patch_embed.backbone.stem", "backbone.stem", same("conv", "norm")),
        **nest(vit + ".patch_embed.backbone.stages.{i}.blocks.{j}", "backbone.stages.{i}.layers.{j}", BIT_LAYER),
        **nest(vit + ".blocks.{i}", "layers.{i}", {"attn.proj": "attention.to_out.0", **same("norm1", "norm2")}),
        **nest(vit + ".blocks.{i}.mlp", "layers.{i}", same("fc1", "fc2")),
        **{
            f"[{i}]{vit}.blocks.{{i}}.attn.qkv": f"layers.{{i}}.attention.{name}"
            for i, name in enumerate(("to_q", "to_k", "to_v"))
        },
        **nest("scratch.output_conv", "head", {"0": "conv1", "2": "conv2", "4": "conv3"}),
    }
    for level in range(DPT_LEVELS):
        rows[f"scratch.layer{level + 1}_rn"] = f"convs.{level}"
        rows |= nest(f"scratch.refinenet{DPT_LEVELS - level}", f"fusion.{level}", DPT_REFINE)
        reassemble = {"0.project.0": "readout", "3": "projection", "4": "resize"}
        rows |= nest(f"{post}{level + 1}", f"reassemble.{level}", reassemble)
    return Table(
        rows,
        ignored={
            f"{vit}.norm": "never read: the depth head looks at the layers before this norm",
            f"{vit}.head": "names one of 1000 kinds of things; depth does not need it",
            **{key: NOT_CALLED for key in KEPT.values() if key.startswith("scratch")},
        },
    )


TABLES_LDM: Mapping[str, Callable[[Any], Table]] = {
    "UNet2DConditionModel": unet,
    "AutoencoderKL": vae,
    "CLIPTextModel": text_encoder,
    "DPTForDepthEstimation": depth_estimator,
}
"""By the class of the network: its config -> its table."""
