"""LoRA in the weights: what is fused and active is merged into them, and taken out again.

The checkpoint's own weights are kept beside the merged ones (weights mapped from a file cost no memory until read) and
put back bit for bit. Between calls the networks hold the active adapters at their weights; within a call that asks for
`cross_attention_kwargs={"scale": s}`, at s times that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from depthdiff.adapters.deltas import Delta
from depthdiff.adapters.lora import Lora, merged
from depthdiff.adapters.names import COMPONENTS
from depthdiff.adapters.weights import Weight, block_weight, component_weight, scaled
from depthdiff.components import Components


class Merging(Components):
    """Holds the adapters of a pipeline, and keeps its weights what they, fused and active, say."""

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self._loras: dict[str, Lora] = {}
        self._active: dict[str, Weight] = {}
        self._lora_enabled = True
        self._fused: dict[str, list[tuple[Lora, Weight]]] = {component: [] for component in COMPONENTS}
        self._originals: dict[str, dict[str, Tensor]] = {component: {} for component in COMPONENTS}
        self._merged: dict[str, Any] = {component: [] for component in COMPONENTS}
        self._merged_into: dict[str, Any] = {component: components[component] for component in COMPONENTS}

    def _adapted(self) -> dict[str, nn.Module]:
        """Return the networks that adapters change; a pipeline may lack its text encoder."""
        networks = {component: getattr(self, component) for component in COMPONENTS}
        return {component: network for component, network in networks.items() if network is not None}

    def _merge_all(self) -> None:
        for component in COMPONENTS:
            self._merge(component, 1.0)

    def _let_go(self, component: str) -> None:
        """Give a network that the user has replaced its own weights back; the new one starts without adapters."""
        network = getattr(self, component)
        if network is not self._merged_into[component]:
            for key, original in self._originals[component].items():
                parameter = self._merged_into[component].get_parameter(key)
                parameter.data = original.to(parameter.device, parameter.dtype)
            self._merged_into[component].mark = object()
            self._originals[component], self._merged[component] = {}, []
            self._merged_into[component] = network

    def _merge(self, component: str, scale: float) -> None:
        """Make the weights of a network what fused and active adapters, these times `scale`, say."""
        self._let_go(component)
        wanted = list(self._fused[component])
        for name, share in self._active.items() if self._lora_enabled and scale else ():
            if component in self._loras[name].deltas and self._loras[name] not in [lora for lora, _ in wanted]:
                wanted.append((self._loras[name], scaled(component_weight(share, component), scale)))
        if wanted == self._merged[component]:
            return
        self._merged[component] = None  # unknown while at work
        network, originals = getattr(self, component), self._originals[component]
        network.mark = object()
        touched = dict.fromkeys([*originals, *(key for lora, _ in wanted for key in lora.deltas[component])])
        for key in touched:
            parameter = network.get_parameter(key)
            original = originals.get(key, parameter.data).to(parameter.device, parameter.dtype)
            changes: list[tuple[Delta, float]] = []
            for lora, share in wanted:
                amount = block_weight(share, key)
                if key in lora.deltas[component] and amount:
                    changes.append((lora.deltas[component][key], amount))
            if changes:
                originals.setdefault(key, parameter.data)
                parameter.data = merged(original, changes)
            elif key in originals:
                del originals[key]
                parameter.data = original
        self._merged[component] = wanted

    @contextmanager
    def _scaled(self, component: str, scale: float | None) -> Iterator[None]:
        """Use the active adapters of a network times `scale` for a while."""
        if scale is None or scale == 1:
            yield
            return
        self._merge(component, scale)
        try:
            yield
        finally:
            self._merge(component, 1.0)
