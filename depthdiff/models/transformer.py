"""The transformer inside the UNet: self-attention over pixels, attention to the prompt, and a gated feed-forward.

Letters: B batch, C channels, H and W height and width of a feature map, L tokens (H W pixels), Lk tokens of the prompt,
X their channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.checks import refuse_values
from depthdiff.config import BaseOutput, register_to_config
from depthdiff.models.attention import Attention
from depthdiff.models.base import ModelMixin, recomputed


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another one. Source: arXiv:2002.05202, eq. 6."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out, bias=bias)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., C) -> (..., C')."""
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers around a gated GELU.

    Args:
        dim: C.
        dim_out: C'; C if None.
        mult: the inner width is C times this.
        dropout: share that is dropped in training.
        activation_fn: must be "geglu".
        final_dropout: whether to drop from the result, too.
        inner_dim: inner width, instead of `mult`.
        bias: whether the linear layers have one.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: int = 4,
        dropout: float = 0.0,
        activation_fn: str = "geglu",
        final_dropout: bool = False,
        inner_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        refuse_values("FeedForward", activation_fn=(activation_fn, "geglu"))
        inner_dim = mult * dim if inner_dim is None else inner_dim
        linear_in, linear_out = GEGLU(dim, inner_dim, bias=bias), nn.Linear(inner_dim, dim_out or dim, bias=bias)
        self.net = nn.ModuleList([linear_in, nn.Dropout(dropout), linear_out])
        if final_dropout:
            self.net.append(nn.Dropout(dropout))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, L, C) -> (B, L, C')."""
        for layer in self.net:
            hidden_states = layer(hidden_states)
        return hidden_states


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the prompt and a feed-forward, each after a norm and with a residual connection.

    Args:
        dim: C.
        num_attention_heads: of both attentions.
        attention_head_dim: channels of a head.
        dropout: share that is dropped in training.
        cross_attention_dim: X; None for a block that does not attend to a prompt.
        activation_fn: must be "geglu".
        num_embeds_ada_norm: must be None.
        attention_bias: whether queries, keys and values have a bias.
        only_cross_attention: must be False.
        double_self_attention: must be False.
        upcast_attention: compute scores in float32.
        norm_elementwise_affine: whether the norms have weights.
        norm_type: must be "layer_norm".
        norm_eps: of the norms.
        final_dropout: whether to drop from the feed-forward's result, too.
        attention_type: must be "default".
        positional_embeddings: must be None.
        num_positional_embeddings: must be None.
        ada_norm_continous_conditioning_embedding_dim: must be None.
        ada_norm_bias: must be None.
        ff_inner_dim: inner width of the feed-forward.
        ff_bias: whether the feed-forward has a bias.
        attention_out_bias: whether the attention's last layer has a bias.

    Raises:
        ValueError: an argument that is not implemented.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        dropout: float = 0.0,
        cross_attention_dim: int | None = None,
        activation_fn: str = "geglu",
        num_embeds_ada_norm: int | None = None,
        attention_bias: bool = False,
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
        norm_elementwise_affine: bool = True,
        norm_type: str = "layer_norm",
        norm_eps: float = 1e-5,
        final_dropout: bool = False,
        attention_type: str = "default",
        positional_embeddings: str | None = None,
        num_positional_embeddings: int | None = None,
        ada_norm_continous_conditioning_embedding_dim: int | None = None,
        ada_norm_bias: int | None = None,
        ff_inner_dim: int | None = None,
        ff_bias: bool = True,
        attention_out_bias: bool = True,
    ) -> None:
        super().__init__()
        kind = "BasicTransformerBlock"
        refuse_values(kind, num_embeds_ada_norm=(num_embeds_ada_norm, None), norm_type=(norm_type, "layer_norm"))
        refuse_values(kind, only_cross_attention=(only_cross_attention, False), ada_norm_bias=(ada_norm_bias, None))
        refuse_values(kind, double_self_attention=(double_self_attention, False))
        refuse_values(kind, attention_type=(attention_type, "default"))
        refuse_values(kind, positional_embeddings=(positional_embeddings, None))
        self.dim, self.num_attention_heads, self.attention_head_dim = dim, num_attention_heads, attention_head_dim
        self.dropout, self.cross_attention_dim, self.activation_fn = dropout, cross_attention_dim, activation_fn
        self.attention_bias, self.norm_elementwise_affine = attention_bias, norm_elementwise_affine
        self.only_cross_attention = self.double_self_attention = False
        self.use_ada_layer_norm = self.use_ada_layer_norm_zero = self.use_ada_layer_norm_single = False
        self.use_ada_layer_norm_continuous, self.use_layer_norm, self.norm_type = False, True, norm_type
        self.num_embeds_ada_norm = self.positional_embeddings = self.num_positional_embeddings = self.pos_embed = None
        self._chunk_size: int | None = None
        self._chunk_dim = 0

        heads: dict[str, Any] = {"heads": num_attention_heads, "dim_head": attention_head_dim, "dropout": dropout}
        heads |= {"bias": attention_bias, "out_bias": attention_out_bias, "upcast_attention": upcast_attention}
        self.norm1 = nn.LayerNorm(dim, norm_eps, norm_elementwise_affine)
        self.attn1 = Attention(dim, **heads)
        self.norm2 = None if cross_attention_dim is None else nn.LayerNorm(dim, norm_eps, norm_elementwise_affine)
        self.attn2 = None if cross_attention_dim is None else Attention(dim, cross_attention_dim, **heads)
        self.norm3 = nn.LayerNorm(dim, norm_eps, norm_elementwise_affine)
        self.ff = FeedForward(
            dim,
            dropout=dropout,
            activation_fn=activation_fn,
            final_dropout=final_dropout,
            inner_dim=ff_inner_dim,
            bias=ff_bias,
        )

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 0) -> None:
        """Run the feed-forward on `chunk_size` entries of a dimension at a time; None for all at once."""
        self._chunk_size, self._chunk_dim = chunk_size, dim

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the block.

        Args:
            hidden_states: (B, L, C).
            attention_mask: (B, 1, L), added to the scores of self-attention.
            encoder_hidden_states: (B, Lk, X), the prompt.
            encoder_attention_mask: (B, 1, Lk), added to the scores of attention to the prompt.
            timestep: not used.
            cross_attention_kwargs: passed to both attentions, `scale` aside.
            class_labels: not used.
            added_cond_kwargs: not used.

        Returns:
            (B, L, C).
        """
        kwargs = {name: value for name, value in (cross_attention_kwargs or {}).items() if name != "scale"}
        attended = self.attn1(
            self.norm1(hidden_states), encoder_hidden_states=None, attention_mask=attention_mask, **kwargs
        )
        hidden_states = attended + hidden_states
        if self.attn2 is not None and self.norm2 is not None:
            attended = self.attn2(
                self.norm2(hidden_states),
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **kwargs,
            )
            hidden_states = attended + hidden_states
        return self._feed(self.norm3(hidden_states)) + hidden_states

    def _feed(self, hidden_states: Tensor) -> Tensor:
        if self._chunk_size is None:
            return self.ff(hidden_states)
        chunks = hidden_states.split(self._chunk_size, dim=self._chunk_dim)
        return torch.cat([self.ff(chunk) for chunk in chunks], dim=self._chunk_dim)


@dataclass
class Transformer2DModelOutput(BaseOutput):
    """`sample`: (B, C, H, W)."""

    sample: Tensor


class Transformer2DModel(ModelMixin):
    """Attend from every pixel to all pixels and to the prompt. Source: arXiv:2112.10752, sec. 3.3.

    Args:
        num_attention_heads: of every attention.
        attention_head_dim: channels of a head.
        in_channels: C.
        out_channels: must be None or C.
        num_layers: blocks.
        dropout: share that is dropped in training.
        norm_num_groups: groups of the norm.
        cross_attention_dim: X.
        attention_bias: whether queries, keys and values have a bias.
        sample_size: not used.
        num_vector_embeds: must be None.
        patch_size: must be None.
        activation_fn: must be "geglu".
        num_embeds_ada_norm: must be None.
        use_linear_projection: project tokens by linear layers (Stable Diffusion 2), not 1x1 convolutions (1).
        only_cross_attention: must be False.
        double_self_attention: must be False.
        upcast_attention: compute scores in float32.
        norm_type: must be "layer_norm".
        norm_elementwise_affine: whether the blocks' norms have weights.
        norm_eps: of the blocks' norms.
        attention_type: must be "default".
        caption_channels: must be None.
        interpolation_scale: not used.
        use_additional_conditions: must be None or False.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        in_channels: int | None = None,
        out_channels: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = None,
        attention_bias: bool = False,
        sample_size: int | None = None,
        num_vector_embeds: int | None = None,
        patch_size: int | None = None,
        activation_fn: str = "geglu",
        num_embeds_ada_norm: int | None = None,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
        norm_type: str = "layer_norm",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        attention_type: str = "default",
        caption_channels: int | None = None,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
    ) -> None:
        super().__init__()
        kind = "Transformer2DModel"
        if in_channels is None:
            raise ValueError(f"{kind}: in_channels must be given: the channels of the feature map")
        refuse_values(kind, out_channels=(out_channels, None, in_channels), patch_size=(patch_size, None))
        refuse_values(kind, num_vector_embeds=(num_vector_embeds, None), caption_channels=(caption_channels, None))
        self.num_attention_heads, self.attention_head_dim = num_attention_heads, attention_head_dim
        self.in_channels = self.out_channels = in_channels
        self.inner_dim = inner_dim = num_attention_heads * attention_head_dim
        self.use_linear_projection, self.gradient_checkpointing = use_linear_projection, False
        self.is_input_continuous, self.is_input_vectorized, self.is_input_patches = True, False, False

        self.norm = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        self.proj_in = projection(in_channels, inner_dim, use_linear_projection)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                cross_attention_dim=cross_attention_dim,
                activation_fn=activation_fn,
                num_embeds_ada_norm=num_embeds_ada_norm,
                attention_bias=attention_bias,
                only_cross_attention=only_cross_attention,
                double_self_attention=double_self_attention,
                upcast_attention=upcast_attention,
                norm_type=norm_type,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
                attention_type=attention_type,
            )
            for _ in range(num_layers)
        )
        self.proj_out = projection(inner_dim, in_channels, use_linear_projection)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Compute the transformer.

        Args:
            hidden_states: (B, C, H, W).
            encoder_hidden_states: (B, Lk, X), the prompt.
            timestep: not used.
            added_cond_kwargs: not used.
            class_labels: not used.
            cross_attention_kwargs: passed to every attention.
            attention_mask: (B, L), 1 keeps a pixel, 0 hides it; or (B, 1, L), added to the scores.
            encoder_attention_mask: the same for the prompt's tokens.
            return_dict: return a record, else a tuple of its one field.

        Returns:
            A record with `sample` (B, C, H, W).
        """
        size = hidden_states.shape[2:]
        tokens = self.norm(hidden_states)
        if self.use_linear_projection:
            tokens = self.proj_in(tokens.flatten(2).transpose(1, 2))  # (B, C, H, W) -> (B, L, C)
        else:
            tokens = self.proj_in(tokens).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = recomputed(self)(
                block,
                tokens,
                attention_mask=mask_to_bias(attention_mask, tokens.dtype),
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=mask_to_bias(encoder_attention_mask, tokens.dtype),
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        if self.use_linear_projection:
            tokens = self.proj_out(tokens).transpose(1, 2).unflatten(2, size)  # (B, L, C) -> (B, C, H, W)
        else:
            tokens = self.proj_out(tokens.transpose(1, 2).unflatten(2, size).contiguous())
        output = hidden_states + tokens
        return Transformer2DModelOutput(output) if return_dict else (output,)


def projection(in_channels: int, out_channels: int, use_linear: bool) -> nn.Module:
    """Make a layer that acts on each pixel separately."""
    return nn.Linear(in_channels, out_channels) if use_linear else nn.Conv2d(in_channels, out_channels, 1)


def mask_to_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Turn a mask (B, L), 1 keeps and 0 hides, into what is added to scores, (B, 1, L); others stay as they are.

    Source: huggingface/diffusers, models/unets/unet_2d_condition.py.
    """
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
