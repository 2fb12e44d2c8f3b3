"""Keys of the Hub's files beside ours; see `depthdiff.checkpoint.remap`.

UNet, autoencoder and text encoder have the published names inside, so that only older spellings need a row. The depth
net has names of its own.
"""

from __future__ import annotations

from depthdiff.checkpoint.remap import Table, nest


def same(*names: str) -> dict[str, str]:
    """Make rows for layers whose names are the same on both sides."""
    return {name: name for name in names}


VAE_BEFORE_0_17 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""diffusers renamed the autoencoder's attention layers in version 0.17; the published files are older."""

VAE_ATTENTION = [f"{coder}.mid_block.attentions.0" for coder in ("encoder", "decoder")]

BIT_NORM_CONV = same("conv1", "conv2", "conv3", "norm1", "norm2", "norm3", "downsample.conv", "downsample.norm")
DPT_LAYER = {
    "layernorm_before": "norm1",
    **nest("attention.attention", "attention", {"query": "to_q", "key": "to_k", "value": "to_v"}),
    "attention.output.dense": "attention.to_out.0",
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
    "UNet2DConditionModel": Table({}, identity=True),
    "AutoencoderKL": Table(
        {},
        aliases={f"{path}.{old}": f"{path}.{new}" for path in VAE_ATTENTION for old, new in VAE_BEFORE_0_17.items()},
        reshaped=tuple(f"{path}.{layer}" for path in VAE_ATTENTION for layer in VAE_BEFORE_0_17.values()),
        identity=True,
    ),
    "CLIPTextModel": Table(
        {},
        aliases={  # transformers 5 writes no prefix
            "embeddings.token_embedding": "text_model.embeddings.token_embedding",
            "embeddings.position_embedding": "text_model.embeddings.position_embedding",
            **{
                f"encoder.layers.{{i}}.{layer}": f"text_model.encoder.layers.{{i}}.{layer}"
                for layer in (
                    *(f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")),
                    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
                )
            },
            "final_layer_norm": "text_model.final_layer_norm",
        },
        ignored={
            "text_model.embeddings.position_ids": "the constants 0..76; made where they are needed",
            "embeddings.position_ids": "the same without the prefix",
        },
        identity=True,
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
