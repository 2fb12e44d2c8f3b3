"""Files of adapters <-> changes of layers, in every spelling; all of a file is checked before any of it is applied.

Source of the layouts: huggingface/diffusers, loaders/lora_conversion_utils.py; huggingface/peft,
utils/save_and_load.py; kohya-ss/sd-scripts, networks/lora.py; KohakuBlueleaf/LyCORIS. One layer's name in them:

unet.down_blocks.0.attentions.0...attn1.to_q.lora_A.weight              diffusers
down_blocks.0.attentions.0...attn1.processor.to_q_lora.down.weight      diffusers, before 0.22
base_model.model.down_blocks.0.attentions.0...attn1.to_q.lora_A.weight  PEFT
lora_unet_down_blocks_0_attentions_0_..._attn1_to_q.lora_down.weight    kohya and LyCORIS
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.adapters.methods import Delta, fits, make_delta, rank
from depthdiff.checkpoint.hub import fetch, parse_json, read_json
from depthdiff.checkpoint.save import tensor_entry, write_safetensors
from depthdiff.checkpoint.transaction import check_folder, making
from depthdiff.checkpoint.weights import read_header, read_tensors_anyhow
from depthdiff.checkpoint.write import check_plain_name
from depthdiff.checks import check_path, show
from depthdiff.config import CheckpointError
from depthdiff.models.peft import LORA_FILE, SETTINGS

ADAPTER_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_TENSORS = 20_000  # an adapter that changes every layer of Stable Diffusion 2 in three tensors each has 5,000
MAX_HEADER = 2**24  # bytes; trainers write the words of their captions into the header

COMPONENTS = ("unet", "text_encoder")
KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
OLD_TEXT_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

KEY = re.compile(
    r"(?P<layer>.+?)(?:"
    r"(?:\.lora_linear_layer|\.lora|_lora)\.(?P<old>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.default)?\.weight"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|(?:\.lora)?\.(?P<own>alpha|dora_scale|diff|diff_b|w_norm|b_norm|hada_\w+|lokr_\w+)"
    r")"
)
PARTS = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}
KOHYA_PARTS = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

FOREIGN_PREFIXES = {
    "Stable Diffusion XL": ("lora_te2_", "text_encoder_2.", "lora_unet_label_emb", "lora_unet_add_embedding"),
    "Flux": ("lora_unet_double_blocks",),
    "Stable Diffusion 3": ("lora_unet_joint_blocks",),
    "a diffusion transformer": ("lora_transformer_", "transformer.", "diffusion_model."),
}
"""Other architectures, and how the keys of their adapters begin."""

CROSS_ATTENTION_KEY = re.compile(
    r"attn2[._](?:processor[._])?to_[kv](?:[._]lora)?\.(?:lora_down|lora_A|down|lora\.down)\."
)
"""A lower matrix of a layer that reads the prompt, in any spelling."""

CROSS_ATTENTION_DIMS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
"""Channels of the prompt's embeddings -> the architecture."""


@dataclass(frozen=True, eq=False)
class Lora:
    """One adapter, read and checked: component -> key of a weight or bias -> what is added to it."""

    name: str
    deltas: dict[str, dict[str, Delta]]
    warnings: tuple[str, ...] = ()


# Reading a file


def read_file(
    name_or_path: str | os.PathLike[str],
    defaults: Sequence[str],
    *,
    weight_name: str | None,
    subfolder: str | None,
    use_safetensors: bool | None,
    **where: Any,
) -> tuple[Any, dict[str, Any], Path]:
    """Return what an adapter's file holds, PEFT's settings by component ("" for all), and its path.

    Nothing that the file contains is run. `where` is as in `depthdiff.checkpoint.hub.fetch`.
    """
    path = _find_file(name_or_path, defaults, weight_name, subfolder=subfolder, **where)
    if use_safetensors and path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file, which use_safetensors=True asks for")
    if path.suffix in PICKLES:
        return read_tensors_anyhow(path, MAX_TENSORS), _read_settings(path, {}), path
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors or one of {', '.join(PICKLES)}")
    sources, header = read_header(path, MAX_HEADER)
    if len(sources) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(sources):,} tensors, more than {MAX_TENSORS:,}; is it an adapter?")
    state = {key: source.get().clone() for key, source in sources.items()}
    return state, _read_settings(path, header), path


def _find_file(name_or_path: Any, defaults: Sequence[str], weight_name: str | None, **where: Any) -> Path:
    """Find the file that is named, or the first default in a folder, or the only file of weights there."""
    wanted = defaults if weight_name is None else [weight_name]
    check_path("the file's name", name_or_path)
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    folder = fetch(name_or_path, (), optional=[*wanted, ADAPTER_CONFIG], **where)
    others = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", *PICKLES))
    found = [folder / name for name in wanted if (folder / name).is_file()]
    if found or (weight_name is None and len(others) == 1):
        return (found or others)[0]
    names = ", ".join(path.name for path in others) or "no weights"
    raise CheckpointError(f"{name_or_path} has no {' or '.join(wanted)}, found {names}; name one as weight_name=...")


