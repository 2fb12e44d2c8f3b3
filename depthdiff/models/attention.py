"""Attention: the layer with its weights, and the processors that compute with them.

A processor computes softmax(q kᵀ / sqrt(D)) v (arXiv:1706.03762, eq. 1) for one layer, with the layer's weights. All
give the same result to rounding, where `scale` is 1 / sqrt(D) and nothing is upcast. A layer's processor can be
replaced at any time.

Letters: B batch, C channels of a token, H heads, D channels of a head, L tokens, Lk tokens that are attended to.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from depthdiff.checks import brief, plain, refuse_values

SliceSize = int | Literal["auto", "max"]
Processor = Callable[..., Tensor]


class Attention(nn.Module):
    """Attend from every token to those of its own sequence, or of a second one such as the prompt.

    Args:
        query_dim: C of the tokens that attend.
        cross_attention_dim: C of the tokens that are attended to; their own if None.
        heads: H.
        kv_heads: not implemented.
        dim_head: D.
        dropout: share of the result that is dropped in training.
        bias: whether queries, keys and values have one.
        upcast_attention: compute scores in float32.
        upcast_softmax: compute the softmax in float32.
        cross_attention_norm: not implemented.
        cross_attention_norm_num_groups: not used.
        qk_norm: not implemented.
        added_kv_proj_dim: not implemented.
        added_proj_bias: not used.
        norm_num_groups: groups of a norm of the input, where there is one.
        spatial_norm_dim: not implemented.
        out_bias: whether the result's projection has a bias.
        scale_qk: divide scores by sqrt(D).
        only_cross_attention: not implemented.
        eps: of the norm.
        rescale_output_factor: divides the result.
        residual_connection: add the input to the result.
        processor: computes the attention; `AttnProcessor2_0` if None.
        out_dim: must be None or `query_dim`.
        out_context_dim: not implemented.
        context_pre_only: not implemented.
        pre_only: not implemented.
        elementwise_affine: not used.
        is_causal: not implemented.

    Raises:
        ValueError: an argument that is not implemented.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        upcast_attention: bool = False,
        upcast_softmax: bool = False,
        cross_attention_norm: str | None = None,
        cross_attention_norm_num_groups: int = 32,
        qk_norm: str | None = None,
        added_kv_proj_dim: int | None = None,
        added_proj_bias: bool | None = True,
        norm_num_groups: int | None = None,
        spatial_norm_dim: int | None = None,
        out_bias: bool = True,
        scale_qk: bool = True,
        only_cross_attention: bool = False,
        eps: float = 1e-5,
        rescale_output_factor: float = 1.0,
        residual_connection: bool = False,
        _from_deprecated_attn_block: bool = False,
        processor: Processor | None = None,
        out_dim: int | None = None,
        out_context_dim: int | None = None,
        context_pre_only: bool | None = None,
        pre_only: bool = False,
        elementwise_affine: bool = True,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        refuse_values("Attention", kv_heads=(kv_heads, None), qk_norm=(qk_norm, None), pre_only=(pre_only, False))
        refuse_values("Attention", spatial_norm_dim=(spatial_norm_dim, None), is_causal=(is_causal, False))
        refuse_values("Attention", added_kv_proj_dim=(added_kv_proj_dim, None), out_dim=(out_dim, None, query_dim))
        refuse_values("Attention", cross_attention_norm=(cross_attention_norm, None))
        refuse_values("Attention", only_cross_attention=(only_cross_attention, False))
        self.query_dim, self.out_dim, self.heads, self.inner_dim = query_dim, query_dim, heads, heads * dim_head
        self.inner_kv_dim = self.inner_dim
        self.is_cross_attention = cross_attention_dim is not None
        self.cross_attention_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.scale = dim_head**-0.5 if scale_qk else 1.0
        self.scale_qk, self.use_bias, self.dropout = scale_qk, bias, dropout
        self.upcast_attention, self.upcast_softmax = upcast_attention, upcast_softmax
        self.rescale_output_factor, self.residual_connection = rescale_output_factor, residual_connection
        self._from_deprecated_attn_block = _from_deprecated_attn_block
        self.sliceable_head_dim = heads
        self.only_cross_attention, self.added_kv_proj_dim, self.added_proj_bias = False, None, added_proj_bias
        self.fused_projections, self.is_causal, self.pre_only, self.context_pre_only = False, False, False, None
        self.norm_cross = self.norm_q = self.norm_k = self.spatial_norm = None
        self.norm_added_q = self.norm_added_k = None

        self.group_norm = None if norm_num_groups is None else nn.GroupNorm(norm_num_groups, query_dim, eps)
        self.to_q = nn.Linear(query_dim, self.inner_dim, bias=bias)
        self.to_k = nn.Linear(self.cross_attention_dim, self.inner_dim, bias=bias)
        self.to_v = nn.Linear(self.cross_attention_dim, self.inner_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, query_dim, bias=out_bias), nn.Dropout(dropout)])
        self.set_processor(AttnProcessor2_0() if processor is None else processor)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (B, L, C), or a map (B, C, height, width) whose pixels are the tokens.
            encoder_hidden_states: (B, Lk, C'), the tokens to attend to; `hidden_states` if None.
            attention_mask: (B, 1, Lk), added to the scores: 0 keeps a token, -10000 hides it.
            **cross_attention_kwargs: passed to the processor, as far as it takes them.

        Returns:
            Of the shape of `hidden_states`.
        """
        kwargs = self._accepted(cross_attention_kwargs) if cross_attention_kwargs else {}
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **kwargs,
        )

    def _accepted(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Select the arguments that the processor takes, and warn of others."""
        call: Any = self.processor
        if not isinstance(call, (FunctionType, MethodType, partial)):
            call = call.forward if type(call).__call__ is nn.Module.__call__ else call.__call__
        parameters = inspect.signature(call).parameters
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            return kwargs
        unknown = [name for name in kwargs if name not in parameters]
        if any(kwargs[name] is not None for name in unknown):
            kind = getattr(self.processor, "__name__", type(self.processor).__name__)
            warnings.warn(f"cross_attention_kwargs {unknown} are unknown to {kind}, and are ignored", stacklevel=4)
        return {name: value for name, value in kwargs.items() if name in parameters}

    def set_processor(self, processor: Processor) -> None:
        """Set the processor; one that is an `nn.Module` is registered as a submodule."""
        if isinstance(vars(self).get("_modules", {}).get("processor"), nn.Module):
            del self._modules["processor"]
        if isinstance(processor, nn.Module):
            vars(self).pop("processor", None)
        self.processor = processor

    def get_processor(self, return_deprecated_lora: bool = False) -> Processor:
        """Return the processor."""
        return self.processor

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Process `slice_size` heads at a time, or all if None. A processor of another class stays.

        Raises:
            ValueError: more heads than there are.
        """
        if slice_size is not None and slice_size > self.sliceable_head_dim:
            raise ValueError(f"slice_size must be at most {self.sliceable_head_dim} heads, got {slice_size}")
        if type(self.processor) in STANDARD:
            self.set_processor(AttnProcessor2_0() if slice_size is None else SlicedAttnProcessor(slice_size))

    def set_use_memory_efficient_attention_xformers(
        self, use_memory_efficient_attention_xformers: bool, attention_op: None = None
    ) -> None:
        """Choose torch's memory-efficient kernel, or the default. A processor of another class stays.

        Raises:
            ValueError: `attention_op` is given: torch chooses the operator.
        """
        if attention_op is not None:
            raise ValueError(f"attention_op must be None, got {brief(attention_op)}: torch chooses the operator")
        if type(self.processor) in STANDARD:
            efficient = use_memory_efficient_attention_xformers
            self.set_processor(XFormersAttnProcessor() if efficient else AttnProcessor2_0())

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """Split heads: (B, L, C) -> (B * H, L, D), or (B, H, L, D) for `out_dim` 4."""
        heads = tensor.unflatten(-1, (self.heads, -1)).movedim(-2, 1)  # (B, H, ..., L, D)
        if tensor.ndim == 4:
            heads = heads.flatten(2, 3)
        return heads.flatten(0, 1) if out_dim == 3 else heads

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """Join heads: (B * H, L, D) -> (B, L, C)."""
        return tensor.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the attention matrix (B * H, L, Lk) of (B * H, L, D) and (B * H, Lk, D); its rows sum to 1."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        if attention_mask is None:
            scores = self.scale * (query @ key.transpose(-1, -2))
        elif attention_mask.dtype == torch.bool:
            scores = (self.scale * (query @ key.transpose(-1, -2))).masked_fill(~attention_mask, -torch.inf)
        else:
            scores = torch.baddbmm(attention_mask.to(query.dtype), query, key.transpose(-1, -2), alpha=self.scale)
        if self.upcast_softmax:
            scores = scores.float()
        return scores.softmax(dim=-1).to(dtype)

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor | None:
        """Repeat a mask for every head: (B, 1, Lk) -> (B * H, 1, Lk), or (B, H, 1, Lk) for `out_dim` 4.

        Raises:
            ValueError: the mask is not `target_length` tokens long.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            raise ValueError(f"attention_mask must be {target_length} tokens long, got {attention_mask.shape[-1]}")
        if out_dim == 4:
            return attention_mask.unsqueeze(1).repeat_interleave(self.heads, dim=1)
        if attention_mask.shape[0] < batch_size * self.heads:
            attention_mask = attention_mask.repeat_interleave(self.heads, dim=0)
        return attention_mask

    def norm_encoder_hidden_states(self, encoder_hidden_states: Tensor) -> Tensor:
        """Return the tokens to attend to as they are: no checkpoint of this kind norms them."""
        return encoder_hidden_states


class AttnProcessor:
    """Attention by its definition, with the whole (L, Lk) matrix in memory."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Attend; arguments as those of `Attention.forward`. `temb` and `scale` are not used."""
        residual = hidden_states
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, C, height, width) -> (B, L, C)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        hidden_states = self.attend(attn, q, k, v, attention_mask)
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if residual.ndim == 4:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, residual.shape[2:])
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Compute softmax(q kᵀ / sqrt(D)) v of (B, L, C) and (B, Lk, C): (B, L, C)."""
        mask = attn.prepare_attention_mask(attention_mask, k.shape[1], q.shape[0])
        q, k, v = attn.head_to_batch_dim(q), attn.head_to_batch_dim(k), attn.head_to_batch_dim(v)
        return attn.batch_to_head_dim(attn.get_attention_scores(q, k, mask) @ v)


class AttnProcessor2_0(AttnProcessor):  # noqa: N801  (the published name)
    """Attention by torch's fused kernel, which chooses its back end; the default."""

    def attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Compute softmax(q kᵀ / sqrt(D)) v of (B, L, C) and (B, Lk, C): (B, L, C)."""
        mask = attn.prepare_attention_mask(attention_mask, k.shape[1], q.shape[0], out_dim=4)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        q, k, v = (attn.head_to_batch_dim(x, out_dim=4) for x in (q, k, v))
        return self.kernel(q, k, v, mask).transpose(1, 2).flatten(2)

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend: q (B, H, L, D), k and v (B, H, Lk, D) -> (B, H, L, D). As published, `attn.scale` is not read."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class XFormersAttnProcessor(AttnProcessor2_0):
    """Attention by torch's memory-efficient kernel, or its plain one where there is none. Source: arXiv:2112.05682."""

    def __init__(self, attention_op: None = None) -> None:
        self.attention_op = attention_op

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend: q (B, H, L, D), k and v (B, H, Lk, D) -> (B, H, L, D)."""
        order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            return super().kernel(q, k, v, mask)


class SlicedAttnProcessor(AttnProcessor):
    """Attention for some heads at a time, so that only so many (L, Lk) matrices exist at once.

    Args:
        slice_size: heads at a time, counted over the batch.
    """

    def __init__(self, slice_size: int) -> None:
        self.slice_size = slice_size

    def attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Compute softmax(q kᵀ / sqrt(D)) v of (B, L, C) and (B, Lk, C): (B, L, C)."""
        mask = attn.prepare_attention_mask(attention_mask, k.shape[1], q.shape[0])
        q, k, v = attn.head_to_batch_dim(q), attn.head_to_batch_dim(k), attn.head_to_batch_dim(v)
        slices = []
        for start in range(0, q.shape[0], self.slice_size):
            some = slice(start, start + self.slice_size)
            scores = attn.get_attention_scores(q[some], k[some], None if mask is None else mask[some])
            slices.append(scores @ v[some])
        return attn.batch_to_head_dim(torch.cat(slices))


