"""LoRA in the weights: fused and active adapters are merged into them, and can be removed again, all or nothing.

The checkpoint's own weights are kept beside the merged ones, on the CPU (mapped from a file, they cost no memory until
read), and restored bit for bit. New weights are computed first and exchanged when all are there. A call that asks for
`cross_attention_kwargs={"scale": s}` gets a network of its own, which shares all other weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.adapters.formats import COMPONENTS, Lora, has_numbers
from depthdiff.adapters.methods import upcast
from depthdiff.checks import plain, show
from depthdiff.pipeline_utils import DiffusionPipeline
from depthdiff.sharing import uncompiled, with_weights

Weight = float | Mapping[str, Any]
"""How much of an adapter: a number, or {"unet": U, "text_encoder": number}, where U is a number or {"down": B, "mid":
number, "up": B}, and B a number, a list with one for each transformer of a block, or {"block_1": number or list}."""

MAX_WEIGHT = 1e6
BLOCK = re.compile(r"(?P<side>down|up)_blocks\.(?P<block>\d+)(?:\.(?:attentions|resnets)\.(?P<index>\d+))?")

Scales = tuple[tuple[Lora, Weight], ...]
"""Adapters, and how much of each."""


@dataclass(frozen=True)
class AdapterState:
    """Which adapters a pipeline has; another state is another object.

    Attributes:
        loras: name -> adapter, in the order of loading.
        active: name -> weight, of the active ones.
        enabled: whether the active ones are used.
        fused: component -> adapters that are part of its weights.
    """

    loras: Mapping[str, Lora] = field(default_factory=dict)
    active: Mapping[str, Weight] = field(default_factory=dict)
    enabled: bool = True
    fused: Mapping[str, Scales] = field(default_factory=dict)

    def scales(self, component: str, scale: float = 1.0) -> Scales:
        """List the adapters that change a component: the fused ones, and the active ones times `scale`."""
        fused = self.fused.get(component, ())
        known = [lora for lora, _ in fused]
        active = [(self.loras[name], weight) for name, weight in self.active.items()] if self.enabled and scale else []
        more = [(lora, weight) for lora, weight in active if component in lora.deltas and lora not in known]
        return (*fused, *((lora, scaled(component_weight(weight, component), scale)) for lora, weight in more))


@dataclass(frozen=True, eq=False)
class Merge:
    """A network, the adapters merged into it, and its own weights, on the CPU, of those that they change."""

    network: Any
    scales: Scales = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)

    def original(self, key: str) -> Tensor:
        """Return one of the network's own weights, on its present device and in its present dtype."""
        parameter, original = self.network.get_parameter(key), self.originals.get(key)
        return parameter.data if original is None else original.to(parameter.device, parameter.dtype)

    def weights(self, component: str, scales: Scales) -> dict[str, Tensor] | None:
        """Compute the weights that adapters change, on their device: key -> tensor; None if nothing is new."""
        if scales == self.scales or self.network is None:
            return None
        weights = {}
        for key in dict.fromkeys(key for lora, _ in scales for key in lora.deltas[component]):
            amounts = [(lora, block_weight(weight, key)) for lora, weight in scales if key in lora.deltas[component]]
            amounts = [(lora, amount) for lora, amount in amounts if amount]
            if not amounts:
                continue
            original = self.original(key)
            with torch.inference_mode(original.is_inference()), torch.no_grad():  # of the kind that it replaces
                total = upcast(original)
                for lora, amount in amounts:
                    total = total + amount * lora.deltas[component][key].of(original)
                weights[key] = total.to(original.dtype)
            if not has_numbers(weights[key]) and has_numbers(original):
                names = ", ".join(repr(lora.name) for lora, _ in scales)
                raise ValueError(f"{component} {key} would hold NaN or infinity with the adapters {names}; give "
                                 "them less weight, or use a wider dtype; nothing has changed")  # fmt: skip
        return weights


