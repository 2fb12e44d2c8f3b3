"""LoRA and its kin, from the tensors of a file to what is added to each weight; all is checked before any of it counts.

Source of the file layouts: huggingface/diffusers, loaders/lora_conversion_utils.py; huggingface/peft,
utils/save_and_load.py; kohya-ss/sd-scripts, networks/lora.py; KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.adapters.deltas import Delta, fits, make_delta, widened
from depthdiff.adapters.names import is_kohya, layer_names, split_key
from depthdiff.config import CheckpointError

OTHERS = {
    "lora_te2_": "Stable Diffusion XL",
    "text_encoder_2.": "Stable Diffusion XL",
    "lora_unet_label_emb": "Stable Diffusion XL",
    "lora_unet_add_embedding": "Stable Diffusion XL",
    "lora_unet_double_blocks": "Flux",
    "lora_unet_joint_blocks": "Stable Diffusion 3",
    "lora_transformer_": "a diffusion transformer",
    "transformer.": "a diffusion transformer",
    "diffusion_model.": "a diffusion transformer",
}
"""How keys begin -> the architecture they belong to."""

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
CONTEXT_KEY = re.compile(r"attn2[._](?:processor[._])?to_[kv](?:[._]lora)?\.(?:lora_down|lora_A|down|lora\.down)\.")
"""A lower matrix of a layer that reads the context, in any spelling."""

CONTEXTS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
"""Channels of the context -> the architecture."""


@dataclass(frozen=True, eq=False)
class Lora:
    """One adapter, read and checked.

    Attributes:
        name: chosen by the user.
        deltas: component -> our key of a weight or bias -> what is added to it.
        notes: what the user should know, such as channels that are left out.
    """

    name: str
    deltas: dict[str, dict[str, Delta]]
    notes: tuple[str, ...] = ()


def read_lora(
    name: str, state: Mapping[str, Any], settings: Mapping[str, Any], networks: Mapping[str, nn.Module], source: str
) -> Lora:
    """Infer what an adapter changes.

    Args:
        name: of the adapter.
        state: key -> tensor.
        settings: PEFT's, by component; "" for all.
        networks: by component.
        source: name of the file, for errors.

    Raises:
        CheckpointError: keys that are unknown, mixed, of another architecture or twice; parts that are missing; shapes
            that do not fit; numbers that are not finite.
    """
    layers = sort_keys(state, networks, source)
    rules = {component: read_rules(settings.get(component, settings.get("", {})), source) for component in networks}
    deltas: dict[str, dict[str, Delta]] = defaultdict(dict)
    notes: list[str] = []
    for (component, layer), (spelling, parts) in layers.items():
        chosen = rules[component]
        bias = parts.pop("diff_b", None)
        alpha, r = read_alpha(parts.pop("alpha", None), chosen, spelling, source)
        if "magnitude_vector" in parts:
            parts["dora_scale"] = parts.pop("magnitude_vector").flatten()
        if parts or bias is None:
            delta = make_delta(parts, alpha, r, rank_stabilized=chosen.rank_stabilized)
            if delta is None:
                raise CheckpointError(f"{source}: {spelling!r} has {', '.join(sorted(parts)) or 'alpha alone'}, which "
                                      "is no known method, or not all of it; is the file damaged?")  # fmt: skip
            deltas[component][f"{layer}.weight"] = delta
        if bias is not None:
            deltas[component][f"{layer}.bias"] = Delta("full", {"diff": bias}, 1.0)
    check_architecture(deltas, networks, source)
    for component, weights in deltas.items():
        notes += check_shapes(weights, networks[component], source)
    return Lora(name, dict(deltas), tuple(notes))


def sort_keys(
    state: Mapping[str, Any], networks: Mapping[str, nn.Module], source: str
) -> dict[tuple[str, str], tuple[str, dict[str, Tensor]]]:
    """Group the tensors by the layer they belong to: (component, our layer) -> its spelling, its tensors by part."""
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{source} must hold tensors by name, got {type(state).__name__}, or an empty one")
    state = {key: read_number(value) if str(key).endswith(".alpha") else value for key, value in state.items()}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{source}: {key!r} must be a tensor under a text, got {type(value).__name__}")
        if not has_numbers(value):
            raise CheckpointError(
                f"{source}: {key!r} must hold finite numbers, in float32 as well; is the file damaged?"
            )
    for start, kind in OTHERS.items():
        hits = [key for key in state if key.startswith(start)]
        if hits:
            raise CheckpointError(f"{source} is made for {kind}, not for this model; its keys are such as {hits[0]!r}")
    kohya = [key for key in state if is_kohya(key)]
    if kohya and len(kohya) < len(state):
        other = sorted(state.keys() - set(kohya))
        raise CheckpointError(
            f"{source} mixes {len(kohya)} keys such as {kohya[0]!r} with {len(other)} such as {other[0]!r}; split it"
        )
    names, unknown = layer_names(networks), []
    layers: dict[tuple[str, str], tuple[str, dict[str, Tensor]]] = {}
    for key, tensor in state.items():
        cut = split_key(key)
        if cut is None or cut[0] not in names:
            unknown.append(key)
            continue
        spelling, parts = layers.setdefault(names[cut[0]], (cut[0], {}))
        if cut[1] in parts:
            raise CheckpointError(f"{source}: {key!r} is given twice, also under {spelling!r}; remove one")
        parts[cut[1]] = tensor
    if unknown:
        kinds = {CONTEXTS[width] for width in context_widths(state) if width in CONTEXTS}
        raise CheckpointError(
            f"{source}: {len(unknown)} of {len(state)} keys belong to no layer of this model, first: "
            f"{', '.join(map(repr, sorted(unknown)[:3]))}; is it made for {' and '.join(kinds) or 'something else'}?"
        )
    return layers


def has_numbers(tensor: Tensor) -> bool:
    """Return whether a tensor holds real numbers that are there, dense and finite in float32."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
        return False
    return bool((tensor.float() if tensor.element_size() in (1, 8) else tensor).isfinite().all())


