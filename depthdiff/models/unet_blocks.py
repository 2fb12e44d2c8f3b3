"""The levels of the UNet on the way down and up: residual blocks, transformers, and a change of resolution.

Letters: B batch, C channels, H and W height and width of a feature map, T channels of the time embedding, L tokens of
the prompt, X their channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from depthdiff.checks import refuse_values
from depthdiff.models.base import recomputed
from depthdiff.models.freeu import apply_freeu
from depthdiff.models.levels import (
    Kwargs,
    Level,
    downsampled,
    make_downsamplers,
    make_upsamplers,
    per_layer,
    resnet_options,
    upsampled,
    widths_down,
    widths_up,
)


class DownBlock2D(Level):
    """A level on the way down without attention; arguments as those of `CrossAttnDownBlock2D`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        dropout: float = 0.0,
        num_layers: int = 1,
        resnet_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        resnet_pre_norm: bool = True,
        output_scale_factor: float = 1.0,
        add_downsample: bool = True,
        downsample_padding: int = 1,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._build(
            widths_down(in_channels, out_channels, num_layers),
            None,
            [0] * num_layers,
            **resnet_options(temb_channels, dropout, resnet_eps, resnet_time_scale_shift, resnet_act_fn, resnet_groups),
            pre_norm=resnet_pre_norm,
            output_scale_factor=output_scale_factor,
        )
        self.downsamplers = make_downsamplers(out_channels, downsample_padding) if add_downsample else None

    def forward(
        self, hidden_states: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the level.

        Args:
            hidden_states: (B, C, H, W).
            temb: (B, T).
            *args: not used; for callers that pass a `scale`.
            **kwargs: not used.

        Returns:
            The result, (B, C', H / 2, W / 2), or (B, C', H, W) without downsampling; and the results of all layers in
            order, the last being that result.
        """
        skips: tuple[Tensor, ...] = ()
        for resnet in self.resnets:
            hidden_states = recomputed(self)(resnet, hidden_states, temb)
            skips = (*skips, hidden_states)
        return downsampled(self.downsamplers, hidden_states, skips)


class CrossAttnDownBlock2D(Level):
    """A level on the way down whose pixels attend to each other and to the prompt.

    Args:
        in_channels: C.
        out_channels: C'.
        temb_channels: T.
        dropout: share that is dropped in training.
        num_layers: residual blocks, and transformers.
        transformer_layers_per_block: blocks of each transformer, one number or one a layer.
        resnet_eps: of the residual blocks' norms.
        resnet_time_scale_shift: must be "default" or "group", which are the same.
        resnet_act_fn: name of their activation.
        resnet_groups: of all norms.
        resnet_pre_norm: must be True.
        num_attention_heads: of every attention.
        cross_attention_dim: X.
        output_scale_factor: divides the result of each residual block.
        downsample_padding: of the convolution that halves the resolution.
        add_downsample: whether there is one.
        dual_cross_attention: must be False.
        use_linear_projection: see `Transformer2DModel`.
        only_cross_attention: must be False.
        upcast_attention: compute scores in float32.
        attention_type: must be "default".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        dropout: float = 0.0,
        num_layers: int = 1,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        resnet_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        resnet_pre_norm: bool = True,
        num_attention_heads: int = 1,
        cross_attention_dim: int = 1280,
        output_scale_factor: float = 1.0,
        downsample_padding: int = 1,
        add_downsample: bool = True,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        upcast_attention: bool = False,
        attention_type: str = "default",
    ) -> None:
        super().__init__()
        refuse_values("CrossAttnDownBlock2D", dual_cross_attention=(dual_cross_attention, False))
        self.has_cross_attention, self.num_attention_heads = True, num_attention_heads
        self.gradient_checkpointing = False
        attention = {
            "num_attention_heads": num_attention_heads,
            "cross_attention_dim": cross_attention_dim,
            "norm_num_groups": resnet_groups,
            "use_linear_projection": use_linear_projection,
            "only_cross_attention": only_cross_attention,
            "upcast_attention": upcast_attention,
            "attention_type": attention_type,
        }
        self._build(
            widths_down(in_channels, out_channels, num_layers),
            attention,
            per_layer(transformer_layers_per_block, num_layers),
            **resnet_options(temb_channels, dropout, resnet_eps, resnet_time_scale_shift, resnet_act_fn, resnet_groups),
            pre_norm=resnet_pre_norm,
            output_scale_factor=output_scale_factor,
        )
        self.downsamplers = make_downsamplers(out_channels, downsample_padding) if add_downsample else None

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Kwargs | None = None,
        encoder_attention_mask: Tensor | None = None,
        additional_residuals: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the level.

        Args:
            hidden_states: (B, C, H, W).
            temb: (B, T).
            encoder_hidden_states: (B, L, X), the prompt.
            attention_mask: for self-attention.
            cross_attention_kwargs: for the attention processors.
            encoder_attention_mask: for attention to the prompt.
            additional_residuals: (B, C', H, W), added to the last transformer's result (T2I-Adapter, arXiv:2302.08453).

        Returns:
            The result, (B, C', H / 2, W / 2), or (B, C', H, W) without downsampling; and the results of all layers in
            order, the last being that result.
        """
        skips: tuple[Tensor, ...] = ()
        for index, (resnet, attention) in enumerate(zip(self.resnets, self.attentions, strict=True)):
            hidden_states = recomputed(self)(resnet, hidden_states, temb)
            hidden_states = attention(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )[0]
            if index == len(self.resnets) - 1 and additional_residuals is not None:
                hidden_states = hidden_states + additional_residuals
            skips = (*skips, hidden_states)
        return downsampled(self.downsamplers, hidden_states, skips)


class UpBlock2D(Level):
    """A level on the way up without attention; arguments as those of `CrossAttnUpBlock2D`."""

    def __init__(
        self,
        in_channels: int,
        prev_output_channel: int,
        out_channels: int,
        temb_channels: int,
        resolution_idx: int | None = None,
        dropout: float = 0.0,
        num_layers: int = 1,
        resnet_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        resnet_pre_norm: bool = True,
        output_scale_factor: float = 1.0,
        add_upsample: bool = True,
    ) -> None:
        super().__init__()
        self.resolution_idx, self.gradient_checkpointing = resolution_idx, False
        self._build(
            widths_up(in_channels, prev_output_channel, out_channels, num_layers),
            None,
            [0] * num_layers,
            **resnet_options(temb_channels, dropout, resnet_eps, resnet_time_scale_shift, resnet_act_fn, resnet_groups),
            pre_norm=resnet_pre_norm,
            output_scale_factor=output_scale_factor,
        )
        self.upsamplers = make_upsamplers(out_channels) if add_upsample else None

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: torch.Size | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the level; arguments as those of `CrossAttnUpBlock2D.forward`."""
        for resnet in self.resnets:
            skip, res_hidden_states_tuple = res_hidden_states_tuple[-1], res_hidden_states_tuple[:-1]
            hidden_states, skip = apply_freeu(self, hidden_states, skip)
            hidden_states = torch.cat([hidden_states, skip], dim=1)
            hidden_states = recomputed(self)(resnet, hidden_states, temb)
        return upsampled(self.upsamplers, hidden_states, upsample_size)


class CrossAttnUpBlock2D(Level):
    """A level on the way up whose pixels attend to each other and to the prompt.

    Args:
        in_channels: C of the skip that the last layer reads.
        out_channels: C'.
        prev_output_channel: C of what comes from the coarser level.
        temb_channels: T.
        resolution_idx: number of the level, from the coarsest; FreeU acts on 0 and 1.
        dropout: share that is dropped in training.
        num_layers: residual blocks, and transformers.
        transformer_layers_per_block: blocks of each transformer, one number or one a layer.
        resnet_eps: of the residual blocks' norms.
        resnet_time_scale_shift: must be "default" or "group", which are the same.
        resnet_act_fn: name of their activation.
        resnet_groups: of all norms.
        resnet_pre_norm: must be True.
        num_attention_heads: of every attention.
        cross_attention_dim: X.
        output_scale_factor: divides the result of each residual block.
        add_upsample: whether the resolution is doubled at the end.
        dual_cross_attention: must be False.
        use_linear_projection: see `Transformer2DModel`.
        only_cross_attention: must be False.
        upcast_attention: compute scores in float32.
        attention_type: must be "default".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        prev_output_channel: int,
        temb_channels: int,
        resolution_idx: int | None = None,
        dropout: float = 0.0,
        num_layers: int = 1,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        resnet_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        resnet_pre_norm: bool = True,
        num_attention_heads: int = 1,
        cross_attention_dim: int = 1280,
        output_scale_factor: float = 1.0,
        add_upsample: bool = True,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        upcast_attention: bool = False,
        attention_type: str = "default",
    ) -> None:
        super().__init__()
        refuse_values("CrossAttnUpBlock2D", dual_cross_attention=(dual_cross_attention, False))
        self.has_cross_attention, self.num_attention_heads = True, num_attention_heads
        self.resolution_idx, self.gradient_checkpointing = resolution_idx, False
        attention = {
            "num_attention_heads": num_attention_heads,
            "cross_attention_dim": cross_attention_dim,
            "norm_num_groups": resnet_groups,
            "use_linear_projection": use_linear_projection,
            "only_cross_attention": only_cross_attention,
            "upcast_attention": upcast_attention,
            "attention_type": attention_type,
        }
        self._build(
            widths_up(in_channels, prev_output_channel, out_channels, num_layers),
            attention,
            per_layer(transformer_layers_per_block, num_layers),
            **resnet_options(temb_channels, dropout, resnet_eps, resnet_time_scale_shift, resnet_act_fn, resnet_groups),
            pre_norm=resnet_pre_norm,
            output_scale_factor=output_scale_factor,
        )
        self.upsamplers = make_upsamplers(out_channels) if add_upsample else None

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: Kwargs | None = None,
        upsample_size: torch.Size | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the level.

        Args:
            hidden_states: (B, C, H, W), from the coarser level.
            res_hidden_states_tuple: the results of the layers on the way down, of which the last ones are read.
            temb: (B, T).
            encoder_hidden_states: (B, L, X), the prompt.
            cross_attention_kwargs: for the attention processors.
            upsample_size: height and width of the result; twice the input's if None.
            attention_mask: for self-attention.
            encoder_attention_mask: for attention to the prompt.

        Returns:
            (B, C', 2 H, 2 W).
        """
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            skip, res_hidden_states_tuple = res_hidden_states_tuple[-1], res_hidden_states_tuple[:-1]
            hidden_states, skip = apply_freeu(self, hidden_states, skip)
            hidden_states = torch.cat([hidden_states, skip], dim=1)
            hidden_states = recomputed(self)(resnet, hidden_states, temb)
            hidden_states = attention(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )[0]
        return upsampled(self.upsamplers, hidden_states, upsample_size)
