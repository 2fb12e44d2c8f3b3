"""How much of an adapter counts, in which component and block of the UNet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import nn

from depthdiff.adapters.names import COMPONENTS
from depthdiff.checks import check_names as check_texts
from depthdiff.checks import plain, show

Weight = float | Mapping[str, Any]
"""How much of an adapter: a number, or {"unet": U, "text_encoder": number}, where U is a number or {"down": B, "mid":
number, "up": B}, and B a number, a list with one for each transformer of a block, or {"block_1": number or list}."""

LARGEST = 1e6
"""Of a weight; float32 ends soon after."""

PLACE = re.compile(r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?:(?:attentions|resnets)\.(?P<index>\d+)\.)?")


def check_components(components: str | Sequence[str]) -> list[str]:
    """List components, and refuse none, or one that has no adapters."""
    names = check_texts("components", components)
    for name in names or ["none"]:
        if name not in COMPONENTS:
            raise ValueError(f"components must be among {', '.join(COMPONENTS)}, got {name!r}")
    return names


def check_weight(weight: Any, unet: nn.Module) -> None:
    """Refuse what is no weight: see `Weight`."""
    if isinstance(weight, Mapping):
        check_names(weight, (*COMPONENTS, "down", "mid", "up"))
        check_number(weight.get("text_encoder", 1.0))
        inner = weight.get("unet", weight)
        if isinstance(inner, Mapping):
            check_blocks(inner, unet, () if inner is not weight else COMPONENTS)
        else:
            check_number(inner)
    else:
        check_number(weight)


def check_blocks(weight: Mapping[str, Any], unet: nn.Module, others: Sequence[str]) -> None:
    """Refuse weights for blocks that the UNet does not have, and lists of another length than their transformers."""
    check_names(weight, ("down", "mid", "up", *others))
    check_number(weight.get("mid", 1.0))
    sizes: dict[str, dict[str, int]] = {"down": {}, "up": {}}
    for name, _ in unet.named_modules():
        place = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", name)
        if place is not None:
            side, block, kind, index = place.groups()
            if kind == "attentions" or f"block_{block}" not in sizes[side]:
                sizes[side][f"block_{block}"] = int(index) + 1 if kind == "attentions" else 1
    for side, blocks in sizes.items():
        named = weight.get(side, 1.0)
        check_names(named if isinstance(named, Mapping) else {}, list(blocks))
        lists = named.items() if isinstance(named, Mapping) else ((name, named) for name in blocks)
        for name, value in lists:
            for number in value if isinstance(value, (list, tuple)) else [value]:
                check_number(number)
            if isinstance(value, (list, tuple)) and len(value) not in (1, blocks[name]) and blocks[name] > 1:
                raise ValueError(f"adapter_weights: {side} {name} has {blocks[name]} transformers, got {len(value)}")


def check_names(weight: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a name that no weight has."""
    for name in weight:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"adapter_weights may name {', '.join(known)}, got {show(name)}")


def check_number(number: Any) -> None:
    """Refuse what is no finite number; None stands for 1."""
    one = plain(number)
    if isinstance(one, int):  # which a float may not hold
        one = max(-2 * LARGEST, min(one, 2 * LARGEST)) if not isinstance(one, bool) else one
    if one is not None and (
        isinstance(one, bool) or not isinstance(one, Real) or not -LARGEST <= float(one) <= LARGEST
    ):
        raise ValueError(f"adapter_weights must be finite numbers or dicts of them, got {show(number)}")


def component_weight(weight: Weight, component: str) -> Weight:
    """Return the part of a weight that is meant for a component; what is not named counts fully."""
    if isinstance(weight, Mapping):
        inner = weight.get(component, weight if component == "unet" and "unet" not in weight else 1.0)
        return 1.0 if inner is None else inner
    return weight


def scaled(weight: Any, scale: float) -> Any:
    """Multiply a weight, whole or by block; the blocks that a dict leaves out count 1."""
    if isinstance(weight, Mapping):
        return {"rest": scale} | {name: scaled(part, scale) for name, part in weight.items()}
    if isinstance(weight, (list, tuple)):
        return [scaled(part, scale) for part in weight]
    return (1.0 if weight is None else float(weight)) * scale


def block_weight(weight: Any, key: str) -> float:
    """Return the weight, once `scaled`, for one key of the UNet or the text encoder."""
    place = PLACE.match(key)
    side, block, index = place.groups() if place is not None else (key.split("_block")[0], None, None)
    for name in (side, f"block_{block}"):
        if isinstance(weight, Mapping):
            weight = weight.get(name, weight["rest"])
    if isinstance(weight, list):
        weight = weight[int(index or 0) if len(weight) > 1 else 0]
    return weight