def _read_settings(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Read PEFT's settings: those beside the weights, for all components, and those in a header, as of diffusers."""
    config, text = path.with_name(ADAPTER_CONFIG), header.get(SETTINGS)
    settings = {"": read_json(config)} if path.stem.startswith("adapter_model") and config.is_file() else {}
    flat = {} if text is None else parse_json(text.encode("utf-8", "surrogatepass"), path, SETTINGS)
    for key, value in flat.items():
        component, dot, name = key.partition(".")
        if dot:
            settings.setdefault(component, {})[name] = value
    return settings


# Tensors to changes


def read_lora(
    name: str, state: Mapping[str, Any], settings: Mapping[str, Any], networks: Mapping[str, nn.Module], source: str
) -> Lora:
    """Infer what an adapter (key -> tensor, and PEFT's settings by component) changes, or raise CheckpointError."""
    layers = _layers_of(_check_tensors(state, networks, source), networks, source)
    rules = {component: _read_rules(settings.get(component, settings.get("", {})), source) for component in networks}
    deltas: dict[str, dict[str, Delta]] = defaultdict(dict)
    for (component, layer), (spelling, parts) in layers.items():
        bias, own = parts.pop("diff_b", None), parts.pop("alpha", None)
        alphas, ranks, rank_stabilized = rules[component]
        if own is not None and own.numel() != 1:
            raise CheckpointError(f"{source}: the alpha of {spelling!r} must be one number, got {tuple(own.shape)}")
        alpha = _number_of(spelling, alphas) if own is None else own.item()
        r = _number_of(spelling, ranks) if own is None else None
        if "magnitude_vector" in parts:
            parts["dora_scale"] = parts.pop("magnitude_vector").flatten()
        if parts or bias is None:
            delta = make_delta(parts, alpha, r, rank_stabilized)
            if delta is None:
                raise CheckpointError(f"{source}: {spelling!r} has {', '.join(sorted(parts)) or 'alpha alone'}, which "
                                      "is no known method, or an incomplete one; is the file damaged?")  # fmt: skip
            deltas[component][f"{layer}.weight"] = delta
        if bias is not None:
            deltas[component][f"{layer}.bias"] = Delta("full", {"diff": bias}, 1.0)
    warnings = [text for component, some in deltas.items() for text in _check_shapes(some, networks[component], source)]
    return Lora(name, dict(deltas), tuple(warnings))


def _check_tensors(state: Any, networks: Mapping[str, nn.Module], source: str) -> dict[str, Tensor]:
    """Return the tensors, each alpha in float64; refuse what is not a tensor, or is of another architecture."""
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{source} must hold tensors by name, got {type(state).__name__}, or an empty one")
    weights = networks["unet"].named_parameters() if "unet" in networks else ()
    own = {weight.shape[1] for name, weight in weights if name.endswith("attn2.to_k.weight")}
    tensors = {key: _as_float(value) if str(key).endswith(".alpha") else value for key, value in state.items()}
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source}: {key!r} must be a tensor with a text as its key, got {type(value).__name__}"
            )
        if not has_numbers(value):
            raise CheckpointError(f"{source}: {key!r} must hold finite numbers, also in float32; is the file damaged?")
        for kind, prefixes in FOREIGN_PREFIXES.items():
            if key.startswith(prefixes):
                raise CheckpointError(f"{source} is made for {kind}, not for this model; its keys are such as {key!r}")
        if value.ndim > 1 and own and value.shape[1] not in own and CROSS_ATTENTION_KEY.search(key):
            kind = CROSS_ATTENTION_DIMS.get(value.shape[1], "another model")
            raise CheckpointError(
                f"{source} is made for {kind}, whose context has {value.shape[1]} channels; this model's has {min(own)}"
            )
    return tensors


def _as_float(alpha: Any) -> Any:
    """Convert an alpha that is an integer, or a number that is not a tensor, to a tensor of float64."""
    if isinstance(alpha, int) and abs(alpha) > 2**63:
        return torch.tensor(math.inf)  # refused where its name is known
    if isinstance(alpha, (int, float)) or (isinstance(alpha, Tensor) and alpha.dtype in INTEGER_DTYPES):
        return torch.as_tensor(alpha, dtype=torch.float64)
    return alpha