def read_number(alpha: Any) -> Any:
    """Convert an alpha that is a whole number, or no tensor, to a tensor of float; leave what is no number."""
    if isinstance(alpha, int) and abs(alpha) > 2**63:
        return torch.tensor(math.inf)  # refused where its name is known
    if isinstance(alpha, (int, float)) or (isinstance(alpha, Tensor) and alpha.dtype in WHOLE):
        return torch.as_tensor(alpha, dtype=torch.float64)
    return alpha


def context_widths(state: Mapping[str, Tensor]) -> set[int]:
    """Find the channels of the context from layers that read it, whatever the rest of their names is."""
    return {tensor.shape[1] for key, tensor in state.items() if tensor.ndim > 1 and CONTEXT_KEY.search(key)}


@dataclass(frozen=True)
class Rules:
    """What PEFT's settings say of alpha and rank.

    Attributes:
        alpha: of layers without an exception; the rank if None.
        rank: likewise; that of the tensors if None.
        alphas: end of a layer's name -> order in the file, alpha.
        ranks: likewise.
        rank_stabilized: see `make_delta`.
    """

    alpha: float | None
    rank: float | None
    alphas: Mapping[str, tuple[int, float]]
    ranks: Mapping[str, tuple[int, float]]
    rank_stabilized: bool


