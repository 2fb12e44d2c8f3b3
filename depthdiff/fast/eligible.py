"""Preconditions of the fast computations on a CPU: inference only, no hooks, no tracing, layers as torch made them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from depthdiff.fast.calls import FORWARDS, is_bare
from depthdiff.models.attention import Attention
from depthdiff.models.embeddings import TimestepEmbedding, Timesteps
from depthdiff.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from depthdiff.models.transformer import GEGLU, BasicTransformerBlock, FeedForward, Transformer2DModel
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.models.unet_blocks import CrossAttnDownBlock2D
from depthdiff.models.vae import Decoder, Encoder

LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.GELU, nn.ReLU, nn.Mish, nn.Dropout),
    *(Attention, BasicTransformerBlock, CrossAttnDownBlock2D, Decoder, Downsample2D, Encoder, FeedForward, GEGLU),
    *(ResnetBlock2D, TimestepEmbedding, Timesteps, Transformer2DModel, UNet2DConditionModel, Upsample2D),
)
"""Layers that take part in fast computations."""
FORWARDS.update({kind: kind.forward for kind in LAYERS})


def has_tiles() -> bool:
    """Return whether the processor multiplies bfloat16 in tiles (AMX); yes where torch cannot tell."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)())


def uses_onednn() -> bool:
    """Return whether convolutions on a processor are oneDNN's."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def fuses_bfloat16() -> bool:
    """Return whether oneDNN is in use, with operators that fuse a linear layer in bfloat16 on this processor."""
    if not uses_onednn():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def products_are_exact() -> bool:
    """Return whether products of float32 are as exact as convolutions; torch's precision "medium" lets them be less."""
    return torch.get_float32_matmul_precision() != "medium"


def is_plain(layer: object, *kinds: type[nn.Module]) -> bool:
    """Return whether a layer is of exactly one of these classes, and `is_bare`."""
    return type(layer) in kinds and is_bare(layer)  # type: ignore[arg-type]


def only_computes(*tensors: object) -> bool:
    """Return whether these are tensors on a CPU that are only computed with.

    Not so where a gradient is recorded, the work is traced, compiled or watched (`TorchDispatchMode`), autocast chooses
    dtypes, `torch.func` transforms the tensors, or they are of a class of their own, quantised, or without data.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():  # type: ignore[attr-defined]
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    records = torch.is_grad_enabled()
    for x in tensors:
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return False
        if x.device.type != "cpu" or x.layout != torch.strided or (records and x.requires_grad):
            return False
        if forward_ad.unpack_dual(x).tangent is not None:
            return False
    return True


def is_linear(x: Tensor, layer: nn.Module) -> bool:
    """Return whether a layer does no more than F.linear to x, with a bias, in inference on a CPU."""
    if type(layer) is not nn.Linear or layer.bias is None or not is_bare(layer):
        return False
    return x.dtype == layer.weight.dtype == layer.bias.dtype and only_computes(x, layer.weight, layer.bias)


def fuses_linear(x: Tensor, layer: nn.Module) -> bool:
    """Return whether oneDNN's fused operators can stand for a layer: in bfloat16, for what `is_linear` allows."""
    return x.dtype == torch.bfloat16 and fuses_bfloat16() and is_linear(x, layer)
