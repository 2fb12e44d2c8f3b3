"""Where a processor may take a way that writes into buffers of its own, which nothing but plain computing allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def has_tiles() -> bool:
    """Tell whether the processor multiplies bfloat16 in tiles (AMX); yes where torch cannot tell."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)())


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
