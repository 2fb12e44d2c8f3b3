"""Convolutions: the residual block, and the changes of resolution.

Letters: B batch, C channels, H and W height and width of a feature map, T channels of the time embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.checks import refuse_values
from depthdiff.models.embeddings import get_activation


class ResnetBlock2D(nn.Module):
    """Two convolutions with a residual connection, shifted by the time embedding where there is one.

    Args:
        in_channels: C.
        out_channels: C'; C if None.
        conv_shortcut: project the residual even where the channels stay the same.
        dropout: share that is dropped in training.
        temb_channels: T; None for a block without time.
        groups: of the first norm.
        groups_out: of the second; as many if None.
        pre_norm: must be True.
        eps: of the norms.
        non_linearity: name of the activation.
        skip_time_act: must be False.
        time_embedding_norm: "default", or "group" in a decoder's block, which has no time.
        kernel: must be None.
        output_scale_factor: divides the result.
        use_in_shortcut: project the residual; where the channels change, if None.
        up: must be False.
        down: must be False.
        conv_shortcut_bias: whether that projection has a bias.
        conv_2d_out_channels: must be None or C'.

    Raises:
        ValueError: an argument that is not implemented.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int | None = 512,
        groups: int = 32,
        groups_out: int | None = None,
        pre_norm: bool = True,
        eps: float = 1e-6,
        non_linearity: str = "swish",
        skip_time_act: bool = False,
        time_embedding_norm: str = "default",
        kernel: None = None,
        output_scale_factor: float = 1.0,
        use_in_shortcut: bool | None = None,
        up: bool = False,
        down: bool = False,
        conv_shortcut_bias: bool = True,
        conv_2d_out_channels: int | None = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        kind = "ResnetBlock2D"
        refuse_values(kind, pre_norm=(pre_norm, True), skip_time_act=(skip_time_act, False), kernel=(kernel, None))
        refuse_values(kind, up=(up, False), down=(down, False))
        refuse_values(kind, time_embedding_norm=(time_embedding_norm, "default", "group"))
        refuse_values(kind, conv_2d_out_channels=(conv_2d_out_channels, None, out_channels))
        self.in_channels, self.out_channels, self.pre_norm = in_channels, out_channels, True
        self.use_conv_shortcut, self.time_embedding_norm = conv_shortcut, time_embedding_norm
        self.output_scale_factor, self.skip_time_act, self.up, self.down = output_scale_factor, False, False, False
        self.upsample = self.downsample = None

        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if temb_channels is None else nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups if groups_out is None else groups_out, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = get_activation(non_linearity)
        self.use_in_shortcut = in_channels != out_channels if use_in_shortcut is None else use_in_shortcut
        self.conv_shortcut = None
        if self.use_in_shortcut:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=conv_shortcut_bias)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the block.

        Args:
            input_tensor: (B, C, H, W).
            temb: (B, T), the time embedding before its activation; None for a block without time.
            *args: not used; for callers that pass a `scale`.
            **kwargs: not used.

        Returns:
            (B, C', H, W).
        """
        h = self.norm1(input_tensor)
        h = self.nonlinearity(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        h = self.norm2(h)
        h = self.nonlinearity(h)
        h = self.dropout(h)
        h = self.conv2(h)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + h) / self.output_scale_factor


class Downsample2D(nn.Module):
    """Halve height and width, by a convolution or by averaging.

    With `padding` 0, one row and one column of zeros are added below and to the right only: so the autoencoder was
    trained.

    Args:
        channels: C.
        use_conv: by a convolution with stride 2, else by averaging.
        out_channels: C'; C if None.
        padding: of the convolution.
        name: not used; in published checkpoints the layer is called `conv` either way.
        kernel_size: of the convolution.
        norm_type: must be None.
        eps: not used.
        elementwise_affine: not used.
        bias: of the convolution.
    """

    def __init__(
        self,
        channels: int,
        use_conv: bool = False,
        out_channels: int | None = None,
        padding: int = 1,
        name: str = "conv",
        kernel_size: int = 3,
        norm_type: str | None = None,
        eps: float | None = None,
        elementwise_affine: bool | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        refuse_values("Downsample2D", norm_type=(norm_type, None))
        self.channels, self.out_channels = channels, channels if out_channels is None else out_channels
        self.use_conv, self.padding, self.name, self.norm = use_conv, padding, name, None
        self.conv: nn.Module = nn.AvgPool2d(2, stride=2)
        if use_conv:
            self.conv = nn.Conv2d(channels, self.out_channels, kernel_size, stride=2, padding=padding, bias=bias)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2)), the floor for `padding` 0 and for averages."""
        if self.use_conv and self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample2D(nn.Module):
    """Double height and width, or bring them to a given size, by repeating pixels; then maybe a convolution.

    Args:
        channels: C.
        use_conv: convolve the result.
        use_conv_transpose: must be False.
        out_channels: C'; C if None.
        name: not used.
        kernel_size: of the convolution; 3 if None.
        padding: of the convolution.
        norm_type: must be None.
        eps: not used.
        elementwise_affine: not used.
        bias: of the convolution.
        interpolate: repeat pixels.
    """

    def __init__(
        self,
        channels: int,
        use_conv: bool = False,
        use_conv_transpose: bool = False,
        out_channels: int | None = None,
        name: str = "conv",
        kernel_size: int | None = None,
        padding: int = 1,
        norm_type: str | None = None,
        eps: float | None = None,
        elementwise_affine: bool | None = None,
        bias: bool = True,
        interpolate: bool = True,
    ) -> None:
        super().__init__()
        refuse_values("Upsample2D", norm_type=(norm_type, None), use_conv_transpose=(use_conv_transpose, False))
        self.channels, self.out_channels = channels, channels if out_channels is None else out_channels
        self.use_conv, self.use_conv_transpose, self.interpolate = use_conv, False, interpolate
        self.name, self.norm, self.conv = name, None, None
        if use_conv:
            self.conv = nn.Conv2d(channels, self.out_channels, kernel_size or 3, padding=padding, bias=bias)

    def forward(
        self, hidden_states: Tensor, output_size: torch.Size | tuple[int, int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """(B, C, H, W) -> (B, C', *output_size), twice the input's size if that is None."""
        if self.interpolate and output_size is None:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        elif self.interpolate:
            hidden_states = F.interpolate(hidden_states, size=output_size, mode="nearest")
        return hidden_states if self.conv is None else self.conv(hidden_states)
