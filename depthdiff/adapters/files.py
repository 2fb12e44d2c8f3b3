"""From a name to the tensors of an adapter, without running anything that a file contains."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from depthdiff.checkpoint.hub import fetch, parse_json, read_json
from depthdiff.checkpoint.weights import read_header, read_tensors_anyhow
from depthdiff.config import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_CONFIG = "adapter_config.json"

MAX_TENSORS = 20_000
"""Of an adapter; one that changes every layer of Stable Diffusion 2 in three tensors each has 5,000."""

MAX_HEADER = 2**24
"""Bytes; trainers write the words of their captions into the header."""


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
        return read_tensors_anyhow(path, MAX_TENSORS), sidecar(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors or one of {', '.join(PICKLES)}")
    entries, header = read_header(path, MAX_HEADER)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} has {len(entries):,} tensors, at most {MAX_TENSORS:,} are read; is it an adapter?"
        )
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key).clone() for key in entries}
    except (SafetensorError, OSError) as error:
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
    flat = parse_json(text.encode("utf-8", "surrogatepass"), path, "lora_adapter_metadata")
    pairs = [(key.split(".", 1), value) for key, value in flat.items()]
    settings: dict[str, Any] = {}
    for parts, value in pairs:
        if len(parts) == 2:
            settings.setdefault(parts[0], {})[parts[1]] = value
    return settings