@dataclass(eq=False)
class Merged:
    """What is merged into the networks of one pipeline, or of several that share them.

    Attributes:
        adapters: that the pipelines have.
        merges: component -> what is merged into it.
        shared: whether several pipelines hold this.
    """

    adapters: AdapterState
    merges: Mapping[str, Merge]
    shared: bool = False


class Merging(DiffusionPipeline):
    """Holds the adapters of a pipeline, and keeps its weights equal to base + fused + active adapters."""

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self._merged = Merged(AdapterState(), {component: Merge(self._host(component)) for component in COMPONENTS})

    @property
    def _adapters(self) -> AdapterState:
        return self._merged.adapters

    def _share(self, pipeline: DiffusionPipeline) -> None:
        super()._share(pipeline)
        if isinstance(pipeline, Merging) and self._adapted() == pipeline._adapted():
            self._merged = pipeline._merged
            self._merged.shared = True

    def _host(self, component: str) -> Any:
        """Return the network that hosts a component's adapters: the one within, if it was compiled."""
        return uncompiled(getattr(self, component))

    def _adapted(self) -> dict[str, Any]:
        """Return the networks that adapters change; a pipeline may lack its text encoder."""
        networks = {component: self._host(component) for component in COMPONENTS}
        return {component: network for component, network in networks.items() if network is not None}

    def _has_adapters(self) -> bool:
        return bool(self._adapters.loras) or any(self._adapters.fused.values())

    @torch.no_grad()
    def _become(self, state: AdapterState) -> None:
        """Change the adapters, and the weights with them, both or neither; the caller holds `self._turns`."""
        merged, own = self._merged, self._merged
        merges, changes = dict(merged.merges), []
        if merged.shared:
            self._refuse_half(state)
        for component, merge in merged.merges.items():
            network = self._host(component)
            if merge.network is not network:  # the user has replaced it
                if not merged.shared:
                    changes += [(merge.network, key, merge.original(key)) for key in merge.originals]
                elif own is merged:  # the others go on as they are
                    own = replace(merged, shared=False)
                merge = Merge(network)
            weights = merge.weights(component, state.scales(component))
            if weights is not None:
                originals = {key: merge.original(key) for key in (*merge.originals, *weights)}
                changes += [(network, key, weights.get(key, original)) for key, original in originals.items()]
                originals = {key: original.cpu() for key, original in originals.items() if key in weights}
                merge = Merge(network, state.scales(component), originals)
            merges[component] = merge
        parameters = [(network.get_parameter(key), tensor) for network, key, tensor in changes]
        before = [(parameter, parameter.data) for parameter, _ in parameters], merged.adapters, merged.merges
        try:
            for parameter, tensor in parameters:
                parameter.data = tensor
            vars(own).update(adapters=state, merges=merges)
            self._merged = own
        except BaseException:
            for parameter, tensor in before[0]:
                parameter.data = tensor
            self._merged = merged
            vars(merged).update(adapters=before[1], merges=before[2])
            raise

    def _refuse_half(self, state: AdapterState) -> None:
        """Refuse to change adapters where another pipeline has one of the two networks, and this one the other."""
        for component, merge in self._merged.merges.items():
            others = [name for name, one in self._merged.merges.items() if one.network is not self._host(name)]
            if others and merge.network is self._host(component) and (merge.scales or state.scales(component)):
                raise ValueError(
                    f"{component} and its adapters are shared with another pipeline, {others[0]} is not: change the "
                    f"adapters there, or give this pipeline a {component} of its own"
                )

    def _at_scale(self, component: str, network: Any, scale: float | None) -> Any:
        """Return a network as a call uses it that takes the active adapters times `scale`."""
        if scale is None or scale == 1:
            return network
        return self._with_scales(component, network, self._adapters.scales(component, scale))

    def _saved(self) -> dict[str, Any]:
        """Return the components with fused adapters, and without those that are merely active."""
        fused = AdapterState(fused=self._adapters.fused)
        present = self._adapted()
        adapted = {name: self._with_scales(name, part, fused.scales(name)) for name, part in present.items()}
        return super()._saved() | adapted

    @torch.no_grad()
    def _with_scales(self, component: str, network: Any, scales: Scales) -> Any:
        """Return a network with these adapters instead; as it is if nothing is merged into it."""
        merge = self._merged.merges[component]
        weights = merge.weights(component, scales) if merge.network is uncompiled(network) else None
        if weights is None:
            return network
        others = {key: merge.original(key) for key in merge.originals if key not in weights}
        return with_weights(network, others | weights)


