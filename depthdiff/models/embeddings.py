"""The timestep as the UNet reads it: sinusoids, then two linear layers; and the activations by their config names.

Letters: B batch, T channels of the time embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.checks import brief, refuse_values


class QuickGELUActivation(nn.Module):
    """x sigmoid(1.702 x), OpenAI's approximation of GELU. Source: openai/CLIP, clip/model.py."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every element."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "quick_gelu": QuickGELUActivation,
    "relu": nn.ReLU,
    "mish": nn.Mish,
}
"""Activations by the names that published configs use."""


def get_activation(name: str) -> nn.Module:
    """Make an activation.

    Raises:
        ValueError: an unknown name.
    """
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {brief(name)}")
    return ACTIVATIONS[name.lower()]()


def get_timestep_embedding(
    timesteps: Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
) -> Tensor:
    """Encode timesteps as sines and cosines of falling frequency.

    Args:
        timesteps: (B,), int or float, 0..999.
        embedding_dim: of the result.
        flip_sin_to_cos: put the cosines first, as Stable Diffusion does.
        downscale_freq_shift: 0 ends at frequency just above 1/10000, 1 exactly there.
        scale: of the angles.

    Returns:
        (B, embedding_dim), float32, in [-1, 1]; an odd dimension ends in a column of zeros.

    Source: arXiv:1706.03762, sec. 3.5, in the form of hojonathanho/diffusion, nn.py, `get_timestep_embedding`.
    """
    half = embedding_dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - downscale_freq_shift)
    angles = scale * timesteps[:, None].float() * torch.exp(-math.log(10_000) * exponents)  # (B, dim / 2)
    sin, cos = angles.sin(), angles.cos()
    return F.pad(torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=1), (0, embedding_dim % 2))


class Timesteps(nn.Module):
    """`get_timestep_embedding` as a layer without weights."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float, scale: float = 1) -> None:
        super().__init__()
        self.num_channels, self.scale = num_channels, scale
        self.flip_sin_to_cos, self.downscale_freq_shift = flip_sin_to_cos, downscale_freq_shift

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) -> (B, num_channels), float32."""
        return get_timestep_embedding(
            timesteps, self.num_channels, self.flip_sin_to_cos, self.downscale_freq_shift, self.scale
        )


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn the sinusoids into what the residual blocks read."""

    def __init__(
        self,
        in_channels: int,
        time_embed_dim: int,
        act_fn: str = "silu",
        out_dim: int | None = None,
        post_act_fn: str | None = None,
        cond_proj_dim: int | None = None,
        sample_proj_bias: bool = True,
    ) -> None:
        super().__init__()
        refuse_values("TimestepEmbedding", post_act_fn=(post_act_fn, None), cond_proj_dim=(cond_proj_dim, None))
        self.linear_1 = nn.Linear(in_channels, time_embed_dim, bias=sample_proj_bias)
        self.cond_proj = None
        self.act = get_activation(act_fn)
        self.linear_2 = nn.Linear(time_embed_dim, out_dim or time_embed_dim, bias=sample_proj_bias)
        self.post_act = None

    def forward(self, sample: Tensor, condition: None = None) -> Tensor:
        """(B, in_channels) -> (B, T), before the activation that every residual block applies to it.

        Raises:
            ValueError: a condition, which no layer here reads.
        """
        if condition is not None:
            raise ValueError("condition must be None: this network has no layer for it")
        return self.linear_2(self.act(self.linear_1(sample)))