def read_rules(settings: Any, source: str) -> Rules:
    """Read PEFT's settings of one component.

    The patterns, exceptions by layer, are ends of names, matched literally: expressions of a file are not run.

    Raises:
        CheckpointError: a value that is not a number, or a pattern that is an expression.
    """
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{source}: the adapter's settings must be an object, got {type(settings).__name__}")
    wholes: list[float | None] = []
    tables: list[dict[str, tuple[int, float]]] = []
    for pattern, names in (("alpha_pattern", ("lora_alpha", "alpha")), ("rank_pattern", ("r",))):
        exceptions = settings.get(pattern) or {}
        if not isinstance(exceptions, Mapping):
            raise CheckpointError(f"{source}: {pattern} must hold numbers by layer, got {exceptions!r}")
        table: dict[str, tuple[int, float]] = {}
        for order, (name, value) in enumerate(exceptions.items()):
            plain = name.removeprefix("^").removesuffix("$").replace(r"\.", ".")
            if not re.fullmatch(r"[\w.]+", plain):
                raise CheckpointError(
                    f"{source}: {pattern} must hold names of layers or the ends of such, got {name[:80]!r}: regular "
                    "expressions of a file are not run; name the layers"
                )
            table.setdefault(plain, (order, _setting(names[0], value, source)))
        tables.append(table)
        known = [settings[name] for name in names if settings.get(name) is not None]
        wholes.append(_setting(names[0], known[0], source) if known else None)
    return Rules(wholes[0], wholes[1], tables[0], tables[1], bool(settings.get("use_rslora")))


def _setting(name: str, value: Any, source: str) -> float:
    lowest = 0 if name == "r" else -math.inf
    if type(value) not in (int, float) or not lowest < value < 1e9:
        above = " above 0" if name == "r" else ""
        raise CheckpointError(f"{source}: {name} must be a number{above}, got {str(value)[:80]!r}")
    return float(value)


def read_alpha(part: Tensor | None, rules: Rules, spelling: str, source: str) -> tuple[float | None, float | None]:
    """Find a layer's alpha and the rank it is divided by, where they are not that of the tensors.

    Files of kohya and LyCORIS hold alpha; PEFT's settings hold both, and exceptions by the end of a layer's name.
    """
    if part is not None:
        if part.numel() != 1 or not math.isfinite(part.item()):
            raise CheckpointError(f"{source}: the alpha of {spelling!r} must be one number, got {tuple(part.shape)}")
        return part.item(), None
    steps = spelling.split(".")
    ends = [".".join(steps[i:]) for i in range(len(steps))]
    found = []
    for table, whole in ((rules.alphas, rules.alpha), (rules.ranks, rules.rank)):
        exceptions = sorted(table[end] for end in ends if end in table)
        found.append(exceptions[0][1] if exceptions else whole)
    return found[0], found[1]


def check_architecture(
    deltas: Mapping[str, Mapping[str, Delta]], networks: Mapping[str, nn.Module], source: str
) -> None:
    """Refuse an adapter for another text encoder, by the channels of the context that it expects."""
    for key, delta in deltas.get("unet", {}).items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) and delta.method == "LoRA":
            if delta.parts["down"].ndim < 2:
                continue  # `check_shapes` refuses it
            width, own = delta.parts["down"].shape[1], networks["unet"].get_parameter(key).shape[1]
            if width != own:
                kind = CONTEXTS.get(width, "another model")
                raise CheckpointError(f"{source} is made for {kind}, whose context has {width} channels; here {own}")


def check_shapes(deltas: Mapping[str, Delta], network: nn.Module, source: str) -> Iterator[str]:
    """Refuse changes that do not fit their weights; yield notes for the user."""
    parameters = dict(network.named_parameters())
    for key, delta in deltas.items():
        if key not in parameters:
            raise CheckpointError(f"{source} changes {key}, which this model does not have")
        fit = fits(delta, tuple(parameters[key].shape))
        if fit is False or (fit is None and key != "conv_in.weight"):
            parts = delta.parts if delta.magnitude is None else {**delta.parts, "dora_scale": delta.magnitude}
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in parts.items())
            raise CheckpointError(f"{source}: {shapes} do not fit {key} {tuple(parameters[key].shape)}")
        if fit is None:
            yield f"{source} is made for a UNet without depth: of {key} only the image channels are changed"


def merged(weight: Tensor, changes: Iterable[tuple[Delta, float]]) -> Tensor:
    """Add changes, each times its share, and round once.

    Args:
        weight: the checkpoint's own.
        changes: of this weight, and how much of each.
    """
    total = widened(weight)
    for delta, share in changes:
        total = total + share * delta.of(weight)
    return total.to(weight.dtype)
