"""Gaussian noise that a seed reproduces: the one place where random numbers are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from depthdiff.checks import check_generators


def randn(
    shape: Sequence[int],
    generator: Generator | Sequence[Generator] | None = None,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """Draw unit-normal noise, on the generator's own device, so that a CPU generator gives the same picture everywhere.

    Args:
        shape: of the noise; the first number is the batch B.
        generator: one for the whole batch, or a sequence of B, one a sample.
        device: of the result.
        dtype: of the draw and of the result; the numbers drawn depend on it.

    Returns:
        `shape`, dtype, mean 0 and variance 1.

    Raises:
        TypeError: no generator.
        ValueError: a sequence of another length than B, or a generator of another device type that is not the CPU.

    Source: huggingface/diffusers, utils/torch_utils.py, `randn_tensor`; the order of draws is theirs.
    """
    check_generators("generator", generator)
    if isinstance(generator, Sequence):
        if len(generator) == 1:  # one generator draws for the whole batch, in a list or not
            return randn(shape, generator[0], device=device, dtype=dtype)
        if len(generator) != shape[0]:
            raise ValueError(f"generator must be one or a list of {shape[0]}, one a sample, got {len(generator)}")
        draws = [randn((1, *shape[1:]), one, device=device, dtype=dtype) for one in generator]
        return torch.cat(draws)
    device = torch.device(device)
    if generator is None:
        return torch.randn(*shape, device=device, dtype=dtype)
    if generator.device.type not in ("cpu", device.type):
        raise ValueError(f"generator must be on cpu or {device.type}, got {generator.device.type}")
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype).to(device)