def has_numbers(tensor: Tensor) -> bool:
    """Return whether a tensor holds real numbers, dense and finite in float32."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
        return False
    return bool((tensor.float() if tensor.element_size() in (1, 8) else tensor).isfinite().all())


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into the spelling of its layer and the name of the tensor; None if it is not an adapter's key."""
    found = KEY.fullmatch(key)
    if found is None:
        return None
    layer, *names = found.groups()
    name = next(name for name in names if name is not None)
    return layer.replace(".processor.", "."), PARTS.get(name, name)


def _layers_of(
    state: Mapping[str, Tensor], networks: Mapping[str, nn.Module], source: str
) -> dict[tuple[str, str], tuple[str, dict[str, Tensor]]]:
    """Group the tensors by the layer they belong to: (component, layer) -> its spelling, its tensors by part."""
    kohya = [key for key in state if key.startswith(tuple(prefix for some in KOHYA.values() for prefix in some))]
    if kohya and len(kohya) < len(state):
        other = sorted(state.keys() - set(kohya))
        raise CheckpointError(
            f"{source} mixes {len(kohya)} keys such as {kohya[0]!r} with {len(other)} such as {other[0]!r}; split it"
        )
    names, unknown = layer_names(networks), []
    layers: dict[tuple[str, str], tuple[str, dict[str, Tensor]]] = {}
    for key, tensor in state.items():
        spelling, part = split_key(key) or ("", "")
        if spelling not in names:
            unknown.append(key)
            continue
        first, parts = layers.setdefault(names[spelling], (spelling, {}))
        if part in parts:
            raise CheckpointError(f"{source}: {key!r} is given twice, also under {first!r}; remove one")
        parts[part] = tensor
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} of {len(state)} keys belong to no layer of this model, first: "
            f"{', '.join(map(repr, sorted(unknown)[:3]))}; is it made for something else?"
        )
    return layers


