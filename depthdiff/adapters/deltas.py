"""What an adapter adds to one weight, from the small tensors of its file: a formula for each method.

Letters: O and I channels of a weight out and in, K its kernel (none for a linear layer), r rank. All formulas are
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
    return torch.einsum("ab...,ao,bi->oi...", core, out, into)


def loha(parts: Parts) -> Tensor:
    """Multiply two low-rank matrices entry by entry. Source: arXiv:2108.06098, eq. 2 and 3.

    Args:
        parts: `hada_w1_a` (O, r), `hada_w1_b` (r, I K) and the same of `w2`; or with cores `hada_t1`, `hada_t2`
            (r, r, *K), for which a is (r, O) and b is (r, I).
    """

    def factor(n: int) -> Tensor:
        core, a, b = parts.get(f"hada_t{n}"), parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]
        return a @ b if core is None else tucker(core, a, b)

    return factor(1) * factor(2)


def lokr(parts: Parts) -> Tensor:
    """Take the Kronecker product of two matrices, either of which may be low-rank. Source: arXiv:2309.14859, sec. 3.

    Args:
        parts: `lokr_w1` or `lokr_w1_a`, `lokr_w1_b`; `lokr_w2` or `lokr_w2_a`, `lokr_w2_b`, maybe with a core
            `lokr_t2`.
    """

    def factor(n: int) -> Tensor:
        whole, core = parts.get(f"lokr_w{n}"), parts.get(f"lokr_t{n}")
        if whole is not None:
            return whole
        a, b = parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"]
        return a @ b if core is None else tucker(core, a, b)

    small, large = factor(1), factor(2)
    return torch.kron(small.reshape(*small.shape, *[1] * (large.ndim - 2)), large.contiguous())


METHODS = {
    "LoRA": (lora, {"up", "down"}, {"mid"}),
    "LoHa": (loha, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}),
    "LoKr": (lokr, set(), {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
    "full": (lambda parts: parts["diff"], {"diff"}, set()),
}
"""Name -> formula, the parts it needs, and those it may have. LoKr's needs are checked by `complete`."""


@dataclass(frozen=True, eq=False)
class Delta:
    """What an adapter adds to one weight.

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

        A change that lacks the last channel in leaves it alone: that of a UNet without depth.
        Call `fits` first.
        """
        weight = widened(weight)
        delta = self.raw(weight) * self.scale
        image_only = delta.numel() < weight.numel()
        known = weight[:, :-1] if image_only else weight
        delta = delta.reshape(known.shape)
        if self.magnitude is not None:
            delta = decompose(known, delta, self.magnitude.to(weight.device, weight.dtype)) - known
        return F.pad(delta, (0, 0, 0, 0, 0, 1)) if image_only else delta

    def raw(self, like: Tensor) -> Tensor:
        """Compute the formula alone, on the device and in the dtype of `like`."""
        return METHODS[self.method][0]({name: part.to(like.device, like.dtype) for name, part in self.parts.items()})


def widened(weight: Tensor) -> Tensor:
    """Return a weight in float32, or as it is where it has more digits."""
    return weight if weight.dtype == torch.float64 else weight.float()


