"""From files to components: a network is built without memory and filled from memory-mapped weights, strictly.

`assign=True` puts the file's own pages into the network, so that the weights exist once, and are read when first used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from depthdiff.checkpoint.files import read_json
from depthdiff.checkpoint.hub import fetch, naming_the_cache
from depthdiff.checkpoint.weights import check_variant, has_weights, read_weights, suffixes, weight_files
from depthdiff.checks import FLOATS, brief
from depthdiff.config import CheckpointError

DType = torch.dtype | Literal["auto"] | None
EMPTY: Mapping[str, Any] = {}


def load_model(
    cls: type[Any],
    name_or_path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    torch_dtype: DType = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    copy: bool = False,
    overrides: Mapping[str, Any] | None = None,
    **where: Any,
) -> Any:
    """Load a network.

    Args:
        cls: the network's class.
        name_or_path: a folder or a Hub id.
        subfolder: of it.
        torch_dtype: of the weights; float32 if absent, the file's own for "auto".
        variant: of the weight file, such as "fp16".
        use_safetensors: True for these alone, False for pickles alone, None for pickles where there are no others.
        copy: weights into memory of the process's own, rather than map them.
        overrides: settings that replace those of the config.
        **where: as in `fetch`.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the config.
        ValueError: an argument that no file can have.
    """
    check_dtype(torch_dtype)
    check_names(variant, use_safetensors)
    for suffix in suffixes(use_safetensors):
        optional = weight_files(cls.weights_name, variant, suffix)
        folder = fetch(name_or_path, ["config.json"], subfolder=subfolder, optional=optional, **where)
        if has_weights(folder, cls.weights_name, variant, suffix):
            break
    with naming_the_cache(folder):
        config = read_json(folder / "config.json")
        check_class(config, cls.__name__, folder)
        model = build(cls, config, folder / "config.json", overrides or {})
        wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        state = read_weights(cls, folder, variant, wanted, None if dtype == "auto" else dtype, use_safetensors, copy)
    return fill(model, state)


def fill(model: Any, state: Mapping[str, Tensor]) -> Any:
    """Put weights into a network that `build` made, and set it to evaluation mode."""
    model.load_state_dict(state, assign=True)
    return model.eval()


class Unfilled(TorchFunctionMode):
    """Leaves out the drawing of first weights, which on the meta device costs a second and draws nothing."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor of a call of `torch.nn.init` as it is; call anything else."""
        named = named or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else named["tensor"]
        return function(*arguments, **named)


def build(cls: type[Any], config: Mapping[str, Any], source: object, overrides: Mapping[str, Any] = EMPTY) -> Any:
    """Build a network without memory for its weights.

    Args:
        cls: the network's class.
        config: the parsed JSON of its config.
        source: name of where the config is from, for errors.
        overrides: settings that replace those of the config.

    Raises:
        CheckpointError: the config describes no network of this class.
    """
    try:
        with torch.device("meta"), Unfilled():
            return cls._build(config, overrides)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{source} describes no network that can be built: {reason}") from error


def check_dtype(dtype: object) -> None:
    """Refuse a dtype in which no weights can be.

    Raises:
        ValueError: neither a floating-point dtype nor "auto" nor None.
    """
    known = dtype is None or (isinstance(dtype, str) and dtype == "auto")
    if not known and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        found = repr(dtype) if isinstance(dtype, torch.dtype) else brief(dtype)
        raise ValueError(f'torch_dtype must be a floating-point torch dtype, "auto" or None, got {found}')


def check_names(variant: object, use_safetensors: object) -> None:
    """Refuse what cannot be part of a file's name, and a choice of form that is none.

    Raises:
        ValueError: always names the argument.
    """
    check_variant(variant)
    if use_safetensors is not None and not isinstance(use_safetensors, bool):
        raise ValueError(f"use_safetensors must be True, False or None, got {brief(use_safetensors)}")


def check_class(config: Mapping[str, Any], wanted: str, folder: Path) -> None:
    """Refuse a config that says it belongs to another class; old ones say nothing.

    Raises:
        CheckpointError: with both names.
    """
    found = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or [wanted]
    if wanted not in found:
        raise CheckpointError(f"{folder / 'config.json'} describes a {found[0]}, expected a {wanted}")
