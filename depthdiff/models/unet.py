"""The UNet: predicts the noise in the latents, given the depth map, the timestep and the prompt.

Source: arXiv:2112.10752 (latent diffusion), with the depth map as one more input channel (Stability-AI/stablediffusion,
ldm/models/diffusion/ddpm.py, `LatentDepth2ImageDiffusion`).

Letters: B batch (twice the pictures with guidance), C channels, h and w height and width of the latents, L tokens of a
prompt, X their channels, T channels of the time embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from depthdiff.checks import show
from depthdiff.config import BaseOutput, register_to_config
from depthdiff.models.attention import AttentionMixin, SliceSize, slice_attention
from depthdiff.models.base import ModelMixin
from depthdiff.models.embeddings import ACTIVATIONS, TimestepEmbedding, Timesteps, get_activation
from depthdiff.models.mid_blocks import UNetMidBlock2D, UNetMidBlock2DCrossAttn
from depthdiff.models.peft import PeftAdapterMixin
from depthdiff.models.transformer import mask_to_bias
from depthdiff.models.unet_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UpBlock2D

PerLevel = int | tuple[int, ...]

NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}
"""Settings of other kinds of UNets, and the only values accepted here: those of every depth-to-image checkpoint."""


@dataclass
class UNet2DConditionOutput(BaseOutput):
    """`sample`: (B, out_channels, h, w), the predicted noise (or v, or clean latents: the scheduler knows)."""

    sample: Tensor


class UNet2DConditionModel(ModelMixin, AttentionMixin, PeftAdapterMixin):
    """The denoising network of latent diffusion.

    Arguments that take one number or a tuple hold one value a level, from the finest to the coarsest. Arguments not
    listed belong to other kinds of UNets; each must have a value of `NOT_BUILT`, or has no effect.

    Args:
        sample_size: h and w that the network was trained on.
        in_channels: of the input; 5 for depth-to-image, four of the latents and the depth.
        out_channels: of the prediction.
        center_input_sample: map the input from [0, 1] to [-1, 1].
        flip_sin_to_cos: see `get_timestep_embedding`.
        freq_shift: see `get_timestep_embedding`.
        down_block_types: class of each level on the way down.
        mid_block_type: class of the coarsest level; None for none.
        up_block_types: class of each level on the way up, the coarsest first.
        block_out_channels: of each level.
        layers_per_block: residual blocks of a level on the way down; on the way up there is one more.
        downsample_padding: of the convolutions that halve the resolution.
        dropout: share that is dropped in training.
        act_fn: name of the activation.
        norm_num_groups: of all group norms.
        norm_eps: of the residual blocks' norms.
        cross_attention_dim: X.
        transformer_layers_per_block: blocks of each transformer.
        attention_head_dim: the number of heads of a level, despite the name.
        use_linear_projection: see `Transformer2DModel`.
        upcast_attention: compute attention scores in float32.

    Raises:
        TypeError: an unknown argument, or one of a wrong type.
        ValueError: a value that is not implemented, or arguments that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D"]  # noqa: RUF012
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_BUILT | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": (1, 0),
        "act_fn": tuple(ACTIVATIONS),
    }
    COUNTS = ("layers_per_block", "transformer_layers_per_block")
    POSITIVE = ("sample_size", "norm_eps", "norm_num_groups", "block_out_channels", "in_channels", "out_channels")

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, ...] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: PerLevel = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: PerLevel = 1280,
        transformer_layers_per_block: PerLevel = 1,
        reverse_transformer_layers_per_block: tuple[int, ...] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: PerLevel = 8,
        num_attention_heads: PerLevel | None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        self._check_levels()
        self.sample_size = sample_size
        widths, last = block_out_channels, len(block_out_channels) - 1
        temb_channels = 4 * widths[0]
        depths, layers = self._per_level("transformer_layers_per_block"), self._per_level("layers_per_block")
        heads, context = self._per_level("attention_head_dim"), self._per_level("cross_attention_dim")
        common: dict[str, Any] = {
            "temb_channels": temb_channels,
            "dropout": dropout,
            "resnet_eps": norm_eps,
            "resnet_act_fn": act_fn,
            "resnet_groups": norm_num_groups,
        }

        def attention(level: int) -> dict[str, Any]:
            return {
                "transformer_layers_per_block": depths[level],
                "num_attention_heads": heads[level],
                "cross_attention_dim": context[level],
                "use_linear_projection": use_linear_projection,
                "upcast_attention": upcast_attention,
            }

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(widths[0], temb_channels, act_fn)
        self.class_embedding = self.encoder_hid_proj = self.time_embed_act = None
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()

        for i, kind in enumerate(down_block_types):
            options: dict[str, Any] = {"in_channels": widths[max(i - 1, 0)], "out_channels": widths[i], **common}
            options |= {"num_layers": layers[i], "add_downsample": i < last, "downsample_padding": downsample_padding}
            attends = kind == "CrossAttnDownBlock2D"
            self.down_blocks.append(
                CrossAttnDownBlock2D(**options, **attention(i)) if attends else DownBlock2D(**options)
            )

        self.mid_block: nn.Module | None = None
        if mid_block_type == "UNetMidBlock2DCrossAttn":
            self.mid_block = UNetMidBlock2DCrossAttn(widths[-1], **common, **attention(last))
        elif mid_block_type == "UNetMidBlock2D":
            self.mid_block = UNetMidBlock2D(widths[-1], **common, num_layers=0, add_attention=False)

        self.num_upsamplers = last
        for i, kind in enumerate(up_block_types):
            level = last - i  # the coarsest level comes first
            options = {"in_channels": widths[max(level - 1, 0)], "out_channels": widths[level], **common}
            options |= {"prev_output_channel": widths[min(level + 1, last)], "num_layers": layers[level] + 1}
            options |= {"resolution_idx": i, "add_upsample": i < last}
            attends = kind == "CrossAttnUpBlock2D"
            self.up_blocks.append(
                CrossAttnUpBlock2D(**options, **attention(level)) if attends else UpBlock2D(**options)
            )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], norm_eps)
        self.conv_act = get_activation(act_fn)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def _per_level(self, name: str) -> tuple[int, ...]:
        """Return a setting that takes one number or one a level as one a level, finest first."""
        value = self.config[name]
        return value if isinstance(value, tuple) else (value,) * len(self.config.block_out_channels)

    def _check_levels(self) -> None:
        """Refuse settings that name another number of levels, or widths that do not fit groups and heads."""
        config, levels = self.config, len(self.config.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(config[name]) != levels or not levels:
                raise ValueError(f"{name} must name {levels} blocks, one a level, got {len(config[name])}")
        for name in ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"):
            numbers = self._per_level(name)
            if len(numbers) != levels or min(numbers) < 1:
                raise ValueError(f"{name} must be a positive number, or {levels} of them, got {config[name]}")
        for channels in config.block_out_channels:
            if channels % config.norm_num_groups:
                raise ValueError(
                    f"block_out_channels must be multiples of {config.norm_num_groups} groups, got {channels}"
                )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: (B, in_channels, h, w); for depth-to-image four noisy latent channels and the depth in [-1, 1].
            timestep: how noisy the latents are, 0..999: a number, or a tensor of no dimension, (1,) or (B,).
            encoder_hidden_states: (B, L, X), the prompts as the text encoder reads them; or (kB, L, X), for which the
                latents are repeated k times.
            class_labels: must be None.
            timestep_cond: must be None.
            attention_mask: must be None.
            cross_attention_kwargs: passed to the attention processors; "scale" multiplies PEFT's adapters.
            added_cond_kwargs: not used.
            down_block_additional_residuals: one for each skip, added to it (ControlNet, arXiv:2302.05543).
            mid_block_additional_residual: (B, C, h', w'), added to the coarsest level's result.
            down_intrablock_additional_residuals: one for each level, added within it (T2I-Adapter, arXiv:2302.08453).
            encoder_attention_mask: (B, L), 1 keeps a token, 0 hides it.
            return_dict: return a record, else a tuple of its one field.

        Returns:
            A record with `sample` (B, out_channels, h, w).

        Raises:
            ValueError: an argument that is not supported, the wrong number of residuals, or a number of prompts that is
                not a multiple of the number of latents.
        """
        self._refuse(class_labels=class_labels, timestep_cond=timestep_cond, attention_mask=attention_mask)
        down_residuals, mid_residual = down_block_additional_residuals, mid_block_additional_residual
        within = down_intrablock_additional_residuals
        self._check_residuals(down_residuals, mid_residual, within)
        sample = repeat_batch(sample, encoder_hidden_states.shape[0])
        bias = None if encoder_attention_mask is None else mask_to_bias(encoder_attention_mask, sample.dtype)
        down_blocks: list[Any] = list(self.down_blocks)
        up_blocks: list[Any] = list(self.up_blocks)
        no_residuals: list[Any] = [None] * len(down_blocks)
        conditions: dict[str, Any] = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": None,
            "cross_attention_kwargs": cross_attention_kwargs,
            "encoder_attention_mask": bias,
        }
        with self._scaled_adapters(cross_attention_kwargs):
            temb = self.time_embedding(self.get_time_embed(sample, timestep), timestep_cond)
            hidden_states = self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample)
            skips: tuple[Tensor, ...] = (hidden_states,)
            for block, residual in zip(down_blocks, within or no_residuals, strict=True):
                hidden_states, more = go_down(block, hidden_states, temb, conditions, residual)
                skips = (*skips, *more)
            if down_residuals is not None:
                skips = tuple(skip + residual for skip, residual in zip(skips, down_residuals, strict=True))
            if self.mid_block is not None:
                attends = getattr(self.mid_block, "has_cross_attention", False)
                hidden_states = self.mid_block(hidden_states, temb, **(conditions if attends else {}))
            if mid_residual is not None:
                hidden_states = hidden_states + mid_residual
            uneven = any(side % 2**self.num_upsamplers for side in sample.shape[2:])
            size = None  # of a level's result; where sides are uneven, that of the next skip
            for block in up_blocks:
                count = len(block.resnets)
                skips, read = skips[:-count], skips[-count:]
                if uneven and skips:
                    size = skips[-1].shape[2:]
                hidden_states = go_up(block, hidden_states, read, temb, conditions, size)
            hidden_states = self.conv_norm_out(hidden_states)
            hidden_states = self.conv_act(hidden_states)
            hidden_states = self.conv_out(hidden_states)
        return UNet2DConditionOutput(hidden_states) if return_dict else (hidden_states,)

    def get_time_embed(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Encode a timestep as sinusoids for every row of `sample`: (B, C), in its dtype."""
        timesteps = torch.as_tensor(timestep, device=sample.device)
        if timesteps.numel() == 1:
            timesteps = timesteps.reshape(1).expand(sample.shape[0])
        elif timesteps.shape != (sample.shape[0],):
            timesteps = repeat_batch(timesteps, sample.shape[0], "timestep")
        return self.time_proj(timesteps).to(sample.dtype)

    def get_class_embed(self, sample: Tensor, class_labels: None) -> None:
        """Return None: a depth-to-image UNet knows no classes."""
        return None

    def set_attention_slice(self, slice_size: SliceSize | list[int] | None = "auto") -> None:
        """Compute attention for some heads at a time; see `depthdiff.models.attention.slice_attention`."""
        slice_attention(self, slice_size)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Weaken the skips and strengthen the backbone of the two coarsest levels on the way up (arXiv:2309.11497).

        Args:
            s1: times the low frequencies of the skips, at the coarsest level.
            s2: the same at the next one.
            b1: times half of the backbone's channels, at the coarsest level.
            b2: the same at the next one.
        """
        for block in self.up_blocks:
            block.s1, block.s2, block.b1, block.b2 = s1, s2, b1, b2  # type: ignore[assignment]

    def disable_freeu(self) -> None:
        """Take skips and backbone as they are."""
        for block in self.up_blocks:
            for name in ("s1", "s2", "b1", "b2"):
                if hasattr(block, name):
                    setattr(block, name, None)

    def _refuse(self, **unread: Tensor | None) -> None:
        for name, value in unread.items():
            if value is not None:
                raise ValueError(f"{name} must be None, got {show(value)}; depth-to-image UNets do not support it")

    def _check_residuals(
        self, down: Sequence[Tensor] | None, mid: Tensor | None, within: Sequence[Tensor] | None
    ) -> None:
        """Refuse the wrong number of residuals of a ControlNet or T2I-Adapter."""
        if (down is None) != (mid is None):
            raise ValueError(
                "down_block_additional_residuals and mid_block_additional_residual must be given together; for a "
                "T2I-Adapter pass down_intrablock_additional_residuals"
            )
        blocks: list[Any] = list(self.down_blocks)
        levels, skips = len(blocks), 1 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in blocks)
        for name, given, wanted in (
            ("down_block_additional_residuals", down, skips),
            ("down_intrablock_additional_residuals", within, levels),
        ):
            if given is not None and len(given) != wanted:
                raise ValueError(f"{name} must hold {wanted} tensors, got {len(given)}")


def go_down(
    block: nn.Module, hidden_states: Tensor, temb: Tensor, conditions: dict[str, Any], residual: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a level on the way down; `residual` is a T2I-Adapter's."""
    if getattr(block, "has_cross_attention", False):
        more = {} if residual is None else {"additional_residuals": residual}
        return block(hidden_states=hidden_states, temb=temb, **conditions, **more)
    hidden_states, skips = block(hidden_states=hidden_states, temb=temb)
    if residual is not None:
        hidden_states = hidden_states + residual
        skips = (*skips[:-1], hidden_states)
    return hidden_states, skips


def go_up(
    block: nn.Module,
    hidden_states: Tensor,
    skips: tuple[Tensor, ...],
    temb: Tensor,
    conditions: dict[str, Any],
    size: torch.Size | None,
) -> Tensor:
    """Run a level on the way up; `size` is that of the result, where it is not twice the input's."""
    more = conditions if getattr(block, "has_cross_attention", False) else {}
    return block(hidden_states=hidden_states, temb=temb, res_hidden_states_tuple=skips, upsample_size=size, **more)


def repeat_batch(x: Tensor, rows: int, name: str = "sample") -> Tensor:
    """Repeat a batch until it has as many rows as there are prompts.

    Raises:
        ValueError: `rows` is not a multiple of those of `x`.
    """
    own = x.shape[0]
    if own == rows:
        return x
    if own == 0 or rows % own:
        raise ValueError(f"encoder_hidden_states must have as many rows as {name} or a multiple, got {rows}, {own}")
    return torch.cat([x] * (rows // own))
