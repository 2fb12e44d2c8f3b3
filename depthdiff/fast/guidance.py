"""Guidance on a CPU: compute once what both halves of the batch share.

With guidance the latents and the depth are given to the UNet twice, once for the negative prompts and once for the
prompts. Up to the first attention to a prompt, the halves are equal.

Letters: B pictures, C channels, H and W height and width of a feature map, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.fast.attention import uses_default_processor
from depthdiff.fast.eligible import LAYERS, is_plain, only_computes
from depthdiff.models.attention import Attention
from depthdiff.models.embeddings import TimestepEmbedding, Timesteps
from depthdiff.models.resnet import ResnetBlock2D
from depthdiff.models.transformer import BasicTransformerBlock, Transformer2DModel
from depthdiff.models.unet import UNet2DConditionModel, UNet2DConditionOutput, go_down, go_up
from depthdiff.models.unet_blocks import CrossAttnDownBlock2D

GET_TIME_EMBED = UNet2DConditionModel.get_time_embed


def fast_unet(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor | float,
    encoder_hidden_states: Tensor,
    *,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """Predict the noise, (2B, ...); NotImplemented where the halves differ, or a layer may see the difference."""
    block: Any = unet.down_blocks[0]
    if cross_attention_kwargs or not only_computes(sample, encoder_hidden_states):
        return NotImplemented
    if sample.dim() != 4 or not len(sample) or len(sample) % 2 or len(encoder_hidden_states) != len(sample):
        return NotImplemented
    if torch.as_tensor(timestep).numel() != 1 or any(side % 2**unet.num_upsamplers for side in sample.shape[2:]):
        return NotImplemented
    half = sample[: len(sample) // 2]
    if not _is_shared(unet) or not only_computes(*unet.parameters()) or not torch.equal(half, sample[len(half) :]):
        return NotImplemented
    conditions = {
        "encoder_hidden_states": encoder_hidden_states,
        "attention_mask": None,
        "cross_attention_kwargs": None,
        "encoder_attention_mask": None,
    }
    temb = unet.time_embedding(unet.get_time_embed(half, timestep))
    x = unet.conv_in(2 * half - 1 if unet.config.center_input_sample else half)
    skips: tuple[Tensor, ...] = (twice(x),)
    x = share_transformer(block.attentions[0], block.resnets[0](x, temb), encoder_hidden_states)
    skips, temb = (*skips, x), twice(temb)
    for resnet, attention in zip(block.resnets[1:], block.attentions[1:], strict=True):
        x = attention(resnet(x, temb), encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        skips = (*skips, x)
    for downsampler in block.downsamplers or ():
        x = downsampler(x)
        skips = (*skips, x)
    for block in list(unet.down_blocks)[1:]:
        x, more = go_down(block, x, temb, conditions, None)
        skips = (*skips, *more)
    if unet.mid_block is not None:
        x = unet.mid_block(x, temb, **(conditions if getattr(unet.mid_block, "has_cross_attention", False) else {}))
    for block in list(unet.up_blocks):
        count = len(block.resnets)
        skips, read = skips[:-count], skips[-count:]
        x = go_up(block, x, read, temb, conditions, None)
    x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
    return UNet2DConditionOutput(x) if return_dict else (x,)


def share_transformer(transformer: Any, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """Compute a transformer of (B, C, H, W) for two prompts each: (2B, C, H, W)."""
    size, block = x.shape[2:], transformer.transformer_blocks[0]
    if transformer.use_linear_projection:
        tokens = transformer.proj_in(transformer.norm(x).flatten(2).transpose(1, 2))
    else:
        tokens = transformer.proj_in(transformer.norm(x)).flatten(2).transpose(1, 2)
    tokens = twice(block.attn1(block.norm1(tokens), encoder_hidden_states=None, attention_mask=None) + tokens)
    tokens = block.attn2(block.norm2(tokens), encoder_hidden_states=encoder_hidden_states, attention_mask=None) + tokens
    tokens = block.ff(block.norm3(tokens)) + tokens
    for other in transformer.transformer_blocks[1:]:
        tokens = other(tokens, encoder_hidden_states=encoder_hidden_states)
    if transformer.use_linear_projection:
        return transformer.proj_out(tokens).transpose(1, 2).unflatten(2, size) + twice(x)
    return transformer.proj_out(tokens.transpose(1, 2).unflatten(2, size)) + twice(x)


def twice(x: Tensor) -> Tensor:
    """Repeat a batch: (B, ...) -> (2B, ...)."""
    return torch.cat([x, x])


def _is_shared(unet: UNet2DConditionModel) -> bool:
    """Return whether nothing looks at the rows of what is computed once, or replaces it, or draws numbers for each."""
    block: Any = unet.down_blocks[0]
    if unet.training or not is_plain(block, CrossAttnDownBlock2D) or "get_time_embed" in vars(unet):
        return False
    if type(unet).get_time_embed is not GET_TIME_EMBED or len(block.resnets) != len(block.attentions):
        return False
    first: list[tuple[Any, type[nn.Module]]] = [(unet.conv_in, nn.Conv2d), (unet.time_proj, Timesteps)]
    first += [(unet.time_embedding, TimestepEmbedding), (block.resnets[0], ResnetBlock2D)]
    first += [(block.attentions[0], Transformer2DModel)]
    if not all(is_plain(layer, kind) for layer, kind in first):
        return False
    if not is_plain(block.attentions[0].transformer_blocks[0], BasicTransformerBlock):
        return False
    parts: list[Any] = [part for layer, _ in first for part in layer.modules() if type(part) is not nn.ModuleList]
    return all(is_plain(part, *LAYERS) and _treats_rows_alike(part) for part in parts)


def _treats_rows_alike(layer: Any) -> bool:
    """Return whether each row of a layer's result comes from that of its input, in the same way."""
    if type(layer) is nn.Dropout:
        return not (layer.p and layer.training)
    if type(layer) is Attention:
        return uses_default_processor(layer)
    if type(layer) is BasicTransformerBlock:
        return layer.attn2 is not None and layer._chunk_size is None and "_feed" not in vars(layer)
    return True