def decompose(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Give the changed weight the trained length in each direction. Source: DoRA, arXiv:2402.09353, eq. 5.

    Args:
        weight: (O, I, *K).
        delta: of the same shape.
        magnitude: (O,) or (O, 1, ...) for the length over each channel out, as PEFT trains it; (1, I, ...) for the
            length over each channel in, as LyCORIS does.
    """
    changed = weight + delta
    kept = kept_axis(magnitude, weight.shape)
    shape = (1, -1) if kept else (-1, 1)
    over = [axis for axis in range(weight.ndim) if axis != kept]
    length = torch.linalg.vector_norm(changed, dim=over, keepdim=True)
    length = length.clamp(min=torch.finfo(length.dtype).tiny)  # a direction without length stays so
    return changed / length * magnitude.reshape(*shape, *[1] * (weight.ndim - 2))


def kept_axis(magnitude: Tensor, weight: tuple[int, ...]) -> int:
    """Return which axis of a weight (O, I, *K) has a length for each channel: 0 for out, 1 for in."""
    return int(magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight[1])


def fits(delta: Delta, weight: tuple[int, ...]) -> bool | None:
    """Infer from the shapes alone whether a change can be added to a weight (O, I, *K).

    Returns:
        True where it covers the weight, None where it leaves out the last channel in, False where it does not fit.
    """
    try:
        shape = whole_shape(delta.method, {name: tuple(part.shape) for name, part in delta.parts.items()})
    except (IndexError, ValueError):
        return False
    count, wanted = math.prod(shape), math.prod(weight)
    image_only = len(weight) == 4 and count == wanted // weight[1] * (weight[1] - 1)
    if not count or not shape or shape[0] != weight[0] or not (count == wanted or image_only):
        return False
    if delta.magnitude is not None:
        known = (weight[0], weight[1] - image_only) if len(weight) > 1 else ()
        if not known or delta.magnitude.numel() != known[kept_axis(delta.magnitude, known)]:
            return False
    return None if image_only else True


def whole_shape(method: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of what a formula gives.

    Raises:
        ValueError: the parts do not fit each other.
        IndexError: one has too few axes.
    """

    def product(a: str, b: str, core: str | None = None) -> tuple[int, ...]:
        left, right = shapes[a], shapes[b]
        if core is None:
            if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
                raise ValueError(a)
            return left[0], right[1]
        if len(left) != 2 or len(right) != 2 or shapes[core][:2] != (left[0], right[0]):
            raise ValueError(core)
        return left[1], right[1], *shapes[core][2:]

    if method == "LoRA":
        up, down = shapes["up"], shapes["down"]
        r, mid = math.prod(up[1:]), shapes.get("mid")
        if len(down) < 2 or (r, down[0]) != ((down[0], r) if mid is None else mid[:2]):
            raise ValueError("down")
        if mid is not None and math.prod(down[2:]) != 1:
            raise ValueError("mid")
        return up[0], *(down[1:] if mid is None else (down[1], *mid[2:]))
    if method == "LoHa":
        first, second = (
            product(f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}" if f"hada_t{n}" in shapes else None) for n in (1, 2)
        )
        if first != second:
            raise ValueError("hada_w2_a")
        return first
    if method == "LoKr":
        core = "lokr_t2" if "lokr_t2" in shapes else None
        small = shapes["lokr_w1"] if "lokr_w1" in shapes else product("lokr_w1_a", "lokr_w1_b")
        large = shapes["lokr_w2"] if "lokr_w2" in shapes else product("lokr_w2_a", "lokr_w2_b", core)
        if len(small) != 2 or len(large) < 2:
            raise ValueError("lokr_w1")
        return small[0] * large[0], small[1] * large[1], *large[2:]
    return shapes["diff"]


def rank(method: str, parts: Parts) -> int | None:
    """Return r, by which alpha is divided; None where nothing is of low rank."""
    names = {"LoRA": ("down",), "LoHa": ("hada_w1_b",)}.get(method, ("lokr_w1_b", "lokr_w2_b"))
    low = [parts[name].shape[0] if parts[name].ndim else 0 for name in names if name in parts]
    return low[-1] if low else None


def complete(method: str, parts: Parts) -> bool:
    """Return whether the parts are all that a method needs, and no others."""
    _, needed, optional = METHODS[method]
    names = parts.keys()
    if not (needed <= names <= needed | optional):
        return False
    if method == "LoHa":
        return ("hada_t1" in names) == ("hada_t2" in names)
    if method == "LoKr":
        for n in "12":
            whole, pair = f"lokr_w{n}" in names, {f"lokr_w{n}_a", f"lokr_w{n}_b"} & names
            if (whole and pair) or (not whole and len(pair) < 2):
                return False
        return not ("lokr_t2" in names and "lokr_w2" in names)
    return True


def make_delta(
    parts: dict[str, Tensor], alpha: float | None, divisor: float | None = None, rank_stabilized: bool = False
) -> Delta | None:
    """Recognise the method of one layer's tensors.

    Args:
        parts: of the layer, `dora_scale` included.
        alpha: the scale times the rank; the rank if absent.
        divisor: the rank, where the settings that come with the tensors name it.
        rank_stabilized: divide alpha by the root of the rank (arXiv:2312.03732).

    Returns:
        The change, or None where the tensors are no method's or not all of it.
    """
    magnitude = parts.get("dora_scale")
    rest = {name: part for name, part in parts.items() if name != "dora_scale"}
    for method in METHODS:
        if rest and complete(method, rest):
            r = None if method == "full" else divisor or rank(method, rest)
            if r == 0:
                return None
            scale = 1.0 if r is None or alpha is None else alpha / (math.sqrt(r) if rank_stabilized else r)
            return Delta(method, rest, scale, magnitude)
    return None
