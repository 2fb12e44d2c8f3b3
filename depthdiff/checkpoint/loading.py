"""From files to components: a network is built without memory and filled from memory-mapped weights, strictly.

`assign=True` puts the file's own pages into the network, so that the weights exist once, and are read when first used.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.overrides import TorchFunctionMode

from depthdiff.arguments import CONFIGS, HUB, SAVING, SETTINGS, sort_out
from depthdiff.checkpoint.hub import DIFFUSERS_VERSION, HUB_ARGUMENTS, fetch, fetch_config, naming_the_cache, read_json
from depthdiff.checkpoint.ldm import TABLES, Table
from depthdiff.checkpoint.transaction import check_folder
from depthdiff.checkpoint.weights import (
    Source,
    check_variant,
    has_weights,
    open_folder,
    read_tensors,
    suffixes,
    weight_files,
)
from depthdiff.checkpoint.write import write_text
from depthdiff.checks import FLOATS, brief, show
from depthdiff.config import CheckpointError, FrozenDict, constructor_fields, to_plain

if TYPE_CHECKING:
    from typing_extensions import Self

DType = torch.dtype | Literal["auto"] | None
EMPTY: Mapping[str, Any] = {}


@torch.inference_mode(False)  # so that what is loaded in inference mode can be trained later
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
    """Load a network; see `depthdiff.models.base.Network.from_pretrained`.

    `copy` reads weights into memory of the process's own instead of mapping them, and `overrides` are settings that
    replace those of the config; `where` is as in `fetch`.
    """
    torch_dtype = read_dtype(torch_dtype)
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
        name, sources = open_folder(cls, folder, variant, use_safetensors)
        return fill(model, name, sources, TABLES[cls.__name__], torch_dtype, copy)


def fill(
    model: Any, name: str, sources: dict[str, Source], table: Table, torch_dtype: DType, copy: bool = False
) -> Any:
    """Read the weights of a network that `build` made from the file `name`, and set it to evaluation mode."""
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    dtype = torch.float32 if torch_dtype is None else torch_dtype
    state = read_tensors(name, sources, table, wanted, None if isinstance(dtype, str) else dtype, copy)
    model.load_state_dict(state, assign=True)
    return model.eval()


class Unfilled(TorchFunctionMode):
    """Skips the initialisation of weights, which on the meta device takes a second and has no effect."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor of a call of `torch.nn.init` as it is; call anything else."""
        named = named or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else named["tensor"]
        return function(*arguments, **named)


def build(cls: type[Any], config: Mapping[str, Any], source: object, overrides: Mapping[str, Any] = EMPTY) -> Any:
    """Build a network without memory for its weights; `source` is the name of the config, for errors.

    Raises:
        CheckpointError: the config does not describe a network of this class.
    """
    try:
        with torch.device("meta"), Unfilled():
            return cls._build(config, overrides)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{source} does not describe a network that can be built: {reason}") from error


def read_dtype(dtype: object) -> DType:
    """Return a dtype that weights can have, "auto" or None; a dtype may be given by its name, such as "float16"."""
    if dtype is None:
        return None
    if isinstance(dtype, str) and dtype == "auto":
        return "auto"
    for known in FLOATS if isinstance(dtype, (str, torch.dtype)) else ():
        if dtype in (known, str(known), str(known).removeprefix("torch.")):
            return known
    found = repr(dtype) if isinstance(dtype, torch.dtype) else brief(dtype)
    raise ValueError(f'torch_dtype must be a floating-point torch dtype, "auto" or None, got {found}')


def check_names(variant: object, use_safetensors: object) -> None:
    """Refuse a variant that cannot be part of a file's name, and a `use_safetensors` that is not a choice."""
    check_variant(variant)
    if use_safetensors is not None and not isinstance(use_safetensors, bool):
        raise ValueError(f"use_safetensors must be True, False or None, got {brief(use_safetensors)}")


def check_class(config: Mapping[str, Any], wanted: str, folder: Path) -> None:
    """Refuse a config that says it belongs to another class; old ones say nothing."""
    found = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or [wanted]
    if wanted not in found:
        raise CheckpointError(f"{folder / 'config.json'} describes a {found[0]}, expected a {wanted}")


logger = logging.getLogger(__name__)

DEFAULTED = "_use_default_values"
"""The key under which a config lists what was left at its default; never written to a file."""


