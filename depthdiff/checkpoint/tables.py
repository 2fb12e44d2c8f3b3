"""The published names of every layer beside ours; see `depthdiff.checkpoint.remap`.

The left column is the layout of the Hub: diffusers' names for UNet and autoencoder, transformers' for the text encoder
and the depth net.
"""

from __future__ import annotations

from depthdiff.checkpoint.remap import Table, nest


def same(*names: str) -> dict[str, str]:
    """Make rows for layers whose names are the same on both sides."""
    return {name: name for name in names}


SAME_WIDTH = same("norm1", "conv1", "norm2", "conv2")
RESNET = {**SAME_WIDTH, **same("conv_shortcut")}
TIME = same("time_emb_proj")
QKV = same("to_q", "to_k", "to_v")
ATTENTION = {**QKV, "to_out.0": "to_out"}
TRANSFORMER = {
    **same("norm", "proj_in", "proj_out"),
    **nest("transformer_blocks.{k}", "transformer_blocks.{k}", same("norm1", "norm2", "norm3")),
    **nest("transformer_blocks.{k}.attn1", "transformer_blocks.{k}.self_attn", ATTENTION),
    **nest("transformer_blocks.{k}.attn2", "transformer_blocks.{k}.cross_attn", ATTENTION),
    "transformer_blocks.{k}.ff.net.0.proj": "transformer_blocks.{k}.ff.proj_in",
    "transformer_blocks.{k}.ff.net.2": "transformer_blocks.{k}.ff.proj_out",
}
DOWNSAMPLE = {"downsamplers.0.conv": "downsample.conv"}
UPSAMPLE = {"upsamplers.0.conv": "upsample.conv"}


def block(path: str, resnet: dict[str, str], more: dict[str, str]) -> dict[str, str]:
    """Make the rows of a block: its residual blocks and what else it has."""
    return {**nest(f"{path}.resnets.{{j}}", f"{path}.resnets.{{j}}", resnet), **nest(path, path, more)}


UNET_ATTENTIONS = nest("attentions.{j}", "attentions.{j}", TRANSFORMER)
UNET = {
    **same("conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_norm_out", "conv_out"),
    **block("down_blocks.{i}", RESNET | TIME, {**UNET_ATTENTIONS, **DOWNSAMPLE}),
    **block("mid_block", SAME_WIDTH | TIME, UNET_ATTENTIONS),
    **block("up_blocks.{i}", RESNET | TIME, {**UNET_ATTENTIONS, **UPSAMPLE}),
}

VAE_ATTENTION = {"group_norm": "norm", **{left: f"attn.{right}" for left, right in ATTENTION.items()}}
VAE_MID = block("mid_block", SAME_WIDTH, nest("attentions.0", "attention", VAE_ATTENTION))
CODER = {**same("conv_in", "conv_norm_out", "conv_out"), **VAE_MID}
VAE = {
    **same("quant_conv", "post_quant_conv"),
    **nest("encoder", "encoder", {**CODER, **block("down_blocks.{i}", RESNET, DOWNSAMPLE)}),
    **nest("decoder", "decoder", {**CODER, **block("up_blocks.{i}", RESNET, UPSAMPLE)}),
}
VAE_BEFORE_0_17 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""diffusers renamed the autoencoder's attention layers in version 0.17; the published files are older."""

CLIP_LAYER = {
    "layer_norm1": "norm1",
    **nest("self_attn", "self_attn", {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}),
    "layer_norm2": "norm2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
CLIP_TEXT = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding": "position_embedding",
    **nest("text_model.encoder.layers.{i}", "layers.{i}", CLIP_LAYER),
    "text_model.final_layer_norm": "final_layer_norm",
}

BIT_NORM_CONV = same("conv1", "conv2", "conv3", "norm1", "norm2", "norm3", "downsample.conv", "downsample.norm")
DPT_LAYER = {
    "layernorm_before": "norm1",
    **nest("attention.attention", "attention", {"query": "to_q", "key": "to_k", "value": "to_v"}),
    "attention.output.dense": "attention.to_out",
    "layernorm_after": "norm2",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
}
DPT_FUSION = {
    **same("projection"),
    **same("residual_layer1.convolution1", "residual_layer1.convolution2"),
    **same("residual_layer2.convolution1", "residual_layer2.convolution2"),
}
DPT = {
    **nest("dpt.embeddings", "embeddings", same("cls_token", "position_embeddings", "projection")),
    "dpt.embeddings.patch_embeddings.projection": "embeddings.patch_projection",
    **nest("dpt.embeddings.backbone.bit.embedder", "backbone.stem", {"convolution": "conv", "norm": "norm"}),
    **nest(
        "dpt.embeddings.backbone.bit.encoder.stages.{i}.layers.{j}", "backbone.stages.{i}.layers.{j}", BIT_NORM_CONV
    ),
    **nest("dpt.encoder.layer.{i}", "layers.{i}", DPT_LAYER),
    "neck.reassemble_stage.readout_projects.{i}.0": "reassemble.{i}.readout",
    "neck.reassemble_stage.layers.{i}.projection": "reassemble.{i}.projection",
    "neck.reassemble_stage.layers.{i}.resize": "reassemble.{i}.resize",
    "neck.convs.{i}": "convs.{i}",
    **nest("neck.fusion_stage.layers.{i}", "fusion.{i}", DPT_FUSION),
    "head.projection": "head.projection",
    "head.head.0": "head.conv1",
    "head.head.2": "head.conv2",
    "head.head.4": "head.conv3",
}

TABLES: dict[str, Table] = {
    "UNet2DConditionModel": Table(UNET),
    "AutoencoderKL": Table(
        VAE,
        aliases={
            f"{coder}.mid_block.attentions.0.{old}": f"{coder}.mid_block.attentions.0.{new}"
            for coder in ("encoder", "decoder")
            for old, new in VAE_BEFORE_0_17.items()
        },
        reshaped=tuple(
            f"{coder}.mid_block.attention.attn.{layer}"
            for coder in ("encoder", "decoder")
            for layer in ATTENTION.values()
        ),
    ),
    "CLIPTextModel": Table(
        CLIP_TEXT,
        aliases={name.removeprefix("text_model."): name for name in CLIP_TEXT},  # transformers 5 writes no prefix
        ignored={
            "text_model.embeddings.position_ids": "the constants 0..76; made where they are needed",
            "embeddings.position_ids": "the same without the prefix",
        },
    ),
    "DPTForDepthEstimation": Table(
        DPT,
        ignored={
            "dpt.layernorm": "never read: the depth head looks at the layers before this norm",
            "neck.fusion_stage.layers.0.residual_layer1.convolution1": "never called: the coarsest level has no skip",
            "neck.fusion_stage.layers.0.residual_layer1.convolution2": "never called, as above",
        },
    ),
}
"""By the class of the network, in the published spelling."""
