"""LoRA in the weights: what is fused and active is merged into them, and taken out again, all or nothing.

The checkpoint's own weights are kept beside the merged ones, in the processor's memory (weights mapped from a file cost
no memory until read), and put back bit for bit. New weights are computed first and exchanged when all are there. A call
that asks for `cross_attention_kwargs={"scale": s}` gets a network of its own, which shares all other weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.adapters.deltas import Delta
from depthdiff.adapters.lora import Lora, has_numbers, merged
from depthdiff.adapters.names import COMPONENTS
from depthdiff.adapters.weights import Weight, block_weight, component_weight, scaled
from depthdiff.pipeline_utils import DiffusionPipeline
from depthdiff.sharing import uncompiled, with_weights

Shares = tuple[tuple[Lora, Weight], ...]
"""Adapters, and how much of each."""


@dataclass(frozen=True)
class AdapterState:
    """Which adapters a pipeline has; another state is another object.

    Attributes:
        loras: name -> adapter, in the order of loading.
        active: name -> weight, of those that count.
        enabled: whether they do.
        fused: component -> adapters that are part of its weights.
    """

    loras: Mapping[str, Lora] = field(default_factory=dict)
    active: Mapping[str, Weight] = field(default_factory=dict)
    enabled: bool = True
    fused: Mapping[str, Shares] = field(default_factory=dict)

    def shares(self, component: str, scale: float = 1.0) -> Shares:
        """List the adapters that change a component: what is fused, and what is active, times `scale`."""
        fused = self.fused.get(component, ())
        known = [lora for lora, _ in fused]
        active = self.active.items() if self.enabled and scale else ()
        chosen = [(self.loras[name], share) for name, share in active]
        more = [(lora, share) for lora, share in chosen if component in lora.deltas and lora not in known]
        return (*fused, *((lora, scaled(component_weight(share, component), scale)) for lora, share in more))


@dataclass(frozen=True, eq=False)
class Merge:
    """What was merged into a network.

    Attributes:
        network: it, or None where the pipeline has none.
        shares: of the adapters.
        originals: key -> the network's own weight, on the processor, of those that are changed.
    """

    network: Any
    shares: Shares = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)


class Merging(DiffusionPipeline):
    """Holds the adapters of a pipeline, and keeps its weights equal to their own plus what is fused and active."""

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self._adapters = AdapterState()
        self._merges = {component: Merge(self._host(component)) for component in COMPONENTS}

    def _host(self, component: str) -> Any:
        """Return the network that hosts a component's adapters: the one within, where it was compiled."""
        return uncompiled(getattr(self, component))

    def _adapted(self) -> dict[str, Any]:
        """Return the networks that adapters change; a pipeline may lack its text encoder."""
        networks = {component: self._host(component) for component in COMPONENTS}
        return {component: network for component, network in networks.items() if network is not None}

    def _has_adapters(self) -> bool:
        return bool(self._adapters.loras) or any(self._adapters.fused.values())

    @torch.no_grad()
    def _become(self, state: AdapterState) -> None:
        """Make the adapters and the weights what a state says, both or neither; the caller holds `self._turns`.

        Raises:
            ValueError: weights would not be finite.
        """
        merges, changes, before = dict(self._merges), [], (self._adapters, self._merges)
        for component in COMPONENTS:
            old, network = self._own_merge(component), self._host(component)
            if old is not self._merges[component]:
                changes += list(_put_back(self._merges[component]))
            weights = self._weights(component, old, state.shares(component))
            if weights is not None:
                touched = {key: _original(old, key) for key in (*old.originals, *weights)}
                kept = {key: original.cpu() for key, original in touched.items() if key in weights}
                changes += [(network, key, weights.get(key, touched[key])) for key in touched]
                old = Merge(network, state.shares(component), kept)
            merges[component] = old
        _exchange(changes, lambda: vars(self).update(_adapters=state, _merges=merges),
                  lambda: vars(self).update(zip(("_adapters", "_merges"), before, strict=True)))  # fmt: skip

    def _own_merge(self, component: str) -> Merge:
        """Return what is merged into the present network: nothing if the user has put it in the place of another."""
        merge = self._merges[component]
        network = self._host(component)
        return merge if merge.network is network else Merge(network)

    def _weights(self, component: str, merge: Merge, shares: Shares) -> dict[str, Tensor] | None:
        """Compute the weights that adapters change, on their device: key -> tensor; None where nothing is new.

        Raises:
            ValueError: one would not be finite.
        """
        if shares == merge.shares or merge.network is None:
            return None
        weights = {}
        for key in dict.fromkeys(key for lora, _ in shares for key in lora.deltas[component]):
            changes: list[tuple[Delta, float]] = []
            for lora, share in shares:
                amount = block_weight(share, key)
                if key in lora.deltas[component] and amount:
                    changes.append((lora.deltas[component][key], amount))
            if changes:
                original = _original(merge, key)
                weights[key] = merged(original, changes)
                if not has_numbers(weights[key]) and has_numbers(original):
                    names = ", ".join(repr(lora.name) for lora, _ in shares)
                    raise ValueError(f"{component} {key} would hold NaN or infinity with the adapters {names}; give "
                                     "them less weight, or use a wider dtype; nothing has changed")  # fmt: skip
        return weights

    def _at_scale(self, component: str, network: Any, scale: float | None) -> Any:
        """Return a network as a call sees it that takes the active adapters times `scale`."""
        if scale is None or scale == 1:
            return network
        return self._with_shares(component, network, self._adapters.shares(component, scale))

    def _saved(self) -> dict[str, Any]:
        """Return the components with what is fused, and without what is merely active."""
        fused = AdapterState(fused=self._adapters.fused)
        present = {name: getattr(self, name) for name in self._adapted()}
        return self.components | {
            name: self._with_shares(name, part, fused.shares(name)) for name, part in present.items()
        }

    @torch.no_grad()
    def _with_shares(self, component: str, network: Any, shares: Shares) -> Any:
        """Return a network with other adapters, or with other shares of them; as it is where it has none yet."""
        merge = self._merges[component]
        weights = self._weights(component, merge, shares) if merge.network is uncompiled(network) else None
        if weights is None:
            return network
        others = {key: _original(merge, key) for key in merge.originals if key not in weights}
        return with_weights(network, others | weights)


def _original(merge: Merge, key: str) -> Tensor:
    """Return a network's own weight, on its present device and in its present dtype."""
    parameter = merge.network.get_parameter(key)
    original = merge.originals.get(key)
    return parameter.data if original is None else original.to(parameter.device, parameter.dtype)


def _put_back(merge: Merge) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for key in merge.originals:
        yield merge.network, key, _original(merge, key)


def _exchange(changes: list[tuple[Any, str, Tensor]], then: Any, undo: Any) -> None:
    """Give every parameter its tensor and do what belongs to it; interrupted anywhere, undo all of it."""
    parameters = [(network.get_parameter(key), tensor) for network, key, tensor in changes]
    before = [(parameter, parameter.data) for parameter, _ in parameters]
    try:
        for parameter, tensor in parameters:
            parameter.data = tensor
        then()
    except BaseException:
        for parameter, tensor in before:
            parameter.data = tensor
        undo()
        raise
