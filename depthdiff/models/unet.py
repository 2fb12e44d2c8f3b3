"""The UNet: predicts the noise in the latents, given the depth map, the timestep and the prompt.

Source: arXiv:2112.10752 (latent diffusion), with the depth map as one more input channel (Stability-AI/stablediffusion,
ldm/models/diffusion/ddpm.py, `LatentDepth2ImageDiffusion`).

Letters: B latents, P prompts for them, as many or a multiple of B, C channels, h and w height and width of the latents,
L tokens of a prompt, D their channels, T channels of the time embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from depthdiff.config import Config, Output
from depthdiff.models.attention import KeysValues
from depthdiff.models.layers import ACTIVATIONS, TimestepEmbedding, TransformerBlock, timestep_embedding, widened
from depthdiff.models.plain import version_of
from depthdiff.models.shortcuts import DeepFeatures, TokenMerging
from depthdiff.models.unet_blocks import DownBlock, Level, MidBlock, UpBlock
from depthdiff.models.visits import LayerwiseCasting

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
READINGS = 2
"""How many prompts a run's memory holds: with guidance and without."""


@dataclass(frozen=True)
class UNet2DConditionConfig(Config):
    """What a checkpoint fixes about the UNet; names and defaults are those of the published `config.json`.

    Fields that take one number or a tuple hold one value a level, from the finest to the coarsest.
    `attention_head_dim` is, against its name, the number of heads of a level.
    """

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False

    COUNTS: ClassVar[tuple[str, ...]] = ("layers_per_block", "transformer_layers_per_block")
    POSITIVE: ClassVar[tuple[str, ...]] = ("sample_size", "norm_eps")
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "down_block_types": DOWN_BLOCKS,
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "up_block_types": UP_BLOCKS,
        "downsample_padding": (1, 0),
        "act_fn": tuple(ACTIVATIONS),
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

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(self[name]) != levels or not levels:
                raise ValueError(f"{name} must name {levels} blocks, one a level, got {len(self[name])}")
        for name in ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"):
            numbers = self.per_level(name)
            if len(numbers) != levels or min(numbers) < 1:
                raise ValueError(f"{name} must be a positive number, or {levels} of them, got {self[name]}")
        for channels in self.block_out_channels:
            if self.norm_num_groups < 1 or channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels must be multiples of {self.norm_num_groups} groups, got {channels}"
                )
        if min(self.in_channels, self.out_channels) < 1:
            raise ValueError(
                f"in_channels and out_channels must be positive, got {self.in_channels, self.out_channels}"
            )

    def per_level(self, name: str) -> tuple[int, ...]:
        """Return a field that takes one number or one a level as one a level, finest first."""
        value = self[name]
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


@dataclass
class UNet2DConditionOutput(Output):
    """`sample`: (P, out_channels, h, w), the predicted noise (or v, or clean latents: the scheduler knows)."""

    sample: Tensor


@dataclass
class Memory:
    """What stays the same over the calls of a run.

    Attributes:
        readers: the blocks that attend to the prompt.
        times: identity of a timestep's tensor -> that tensor and its embedding (1, T).
        contexts: the prompts read last, at most `READINGS`, the latest at the end. Of each, what it was read from (the
            tensor, and the state of it and of the weights that read it) and the prompt as each block reads it.
    """

    readers: list[TransformerBlock]
    times: dict[int, tuple[Tensor, Tensor]]
    contexts: list[tuple[tuple[Any, ...], list[KeysValues]]] = field(default_factory=list)


