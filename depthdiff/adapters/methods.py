"""The change of one weight by an adapter, from the small tensors of its file: one formula for each method.

Letters: O and I output and input channels of a weight, K its kernel (none for a linear layer), r rank. All formulas are
written for the flattened kernel, (O, I, *K) as (O, I K).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Parts = Mapping[str, Tensor]


def lora(parts: Parts) -> Tensor:
    """Multiply up and down; a Tucker core between them has the kernel. Source: arXiv:2106.09685, eq. 3; LyCORIS.

    Args:
        parts: `up` (O, r, ...), `down` (r, I, *K), and maybe `mid` (r, r, *K), with which `down` is (r, I, ...).
    """
    up, down, mid = parts["up"].flatten(1), parts["down"], parts.get("mid")
    if mid is None:
        return (up @ down.flatten(1)).unflatten(1, down.shape[1:])
    return tucker(mid, up.T, down.flatten(1))


def tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """Contract a core (r, r, *K) with (r, O) and (r, I). Source: arXiv:2108.06098, sec. 2.2."""
    if not out.ndim == into.ndim == 2 or core.shape[:2] != (len(out), len(into)):
        shapes = ", ".join(str(tuple(part.shape)) for part in (core, out, into))
        raise ValueError(f"a core and its factors must be (r, r, *K), (r, O) and (r, I), got {shapes}")
    return torch.einsum("ab...,ao,bi->oi...", core, out, into)


def loha(parts: Parts) -> Tensor:
    """Multiply two low-rank matrices entry by entry. Source: arXiv:2108.06098, eq. 2 and 3.

    Args:
        parts: `hada_w1_a` (O, r), `hada_w1_b` (r, I K) and the same of `w2`; or with cores `hada_t1`, `hada_t2`
            (r, r, *K), for which a is (r, O) and b is (r, I).
    """
    first, second = factor(parts, "hada_w1", "hada_t1"), factor(parts, "hada_w2", "hada_t2")
    if first.shape != second.shape:
        raise ValueError(f"factors {tuple(first.shape)} and {tuple(second.shape)} must have one shape")
    return first * second


def lokr(parts: Parts) -> Tensor:
    """Take the Kronecker product of two matrices, either of which may be low-rank. Source: arXiv:2309.14859, sec. 3.

    Args:
        parts: `lokr_w1` or `lokr_w1_a`, `lokr_w1_b`; `lokr_w2` or `lokr_w2_a`, `lokr_w2_b`, maybe with a core
            `lokr_t2`.
    """
    small, large = factor(parts, "lokr_w1"), factor(parts, "lokr_w2", "lokr_t2")
    if small.ndim != 2 or large.ndim < 2:
        raise ValueError(f"factors {tuple(small.shape)} and {tuple(large.shape)} must be matrices, and kernels of them")
    return torch.kron(small.reshape(*small.shape, *[1] * (large.ndim - 2)), large.contiguous())


def factor(parts: Parts, name: str, core: str = "") -> Tensor:
    """Return a matrix that is given as it is, or as the product of `a` (O, r) and `b` (r, I), or with a core."""
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        return tucker(parts[core], a, b)
    if not a.ndim == b.ndim == 2:
        raise ValueError(f"factors of {name} must be matrices, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a @ b


METHODS = {
    "LoRA": (lora, ["up down", "up down mid"]),
    "LoHa": (loha, [f"hada_w1_a hada_w1_b hada_w2_a hada_w2_b {cores}" for cores in ("", "hada_t1 hada_t2")]),
    "LoKr": (lokr, [f"{first} {second}" for first in ("lokr_w1", "lokr_w1_a lokr_w1_b")
                    for second in ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2")]),
    "full": (lambda parts: parts["diff"], ["diff"]),
}  # fmt: skip
"""Name -> formula, and the sets of parts that it takes."""
FORMS = {method: [set(form.split()) for form in forms] for method, (_, forms) in METHODS.items()}


@dataclass(frozen=True, eq=False)
class Delta:
    """The change of one weight by an adapter.

    Attributes:
        method: one of METHODS.
        parts: the tensors of the formula.
        scale: alpha / rank.
        magnitude: DoRA's, one number for each channel out, (O,), (O, 1, ...), or in, (1, I, ...).
    """

    method: str
    parts: Parts
    scale: float
    magnitude: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """Compute the change of a weight (O, I, *K), which DoRA needs to know; in its dtype, at least float32.

        A change without the last input channel leaves that as it is: the adapter of a UNet without depth.
        Call `fits` first.
        """
        weight = upcast(weight)
        delta = self.formula(weight) * self.scale
        image_only = delta.numel() < weight.numel()
        known = weight[:, :-1] if image_only else weight
        delta = delta.reshape(known.shape)
        if self.magnitude is not None:
            delta = decompose(known, delta, self.magnitude.to(weight.device, weight.dtype)) - known
        return F.pad(delta, (0, 0, 0, 0, 0, 1)) if image_only else delta

    def formula(self, like: Tensor) -> Tensor:
        """Compute the formula alone, on the device and in the dtype of `like`."""
        return METHODS[self.method][0]({name: part.to(like.device, like.dtype) for name, part in self.parts.items()})


def upcast(weight: Tensor) -> Tensor:
    """Return a weight in float32, or in float64 if it has that."""
    return weight if weight.dtype == torch.float64 else weight.float()


def decompose(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Rescale the changed weight to the trained length in each direction. Source: DoRA, arXiv:2402.09353, eq. 5.

    Args:
        weight: (O, I, *K).
        delta: of the same shape.
        magnitude: (O,) or (O, 1, ...) for the length over each channel out, as PEFT trains it; (1, I, ...) for the
            length over each channel in, as LyCORIS does.
    """
    changed, axis = weight + delta, magnitude_axis(magnitude, weight.shape)
    others = [other for other in range(weight.ndim) if other != axis]
    length = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    length = length.clamp(min=torch.finfo(length.dtype).tiny)  # a direction without length keeps none
    return changed / length * magnitude.reshape(length.shape)