STANDARD = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, SlicedAttnProcessor)
"""Processors that the switches of a network may replace."""

FORMS: dict[str, type[AttnProcessor]] = {
    "sdpa": AttnProcessor2_0,
    "efficient": XFormersAttnProcessor,
    "sliced": SlicedAttnProcessor,
    "math": AttnProcessor,
}
"""Short names of the processors."""


class AttentionMixin:
    """Base of the networks whose attention can be chosen layer by layer."""

    @property
    def attn_processors(self) -> dict[str, Processor]:
        """The processors of all attention layers by path, such as "mid_block.attentions.0…attn1.processor"."""
        return {f"{name}.processor": layer.get_processor() for name, layer in self._attention_layers().items()}

    def _attention_layers(self) -> dict[str, Attention]:
        modules: Any = self.named_modules()  # type: ignore[attr-defined]
        return {name: module for name, module in modules if isinstance(module, Attention)}

    def set_attn_processor(self, processor: Processor | dict[str, Processor]) -> None:
        """Set the processors of all attention layers.

        Args:
            processor: one for all, or a dict with one for each path of `attn_processors`, which is emptied.

        Raises:
            ValueError: the number of processors is not that of the layers.
            KeyError: a path is missing.
        """
        layers = self._attention_layers()
        if not isinstance(processor, dict):
            for layer in layers.values():
                layer.set_processor(processor)
            return
        if len(processor) != len(layers):
            raise ValueError(f"the number of processors must be that of layers, {len(layers)}, got {len(processor)}")
        chosen = {name: processor[f"{name}.processor"] for name in layers}
        for name, layer in layers.items():
            layer.set_processor(chosen[name])
        processor.clear()

    def set_default_attn_processor(self) -> None:
        """Set the classic `AttnProcessor` on every attention layer.

        Raises:
            ValueError: a layer has a processor of another class.
        """
        foreign = [one for one in self.attn_processors.values() if type(one) not in STANDARD]
        if foreign:
            raise ValueError(
                f"set_default_attn_processor would discard a {type(foreign[0]).__name__}; "
                "call set_attn_processor instead"
            )
        self.set_attn_processor(AttnProcessor())

    def set_attention(self, name: str, slice_size: SliceSize = "auto") -> None:
        """Choose the processor of all layers but those that have one of another class.

        Args:
            name: "sdpa" (torch's fused kernel), "efficient" (its memory-efficient one), "sliced" or "math".
            slice_size: for "sliced": heads at a time; "auto" takes half of a layer's heads, "max" one.

        Raises:
            ValueError: unknown name, or a slice size beyond a layer's heads.
        """
        if not isinstance(name, str) or name not in FORMS:
            raise ValueError(f"attention must be one of {', '.join(FORMS)}, got {brief(name)}")
        if name == "sliced":
            return slice_attention(self, slice_size)
        for layer in self._attention_layers().values():
            if type(layer.processor) in STANDARD:
                layer.set_processor(FORMS[name]())


def slice_attention(network: AttentionMixin, slice_size: SliceSize | list[int] | None) -> None:
    """Compute attention for some heads at a time.

    Args:
        network: whose attention layers.
        slice_size: heads at a time, "auto" for half of a layer's, "max" for one, a list with one number a layer,
            or None for all at once.

    Raises:
        ValueError: an unknown word, a number out of range, or a list of another length.
    """
    layers = list(network._attention_layers().values())
    heads = [layer.sliceable_head_dim for layer in layers]
    sizes: Any = plain(slice_size)
    if isinstance(sizes, str) and sizes in ("auto", "max"):
        sizes = [max(count // 2, 1) if sizes == "auto" else 1 for count in heads]
    elif not isinstance(sizes, list):
        sizes = [sizes] * len(layers)
    if len(sizes) != len(layers):
        raise ValueError(f"slice_size must hold {len(layers)} numbers, one a layer, got {len(sizes)}")
    for size, count in zip(sizes, heads, strict=True):
        valid = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= count
        if size is not None and not valid:
            raise ValueError(
                f'slice_size must be "auto", "max", None or heads from 1 to {min(heads)}, got {brief(slice_size)}'
            )
    for layer, size in zip(layers, sizes, strict=True):
        layer.set_attention_slice(size)
