"""The coarsest levels of the UNet and of the autoencoder.

Letters: B batch, C channels, H and W height and width of a feature map, T channels of the time embedding.
"""

from __future__ import annotations

from torch import Tensor, nn

from depthdiff.checks import refuse_values
from depthdiff.models.attention import Attention
from depthdiff.models.base import recomputed
from depthdiff.models.levels import Kwargs, Level, make_transformer, per_layer, resnet_options
from depthdiff.models.resnet import ResnetBlock2D


class UNetMidBlock2DCrossAttn(Level):
    """The coarsest level: a residual block, then transformers and residual blocks in turn.

    Arguments as those of `CrossAttnDownBlock2D`; `out_channels` must be None or `in_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        temb_channels: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        num_layers: int = 1,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        resnet_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        resnet_groups_out: int | None = None,
        resnet_pre_norm: bool = True,
        num_attention_heads: int = 1,
        output_scale_factor: float = 1.0,
        cross_attention_dim: int = 1280,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        attention_type: str = "default",
    ) -> None:
        super().__init__()
        refuse_values(
            "UNetMidBlock2DCrossAttn",
            dual_cross_attention=(dual_cross_attention, False),
            out_channels=(out_channels, None, in_channels),
            resnet_groups_out=(resnet_groups_out, None, resnet_groups),
        )
        self.has_cross_attention, self.num_attention_heads = True, num_attention_heads
        self.gradient_checkpointing = False
        resnet = resnet_options(
            temb_channels, dropout, resnet_eps, resnet_time_scale_shift, resnet_act_fn, resnet_groups
        )
        resnet |= {"in_channels": in_channels, "pre_norm": resnet_pre_norm, "output_scale_factor": output_scale_factor}
        resnets, attentions = [ResnetBlock2D(**resnet)], []
        for depth in per_layer(transformer_layers_per_block, num_layers):
            attentions.append(
                make_transformer(
                    in_channels,
                    depth,
                    num_attention_heads=num_attention_heads,
                    cross_attention_dim=cross_attention_dim,
                    norm_num_groups=resnet_groups,
                    use_linear_projection=use_linear_projection,
                    upcast_attention=upcast_attention,
                    attention_type=attention_type,
                )
            )
            resnets.append(ResnetBlock2D(**resnet))
        self.attentions, self.resnets = nn.ModuleList(attentions), nn.ModuleList(resnets)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Kwargs | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); arguments as those of `CrossAttnDownBlock2D.forward`."""
        hidden_states = self.resnets[0](hidden_states, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            hidden_states = attention(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )[0]
            hidden_states = recomputed(self)(resnet, hidden_states, temb)
        return hidden_states


class UNetMidBlock2D(nn.Module):
    """The coarsest level of the autoencoder, or of a UNet without attention there.

    Args:
        in_channels: C.
        temb_channels: T; None in the autoencoder.
        dropout: share that is dropped in training.
        num_layers: attentions, each followed by a residual block.
        resnet_eps: of all norms.
        resnet_time_scale_shift: "default", or "group" in a decoder.
        resnet_act_fn: name of the activation.
        resnet_groups: of the residual blocks' norms.
        attn_groups: of the attentions' norms; as many if None.
        resnet_pre_norm: must be True.
        add_attention: whether there are attentions.
        attention_head_dim: channels of a head.
        output_scale_factor: must be 1.
    """

    def __init__(
        self,
        in_channels: int,
        temb_channels: int | None,
        dropout: float = 0.0,
        num_layers: int = 1,
        resnet_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        resnet_act_fn: str = "swish",
        resnet_groups: int = 32,
        attn_groups: int | None = None,
        resnet_pre_norm: bool = True,
        add_attention: bool = True,
        attention_head_dim: int = 1,
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.add_attention, self.gradient_checkpointing = add_attention, False
        resnet = resnet_options(
            temb_channels, dropout, resnet_eps, resnet_time_scale_shift, resnet_act_fn, resnet_groups
        )
        resnet |= {"in_channels": in_channels, "pre_norm": resnet_pre_norm, "output_scale_factor": output_scale_factor}
        resnets: list[nn.Module] = [ResnetBlock2D(**resnet)]
        attentions: list[nn.Module | None] = []
        for _ in range(num_layers):
            attentions.append(
                Attention(
                    in_channels,
                    heads=in_channels // attention_head_dim,
                    dim_head=attention_head_dim,
                    eps=resnet_eps,
                    norm_num_groups=attn_groups or resnet_groups,
                    residual_connection=True,
                    bias=True,
                    upcast_softmax=True,
                    _from_deprecated_attn_block=True,
                )
                if add_attention
                else None
            )
            resnets.append(ResnetBlock2D(**resnet))
        self.attentions = nn.ModuleList(attentions)  # type: ignore[arg-type]
        self.resnets = nn.ModuleList(resnets)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and (B, T) -> (B, C, H, W)."""
        hidden_states = self.resnets[0](hidden_states, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                hidden_states = attention(hidden_states, temb=temb)
            hidden_states = recomputed(self)(resnet, hidden_states, temb)
        return hidden_states
