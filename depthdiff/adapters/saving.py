"""Writing LoRA: in the layout of diffusers where that can hold it, else in that of kohya and LyCORIS."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.adapters.deltas import Delta, rank
from depthdiff.adapters.lora import Lora
from depthdiff.adapters.names import COMPONENTS, KOHYA, split_key
from depthdiff.checkpoint.save import tensor_entry, write_safetensors
from depthdiff.checkpoint.transaction import check_folder, making
from depthdiff.checkpoint.write import check_plain_name

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_PARTS = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}


def prefixed(layers: nn.Module | Mapping[str, Tensor] | None, component: str) -> dict[str, Tensor]:
    """Convert LoRA layers of one network, under published names, to diffusers' present keys.

    Args:
        layers: a module or tensors by name: `X.lora_A.weight`, or an older spelling of it.
        component: "unet" or "text_encoder".

    Raises:
        ValueError: a key that is no LoRA's.
    """
    state = layers.state_dict() if isinstance(layers, nn.Module) else layers or {}
    result = {}
    for key, tensor in state.items():
        cut = split_key(key)
        if cut is None or cut[1] not in ("down", "up"):
            raise ValueError(f"{component}_lora_layers must hold keys such as '...to_q.lora_A.weight', got {key!r}")
        layer = cut[0].removeprefix("base_model.model.").removeprefix(f"{component}.")
        result[f"{component}.{layer}.lora_{'A' if cut[1] == 'down' else 'B'}.weight"] = tensor
    return result


def write_layers(
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    weight_name: str | None = None,
    save_function: Callable[..., Any] | None = None,
) -> Path:
    """Write tensors whole or not at all, into a folder that is made where it does not exist.

    Raises:
        TypeError: the folder is not a path.
        ValueError: there is nothing to write, a tensor that no file can hold, or a name that is not one of a file.
        OSError: the file cannot be written.
    """
    if not state:
        raise ValueError("there are no LoRA layers to save; pass unet_lora_layers or text_encoder_lora_layers")
    place = check_folder("save_directory", folder)
    name = LORA_FILE if weight_name is None else weight_name
    check_plain_name("weight_name", name)
    if save_function is None and not name.endswith(".safetensors"):
        raise ValueError(f"weight_name must end in .safetensors, got {name!r}: pickles are not written")
    entries = [tensor_entry(key, tensor) for key, tensor in state.items()]
    with making(place):
        if save_function is None:
            write_safetensors(place / name, entries)
        else:
            copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
            save_function(copies, str(place / name))
    return place / name


def lora_state(lora: Lora, networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Write an adapter as tensors by name.

    Plain LoRA gets diffusers' keys, with alpha multiplied into the upper matrix; all else kohya's, which diffusers does
    not read, but everybody else does.
    """
    state = {}
    plain = all(is_plain(delta) for deltas in lora.deltas.values() for delta in deltas.values())
    for component in COMPONENTS:
        for key, delta in lora.deltas.get(component, {}).items():
            layer, _, leaf = key.rpartition(".")
            if plain:
                state[f"{component}.{layer}.lora_A.weight"] = delta.parts["down"]
                up = delta.parts["up"]
                state[f"{component}.{layer}.lora_B.weight"] = up if delta.scale == 1 else (up * delta.scale)
                continue
            stem = KOHYA[component][0] + layer.replace(".", "_")
            if leaf == "bias":
                state[f"{stem}.diff_b"] = delta.parts["diff"]
                continue
            r = rank(delta.method, delta.parts)
            for name, part in delta.parts.items():
                whole = r is None and name == "lokr_w2"  # which has no alpha
                state[f"{stem}.{KOHYA_PARTS.get(name, name)}"] = part * delta.scale if whole else part
            if delta.magnitude is not None:
                shape = [-1] + [1] * (networks[component].get_parameter(key).ndim - 1)
                whole = delta.magnitude.ndim > 1
                state[f"{stem}.dora_scale"] = delta.magnitude if whole else delta.magnitude.reshape(shape)
            if r is not None:
                state[f"{stem}.alpha"] = torch.tensor(delta.scale * r)
    return state


def is_plain(delta: Delta) -> bool:
    """Return whether diffusers has a place for this change: LoRA without core and magnitude."""
    return delta.method == "LoRA" and "mid" not in delta.parts and delta.magnitude is None
