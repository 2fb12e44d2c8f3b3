"""Where a processor may take a way of its own, which nothing but plain computing of bare layers allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module


def has_tiles() -> bool:
    """Tell whether the processor multiplies bfloat16 in tiles (AMX); yes where torch cannot tell."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)())


def uses_onednn() -> bool:
    """Tell whether convolutions on a processor are oneDNN's."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def fuses_bfloat16() -> bool:
    """Tell whether oneDNN is in use, with operators that fuse a linear layer in bfloat16 on this processor."""
    if not uses_onednn():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def products_are_exact() -> bool:
    """Tell whether products of float32 are as exact as convolutions; torch's precision "medium" lets them be less."""
    return torch.get_float32_matmul_precision() != "medium"


def is_bare(layer: nn.Module) -> bool:
    """Tell whether a layer's call is its class's `forward` and no more: no hook, no other `forward` in its place."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks
    everywhere = module._global_forward_hooks, module._global_forward_pre_hooks
    return "forward" not in vars(layer) and not any((*hooks, *everywhere))


def version_of(x: Tensor) -> int:
    """Count how often a tensor was written to; 0 for one made in inference mode, where torch does not count."""
    return 0 if x.is_inference() else x._version


def only_computes(*tensors: Tensor) -> bool:
    """Tell whether tensors lie on a processor and are only computed with.

    Not so where a gradient is recorded, the work is traced or compiled, dtypes are chosen by autocast, tensors are
    transformed by `torch.func`, or of a kind of their own, such as quantised ones and those without data.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    for x in tensors:
        if type(x) not in (Tensor, nn.Parameter):
            return False
        if x.device.type != "cpu" or x.layout != torch.strided or (torch.is_grad_enabled() and x.requires_grad):
            return False
        if forward_ad.unpack_dual(x).tangent is not None:
            return False
    return True


def is_linear(x: Tensor, layer: nn.Module) -> bool:
    """Tell whether a layer does no more than F.linear to x, on a processor, where nothing is trained.

    Args:
        x: what the layer reads.
        layer: one of another kind, without a bias, of another dtype, hooked, or with a `forward` put in its place is
            called as it is.
    """
    if type(layer) is not nn.Linear or layer.bias is None or not is_bare(layer):
        return False
    return x.dtype == layer.weight.dtype == layer.bias.dtype and only_computes(x, layer.weight, layer.bias)


def fuses_linear(x: Tensor, layer: nn.Module) -> bool:
    """Tell whether oneDNN's fused operators can stand for a layer: in bfloat16, for what `is_linear` allows."""
    return x.dtype == torch.bfloat16 and fuses_bfloat16() and is_linear(x, layer)