def layer_names(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """List every spelling of every layer that an adapter may change: spelling -> component, module path."""
    return {
        spelling: (component, key.removesuffix(".weight"))
        for component, network in networks.items()
        for key, _ in network.named_parameters()
        if key.endswith(".weight") and "_embedding.weight" not in key
        for spelling in _spellings(component, key.removesuffix(".weight"))
    }


def _spellings(component: str, layer: str) -> Iterator[str]:
    """List the spellings of a layer's published name."""
    variants = {layer, layer.removeprefix("text_model.")}
    if component == "unet":
        variants.add(re.sub(r"\.to_out\.0$", ".to_out", layer))
    else:
        last = layer.rpartition(".")[2]
        variants |= {variant.removesuffix(last) + OLD_TEXT_NAMES.get(last, last) for variant in set(variants)}
    for variant in variants:
        for prefix in ("", f"{component}.", "base_model.model.", f"{component}.base_model.model."):
            yield prefix + variant
        for prefix in KOHYA[component]:
            yield prefix + variant.replace(".", "_")


Number = tuple[float | None, dict[str, tuple[int, float]]]
"""Of PEFT's settings: that of most layers, and exceptions: the end of a layer's name -> order in the file, number."""


def _read_rules(settings: Any, source: str) -> tuple[Number, Number, bool]:
    """Read alpha, rank, and whether alpha is divided by the root of the rank, from PEFT's settings of one component.

    The patterns, exceptions by layer, are ends of names, matched literally: expressions of a file are not run.
    """
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{source}: the adapter's settings must be an object, got {type(settings).__name__}")
    numbers: list[Number] = []
    for pattern, names in (("alpha_pattern", ("lora_alpha", "alpha")), ("rank_pattern", ("r",))):
        exceptions = settings.get(pattern) or {}
        if not isinstance(exceptions, Mapping):
            raise CheckpointError(f"{source}: {pattern} must hold numbers by layer, got {exceptions!r}")
        table: dict[str, tuple[int, float]] = {}
        for order, (name, value) in enumerate(exceptions.items()):
            end = name.removeprefix("^").removesuffix("$").replace(r"\.", ".")
            if not re.fullmatch(r"[\w.]+", end):
                raise CheckpointError(
                    f"{source}: {pattern} must hold names of layers or the ends of such, got {name[:80]!r}: regular "
                    "expressions of a file are not run; name the layers"
                )
            table.setdefault(end, (order, _setting(names[0], value, source)))
        known = [_setting(names[0], settings[name], source) for name in names if settings.get(name) is not None]
        numbers.append((known[0] if known else None, table))
    return numbers[0], numbers[1], bool(settings.get("use_rslora"))


def _setting(name: str, value: Any, source: str) -> float:
    lowest = 0 if name == "r" else -math.inf
    if type(value) not in (int, float) or not lowest < value < 1e9:
        above = " above 0" if name == "r" else ""
        raise CheckpointError(f"{source}: {name} must be a number{above}, got {str(value)[:80]!r}")
    return float(value)


def _number_of(spelling: str, number: Number) -> float | None:
    """Return the number of one layer: the first exception that its name ends with, or that of most layers."""
    usual, exceptions = number
    steps = spelling.split(".")
    ends = [".".join(steps[i:]) for i in range(len(steps))]
    found = sorted(exceptions[end] for end in ends if end in exceptions)
    return found[0][1] if found else usual


def _check_shapes(deltas: Mapping[str, Delta], network: nn.Module, source: str) -> Iterator[str]:
    """Refuse changes that do not fit their weights; yield warnings for the user."""
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


# Writing


def prefixed(layers: nn.Module | Mapping[str, Tensor] | None, component: str) -> dict[str, Tensor]:
    """Convert LoRA layers of one network, under published names in any spelling, to diffusers' present keys."""
    state = layers.state_dict() if isinstance(layers, nn.Module) else layers or {}
    result = {}
    for key, tensor in state.items():
        spelling, part = split_key(key) or ("", "")
        if part not in ("down", "up"):
            raise ValueError(f"{component}_lora_layers must hold keys such as '...to_q.lora_A.weight', got {key!r}")
        layer = spelling.removeprefix("base_model.model.").removeprefix(f"{component}.")
        result[f"{component}.{layer}.lora_{'A' if part == 'down' else 'B'}.weight"] = tensor
    return result


def write_layers(
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    weight_name: str | None = None,
    save_function: Callable[..., Any] | None = None,
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> None:
    """Write tensors, and PEFT's settings by component, all or nothing, into a folder, which is made if need be."""
    if not state:
        raise ValueError("there are no LoRA layers to save; pass unet_lora_layers or text_encoder_lora_layers")
    place = check_folder("save_directory", folder)
    name = LORA_FILE if weight_name is None else weight_name
    check_plain_name("weight_name", name)
    if save_function is None and not name.endswith(".safetensors"):
        raise ValueError(f"weight_name must end in .safetensors, got {name!r}: pickles are not written")
    entries = [tensor_entry(key, tensor) for key, tensor in state.items()]
    header = _pack_settings(settings or {})
    with making(place):
        if save_function is None:
            write_safetensors(place / name, entries, metadata=header)
        else:
            copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
            save_function(copies, str(place / name))


def _pack_settings(settings: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """Write PEFT's settings as diffusers does: JSON in one entry of the header, with the component before each name."""
    flat = {}
    for component, values in settings.items():
        if values is not None and not isinstance(values, Mapping):
            raise TypeError(f"{component}_lora_adapter_metadata must be a dict or None, got {show(values)}")
        for name, value in (values or {}).items():
            flat[f"{component}.{name}"] = sorted(value) if isinstance(value, (set, frozenset)) else value
    try:
        return {SETTINGS: json.dumps(flat, indent=2, sort_keys=True)} if flat else {}
    except TypeError as error:
        names = " and ".join(f"{component}_lora_adapter_metadata" for component, values in settings.items() if values)
        raise TypeError(f"{names} must hold what JSON can, as LoraConfig.to_dict() does: {error}") from error


def lora_state(lora: Lora, networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Write an adapter as tensors by name.

    Plain LoRA gets diffusers' keys, with alpha multiplied into the upper matrix; all else gets kohya's, which diffusers
    does not read.
    """
    deltas = [(component, *item) for component in COMPONENTS for item in lora.deltas.get(component, {}).items()]
    plain = all(d.method == "LoRA" and "mid" not in d.parts and d.magnitude is None for _, _, d in deltas)
    state = {}
    for component, key, delta in deltas:
        layer, _, leaf = key.rpartition(".")
        stem, r = KOHYA[component][0] + layer.replace(".", "_"), rank(delta.parts)
        if plain:
            up = delta.parts["up"]
            state[f"{component}.{layer}.lora_A.weight"] = delta.parts["down"]
            state[f"{component}.{layer}.lora_B.weight"] = up if delta.scale == 1 else up * delta.scale
            continue
        for name, part in delta.parts.items():
            name = "diff_b" if leaf == "bias" else KOHYA_PARTS.get(name, name)
            without_alpha = r is None and name == "lokr_w2"
            state[f"{stem}.{name}"] = part * delta.scale if without_alpha else part
        if delta.magnitude is not None:
            shape = [-1] + [1] * (networks[component].get_parameter(key).ndim - 1)
            whole = delta.magnitude.ndim > 1
            state[f"{stem}.dora_scale"] = delta.magnitude if whole else delta.magnitude.reshape(shape)
        if r is not None:
            state[f"{stem}.alpha"] = torch.tensor(delta.scale * r)
    return state