class ConfigMixin:
    """Base of what is built from a config: its constructor's arguments, kept by `register_to_config`.

    Attributes:
        config_name: name of the config's file.
        CHOICES: argument -> the values that are implemented; others are refused by name.
        COUNTS: arguments that say how many layers there are.
        POSITIVE: arguments that must be above 0.
        UNBOUNDED: arguments that may be infinite.
        ignore_for_config: arguments that the config does not keep.
        DERIVED: items that the constructor adds to the config; those of a file are left out.
    """

    config_name: ClassVar[str] = "config.json"
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    COUNTS: ClassVar[tuple[str, ...]] = ()
    POSITIVE: ClassVar[tuple[str, ...]] = ()
    UNBOUNDED: ClassVar[tuple[str, ...]] = ()
    ignore_for_config: ClassVar[Sequence[str]] = ()
    DERIVED: ClassVar[tuple[str, ...]] = ()
    _internal_dict: FrozenDict

    has_compatibles: ClassVar[bool] = False

    @property
    def config(self) -> FrozenDict:
        """The constructor's arguments, as a dict whose items are attributes."""
        return self._internal_dict

    def register_to_config(self, **kwargs: Any) -> None:
        """Replace the config by one with these items changed or added; what was built before stays as it is."""
        known = vars(self).get("_internal_dict", {})
        object.__setattr__(self, "_internal_dict", FrozenDict({**known, **kwargs}))

    def __getattr__(self, name: str) -> Any:
        return self._from_config(name)

    def _from_config(self, name: str) -> Any:
        """Return an item of the config that is asked for as an attribute of its owner, as diffusers does."""
        config = vars(self).get("_internal_dict", {})
        if name.startswith("_") or name not in config:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        kind = type(self).__name__
        warnings.warn(f"read {kind}.config.{name} instead of {kind}.{name}", FutureWarning, stacklevel=3)
        return config[name]

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Build an object from a config, with random weights where it has any.

        What the config left at its default is not taken over, so that another class keeps its own defaults. Keys of
        other classes are kept in `config`.

        Args:
            config: of this class or another one, the parsed JSON of a config file, or what `load_config` takes.
            return_unused_kwargs: also return what the constructor does not take, of `kwargs` and of the config.
            **kwargs: arguments of the constructor that replace those of the config; with a warning, settings of other
                schedulers.

        Raises:
            CheckpointError: a value that is not implemented, or of a wrong type.
            TypeError: an argument that nobody knows; not with `return_unused_kwargs`.
            ValueError: the config is neither a dict nor a path.
        """
        if isinstance(config, (str, os.PathLike)):
            loaded: Any = cls.load_config(config, True, **kwargs)
            config, kwargs = loaded
        if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
            raise ValueError(f"config must be a config, a dict with texts as keys, or a folder, got {show(config)}")
        defaulted = config.get(DEFAULTED, ())
        if not isinstance(defaulted, (list, tuple)):
            raise CheckpointError(f"{cls.__name__}: {DEFAULTED} must be a list of names, got {show(defaulted)}")
        fields = constructor_fields(cls)
        values = {key: value for key, value in config.items() if key not in (*defaulted, *cls.DERIVED, DEFAULTED)}
        unused = {key: value for key, value in kwargs.items() if key not in fields}
        if not return_unused_kwargs:
            sort_out(cls.from_config, SETTINGS, unused, fields)
        values |= {key: value for key, value in kwargs.items() if key in fields}
        foreign = {key: values.pop(key) for key in list(values) if key not in fields}
        try:
            made = cls(**values)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{cls.__name__}: {error}") from error
        made.register_to_config(**foreign)
        unknown = {key: value for key, value in foreign.items() if not key.startswith("_")}
        if unknown and config.get("_class_name", cls.__name__) == cls.__name__:
            logger.warning("%s ignores %s of its config, and keeps them", cls.__name__, ", ".join(map(repr, unknown)))
        return (made, unused | foreign) if return_unused_kwargs else made

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        *,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any] | tuple[dict[str, Any], dict[str, Any]]:
        """Read the config file of a folder or repository.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id.
            return_unused_kwargs: return what is not for the Hub as well.
            subfolder: of the folder or repository.
            **kwargs: `revision`, `cache_dir`, `token`, `local_files_only` and `force_download` for the Hub; or an
                argument of diffusers in `depthdiff.arguments.HUB`.

        Raises:
            CheckpointError: the file is missing or damaged.
            TypeError: an unknown argument; not with `return_unused_kwargs`.
        """
        known = {*HUB, *CONFIGS, *HUB_ARGUMENTS}
        given = {name: value for name, value in kwargs.items() if name in known or not return_unused_kwargs}
        rest = {name: value for name, value in kwargs.items() if name not in given}
        kwargs = rest | sort_out(cls.load_config, HUB | CONFIGS, given, HUB_ARGUMENTS)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        config = fetch_config(pretrained_model_name_or_path, cls.config_name, subfolder=subfolder, **hub)
        return (config, kwargs) if return_unused_kwargs else config

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **unused: Any) -> None:
        """Write the config file into a folder, which is made where it does not exist.

        Args:
            save_directory: the folder.
            push_to_hub: must be False: nothing is uploaded.
            **unused: arguments of diffusers in `depthdiff.arguments.SAVING`.

        Raises:
            TypeError: an unknown argument.
            ValueError: `push_to_hub` is True.
        """
        sort_out(self.save_config, SAVING, {"push_to_hub": push_to_hub, **unused})
        folder = check_folder("save_directory", save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / self.config_name)

    def to_json_string(self) -> str:
        """Write the config as JSON, sorted, with the class it belongs to."""
        head = {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
        values = {name: to_plain(value) for name, value in self.config.items() if name != DEFAULTED}
        return json.dumps(values | head, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the config to a file."""
        write_text(Path(json_file_path), self.to_json_string())