# How much of an adapter is used, in which component and block of the UNet


def check_weight(weight: Any, unet: nn.Module) -> None:
    """Refuse what is not a `Weight` of this UNet."""
    if not isinstance(weight, Mapping):
        _check_number(weight)
        return
    _check_names(weight, (*COMPONENTS, "down", "mid", "up"))
    _check_number(weight.get("text_encoder", 1.0))
    inner = weight.get("unet", weight)
    if not isinstance(inner, Mapping):
        _check_number(inner)
        return
    _check_names(inner, ("down", "mid", "up", *(COMPONENTS if inner is weight else ())))
    _check_number(inner.get("mid", 1.0))
    sizes: dict[str, dict[str, int]] = {"down": {}, "up": {}}
    for name, _ in unet.named_modules():
        place = re.fullmatch(r"(down|up)_blocks\.(\d+)(?:\.attentions\.(\d+))?", name)
        if place is not None:
            sizes[place[1]][f"block_{place[2]}"] = int(place[3] or 0) + 1
    for side, blocks in sizes.items():
        named = inner.get(side, 1.0)
        _check_names(named if isinstance(named, Mapping) else {}, blocks)
        for name, value in named.items() if isinstance(named, Mapping) else dict.fromkeys(blocks, named).items():
            numbers = value if isinstance(value, (list, tuple)) else [value]
            for number in numbers:
                _check_number(number)
            if not numbers or (len(numbers) not in (1, blocks[name]) and blocks[name] > 1):
                raise ValueError(f"adapter_weights: {side} {name} has {blocks[name]} transformers, got {len(numbers)}")


def _check_names(weight: Mapping[str, Any], known: Collection[str]) -> None:
    for name in weight:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"adapter_weights may name {', '.join(known)}, got {show(name)}")


def _check_number(number: Any) -> None:
    """Refuse what is not a finite number; None is 1."""
    one = plain(number)
    if one is not None and (isinstance(one, bool) or not isinstance(one, (int, float)) or not abs(one) <= MAX_WEIGHT):
        raise ValueError(f"adapter_weights must be finite numbers or dicts of them, got {show(number)}")


def component_weight(weight: Weight, component: str) -> Weight:
    """Return the part of a weight for a component; 1 if it is not named."""
    if isinstance(weight, Mapping):
        inner = weight.get(component, weight if component == "unet" and "unet" not in weight else 1.0)
        return 1.0 if inner is None else inner
    return weight


def scaled(weight: Any, scale: float) -> Any:
    """Multiply a weight, whole or by block; the blocks that a dict leaves out have 1."""
    if isinstance(weight, Mapping):
        return {"rest": scale} | {name: scaled(part, scale) for name, part in weight.items()}
    if isinstance(weight, (list, tuple)):
        return [scaled(part, scale) for part in weight]
    return (1.0 if weight is None else float(weight)) * scale


def block_weight(weight: Any, key: str) -> float:
    """Return the weight, once `scaled`, for one key of the UNet or the text encoder."""
    place = BLOCK.match(key)
    side, block, index = place.groups() if place is not None else (key.split("_block")[0], None, None)
    for name in (side, f"block_{block}"):
        if isinstance(weight, Mapping):
            weight = weight.get(name, weight["rest"])
    if isinstance(weight, list):
        weight = weight[int(index or 0) if len(weight) > 1 else 0]
    return weight
