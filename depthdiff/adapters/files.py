"""From a name to the tensors of an adapter, without running anything that a file contains."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from depthdiff.checkpoint.files import read_json
from depthdiff.checkpoint.hub import fetch
from depthdiff.config import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_CONFIG = "adapter_config.json"


def find_file(
    name_or_path: str | os.PathLike[str],
    defaults: Sequence[str],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    proxies: None = None,
    **where: Any,
) -> Path:
    """Find an adapter's file.

    Args:
        name_or_path: the file, a folder, or a Hub id.
        defaults: names to look for where `weight_name` is absent.
        weight_name: of the file in the folder or repository.
        subfolder: of the folder or repository.
        use_safetensors: whether pickles are refused.
        proxies: must be None.
        **where: as in `depthdiff.checkpoint.hub.fetch`.

    Raises:
        CheckpointError: there is no such file, or there are several to choose from.
        ValueError: `proxies` is given.
    """
    if proxies is not None:
        raise ValueError("proxies must be None: set the environment variable HTTPS_PROXY")
    path = choose_file(name_or_path, defaults, weight_name, subfolder, where)
    if use_safetensors and path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no .safetensors file, which use_safetensors=True asks for")
    return path


def choose_file(
    name_or_path: str | os.PathLike[str],
    defaults: Sequence[str],
    weight_name: str | None,
    subfolder: str | None,
    where: Mapping[str, Any],
) -> Path:
    """Find the file that is named, or the first default there is, or the only file of weights in a folder."""
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    wanted = [weight_name] if weight_name is not None else list(defaults)
    folder = fetch(name_or_path, (), optional=[*wanted, ADAPTER_CONFIG], subfolder=subfolder, **where)
    for name in wanted:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", *PICKLES))
    if weight_name is None and len(others) == 1:
        return others[0]
    found = ", ".join(path.name for path in others) or "no weights"
    raise CheckpointError(f"{name_or_path} has no {' or '.join(wanted)}, found {found}; name one as weight_name=...")


def read_file(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read a file of tensors.

    Returns:
        What it holds (a dict by key; of a pickle maybe a bare tensor), and the adapter's settings that come with it.

    Raises:
        CheckpointError: damaged, of an unknown kind, or a pickle that holds more than tensors.
    """
    if path.suffix in PICKLES:
        try:
            return torch.load(path, map_location="cpu", weights_only=True), sidecar(path)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} cannot be read as a pickle of tensors alone: {reason}") from error
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors or one of {', '.join(PICKLES)}")
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; is the download complete?") from error
    return state, sidecar(path) | header_settings(path, header)


def sidecar(path: Path) -> dict[str, Any]:
    """Read PEFT's settings, which lie beside the weights."""
    config = path.with_name(ADAPTER_CONFIG)
    return {"": read_json(config)} if path.stem.startswith("adapter_model") and config.is_file() else {}


def header_settings(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Read PEFT's settings from where diffusers puts them: component -> settings."""
    text = header.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        flat = json.loads(text)
        pairs = [(key.split(".", 1), value) for key, value in flat.items()]
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its lora_adapter_metadata cannot be read: {error}") from error
    settings: dict[str, Any] = {}
    for parts, value in pairs:
        if len(parts) == 2:
            settings.setdefault(parts[0], {})[parts[1]] = value
    return settings
