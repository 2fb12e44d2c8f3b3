"""How much of an adapter counts, in which component and block of the UNet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from depthdiff.adapters.names import COMPONENTS

Weight = float | Mapping[str, Any]
"""How much of an adapter: a number, or {"unet": number or {"down", "mid", "up": number}, "text_encoder": number}."""


def check_components(components: Sequence[str]) -> None:
    """Refuse a component that has no adapters."""
    for name in components:
        if name not in COMPONENTS:
            raise ValueError(f"components must be among {', '.join(COMPONENTS)}, got {name!r}")


def check_weight(weight: Any, known: Sequence[str]) -> None:
    """Refuse what is no weight: see `Weight`."""
    if isinstance(weight, Mapping):
        for name, part in weight.items():
            if name not in known:
                raise ValueError(f"adapter_weights may name {', '.join(known)}, got {name!r}")
            check_weight(part, ("down", "mid", "up") if name == "unet" else ())
    elif isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"adapter_weights must be finite numbers or dicts of them, got {weight!r}")


def component_weight(weight: Weight, component: str) -> Weight:
    """Return the part of a weight that is meant for a component; blocks that are not named count fully."""
    if isinstance(weight, Mapping) and weight.keys() & set(COMPONENTS):
        return weight.get(component, 1.0)
    return 1.0 if isinstance(weight, Mapping) and component != "unet" else weight


def scaled(weight: Weight, scale: float) -> Weight:
    """Multiply a weight, whole or by block; the blocks that a dict leaves out count 1."""
    if isinstance(weight, Mapping):
        return {block: weight.get(block, 1.0) * scale for block in ("down", "mid", "up")}
    return weight * scale


def block_weight(weight: Weight, key: str) -> float:
    """Return the weight for one key of the UNet or the text encoder; outside the blocks a dict counts 1."""
    if isinstance(weight, Mapping):
        return weight.get(key.split("_block")[0], 1.0)
    return weight