def magnitude_axis(magnitude: Tensor, weight: tuple[int, ...]) -> int:
    """Return which axis of a weight (O, I, *K) has a length for each channel: 0 for out, 1 for in."""
    return int(magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight[1])


def fits(delta: Delta, weight: tuple[int, ...]) -> bool | None:
    """Return whether a change fits a weight (O, I, *K); None if it fits all but the last input channel."""
    try:
        shape = delta.formula(torch.empty(weight, device="meta")).shape
    except (RuntimeError, IndexError, ValueError):
        return False
    count, wanted = math.prod(shape), math.prod(weight)
    image_only = len(weight) == 4 and count == wanted // weight[1] * (weight[1] - 1)
    if not count or not shape or shape[0] != weight[0] or not (count == wanted or image_only):
        return False
    if delta.magnitude is not None:
        known = (weight[0], weight[1] - image_only) if len(weight) > 1 else ()
        if not known or delta.magnitude.numel() != known[magnitude_axis(delta.magnitude, known)]:
            return False
    return None if image_only else True


def rank(parts: Parts) -> int | None:
    """Return r, by which alpha is divided; None where no part is of low rank."""
    low = [parts[name] for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in parts]
    return (low[0].shape[0] if low[0].ndim else 0) if low else None


def make_delta(
    parts: Parts, alpha: float | None, divisor: float | None = None, rank_stabilized: bool = False
) -> Delta | None:
    """Recognise the method of one layer's tensors; None if they belong to no method, or some are missing.

    The scale is alpha / r, or alpha / sqrt(r) if `rank_stabilized` (arXiv:2312.03732); r is `divisor` if that is given.
    """
    rest = {name: part for name, part in parts.items() if name != "dora_scale"}
    method = next((method for method, forms in FORMS.items() if rest.keys() in forms), None)
    r = None if method == "full" else divisor or rank(rest)
    if method is None or r == 0:
        return None
    scale = 1.0 if r is None or alpha is None else alpha / (math.sqrt(r) if rank_stabilized else r)
    return Delta(method, rest, scale, parts.get("dora_scale"))