class UNet2DConditionModel(LayerwiseCasting):
    """The denoising network of latent diffusion.

    Args:
        config: its geometry.
    """

    config_class = UNet2DConditionConfig
    weights_name = "diffusion_pytorch_model"
    bodies = ("predict",)
    config: UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig) -> None:
        super().__init__(config)
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], config.act_fn)
        self.act = ACTIVATIONS[config.act_fn]()

        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            level = Level(config, i, attention=kind == "CrossAttnDownBlock2D")
            self.down_blocks.append(DownBlock(level, widths[max(i - 1, 0)], downsample=i < last))

        self.mid_block: MidBlock | None = None
        if config.mid_block_type is not None:
            self.mid_block = MidBlock(Level(config, last, attention=config.mid_block_type == "UNetMidBlock2DCrossAttn"))

        self.up_blocks = nn.ModuleList()
        for i, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):  # the coarsest level comes first
            level = Level(config, i, attention=kind == "CrossAttnUpBlock2D")
            self.up_blocks.append(UpBlock(level, widths[min(i + 1, last)], widths[max(i - 1, 0)], upsample=i > 0))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

        self._memory: Memory | None = None
        for slot, block in enumerate(self._readers()):
            block.slot = slot

    def _readers(self) -> list[TransformerBlock]:
        """List the blocks that attend to the prompt."""
        return [module for module in self.modules() if isinstance(module, TransformerBlock)]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        *,
        deep: DeepFeatures | None = None,
        merging: TokenMerging | None = None,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: (B, in_channels, h, w); for depth-to-image four noisy latent channels and the depth in [-1, 1].
            timestep: how noisy the latents are, 0..999: a number, or a tensor of no dimension or (B,).
            encoder_hidden_states: (P, L, D), prompts as the text encoder reads them. The latents are taken again and
                again, each time with the next B prompts; so guidance needs them once, and what comes before the first
                attention to a prompt is computed once for all.
            return_dict: return a record, else a tuple of its one field.
            deep: what earlier calls of the same run computed in the deeper part, to reuse it.
            merging: of tokens, in the finest level that attends.

        Returns:
            A record with `sample` (P, out_channels, h, w).

        Raises:
            ValueError: a number of prompts that is no multiple of that of the latents.
        """
        rows = len(encoder_hidden_states)
        if rows % max(1, len(sample)):
            raise ValueError(
                f"encoder_hidden_states must have as many rows as sample or a multiple, got {rows} for {len(sample)}"
            )
        time, context = self._embed_time(timestep, sample), self._read_context(encoder_hidden_states)
        noise_pred = widened(self.predict(sample, time, context, deep, merging), rows)  # none may read a prompt
        return UNet2DConditionOutput(noise_pred) if return_dict else (noise_pred,)

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn timesteps (N,) into what the residual blocks read: (N, T), after the activation they all apply to it."""
        config = self.config
        sinusoids = timestep_embedding(
            timesteps,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        return self.act(self.time_embedding(sinusoids.to(dtype)))

    def read_context(self, context: Tensor) -> list[KeysValues]:
        """Compute what each block attends to in the prompts (P, L, D)."""
        return [block.cross_attn.read(context) for block in self._readers()]

    def predict(
        self,
        sample: Tensor,
        time: Tensor,
        context: Sequence[KeysValues],
        deep: DeepFeatures | None = None,
        merging: TokenMerging | None = None,
    ) -> Tensor:
        """Run the network proper.

        Args:
            sample: (B, in_channels, h, w).
            time: (B, T), or (1, T) for all, of `embed_time`.
            context: of `read_context`.
            deep: see `forward`.
            merging: see `forward`.

        Returns:
            (P, out_channels, h, w); (B, ...) where no block attends to prompts.
        """
        rows = len(context[0].keys) if context else len(sample)
        time = time if len(time) == 1 else widened(time, rows)
        x = self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample)
        features = None if deep is None else deep.recall(rows, x.shape[2:])
        if features is None:
            features = self._go_deep(x, rows, time, context, merging)
            features = features if deep is None else deep.keep(features)
        x = self.up_blocks[-1](features, [x], time, context, self._merging(merging, 0), slice(-1, None))
        return self.conv_out(self.act(self.conv_norm_out(x)))

    def _go_deep(
        self, x: Tensor, rows: int, time: Tensor, context: Sequence[KeysValues], merging: TokenMerging | None
    ) -> Tensor:
        """Run everything between the first convolution, whose result `x` is, and the last residual block."""
        skips = [x]
        for level, down_block in enumerate(self.down_blocks):
            x, more = down_block(x, time, context, self._merging(merging, level))
            skips.extend(more)
        x = widened(x, rows)
        if self.mid_block is not None:
            x = self.mid_block(x, time, context)
        for level, up_block in zip(range(len(self.up_blocks) - 1, -1, -1), self.up_blocks, strict=True):
            part = slice(None) if level else slice(-1)
            x = up_block(x, skips, time, context, self._merging(merging, level), part)
        return x

    def _merging(self, merging: TokenMerging | None, level: int) -> TokenMerging | None:
        """Return what merges the tokens of a level, 0 being the finest: None but in the finest that attends."""
        kinds = zip(self.config.down_block_types, reversed(self.config.up_block_types), strict=True)
        attending = [i for i, pair in enumerate(kinds) if any(kind.startswith("CrossAttn") for kind in pair)]
        return merging if attending[:1] == [level] else None

    @contextmanager
    def remembering(self, timesteps: Sequence[Tensor]) -> Iterator[None]:
        """Within, embed these timesteps once, and read a prompt anew only when it or the weights that read it change.

        Args:
            timesteps: each a tensor of no dimension; calls are recognised by getting one of these very tensors.
        """
        dtype = self.dtype
        known = {
            id(t): (t, self.embed_time(t.reshape(1), dtype)) for t in timesteps
        }  # one by one: bit-equal to _embed_time
        self._memory = Memory(self._readers(), known)
        try:
            yield
        finally:
            self._memory = None

    def _embed_time(self, timestep: Tensor | float, sample: Tensor) -> Tensor:
        memory = self._memory  # of this run, or of one in another thread
        if memory is not None and not torch.compiler.is_compiling() and id(timestep) in memory.times:
            return memory.times[id(timestep)][1]
        timesteps = torch.as_tensor(timestep, device=sample.device)
        one = timesteps.numel() == 1
        return self.embed_time(timesteps.reshape(1) if one else timesteps.expand(sample.shape[0]), sample.dtype)

    def _read_context(self, context: Tensor) -> list[KeysValues]:
        memory = self._memory
        if memory is None or torch.compiler.is_compiling():
            return self.read_context(context)
        weights = [weight for block in memory.readers for weight in block.cross_attn.parameters()]
        source = (
            context,
            version_of(context),
            self.mark,
            [(weight.data_ptr(), version_of(weight)) for weight in weights],
        )
        for known, reading in memory.contexts:
            if known[0] is context and known[1:] == source[1:]:
                rest = [one for one in memory.contexts if one[0] is not known]
                memory.contexts = [*rest, (known, reading)]
                return reading
        reading = self.read_context(context)
        memory.contexts = [*(one for one in memory.contexts if one[0][0] is not context), (source, reading)][-READINGS:]
        return reading
