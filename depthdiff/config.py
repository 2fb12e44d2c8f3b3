"""Configs and outputs: the small frozen records that every component shares.

A `Config` holds what a checkpoint fixes about one component, under the names of the published `config.json`; what the
caller chooses (steps, guidance, seeds) never enters it. An `Output` is what a network or scheduler hands back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from depthdiff.checks import is_dense, plain, show

if TYPE_CHECKING:
    from typing_extensions import Self


MAX_COUNT = 1000
"""Layers that a config may ask for in one place; the deepest published network of these kinds has 48."""

MAX_LENGTH = 100_000
"""Items of a list in a config; the longest are schedulers' `trained_betas`."""

MAX_SIZE = 2**19
"""Whole numbers in a config; the largest published ones are sizes of vocabularies, of some 250,000."""


class CheckpointError(OSError, ValueError):
    """A file, folder or config of a checkpoint is missing, damaged or of a kind that this package does not have."""


@dataclass(frozen=True)
class Config(Mapping[str, Any]):
    """Base of the configs: a frozen dataclass that can also be read like a dict, as diffusers' configs can.

    Subclasses list their fields with the published defaults. `CHOICES` names the values that this package implements;
    a config file that asks for another one is refused by name instead of being built wrongly. It may also name keys
    that are no fields, for features whose mere presence matters. `COUNTS` names the fields that say how many layers
    there are: a damaged file must not have a network built without end. `POSITIVE` names those that must be above 0.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range, or one that this package does not implement.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    COUNTS: ClassVar[tuple[str, ...]] = ()
    POSITIVE: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, annotation in _annotations(type(self)).items():
            value = _freeze(getattr(self, name))
            if not _is_a(value, annotation):
                [written] = (field.type for field in dataclasses.fields(self) if field.name == name)
                raise TypeError(f"{name} must be {written}, got {_brief(value)}")
            _check_size(name, value, is_count=name in self.COUNTS, positive=name in self.POSITIVE)
            if name in self.CHOICES:
                _check_choice(name, value, self.CHOICES[name])
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the config from a parsed JSON object; keys that are no fields are ignored.

        Args:
            values: the parsed `config.json`; lists become tuples.

        Raises:
            CheckpointError: a value has the wrong type, or is one that this package does not implement.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{cls.__name__}: expected a JSON object, got {type(values).__name__}")
        try:
            for key, choices in cls.CHOICES.items():
                _check_choice(key, values.get(key, getattr(cls, key, choices[0])), choices)
            return cls(**{name: values[name] for name in _annotations(cls) if name in values})
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{cls.__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict, ready for `json.dump` (tuples are written as lists)."""
        return {name: _thaw(value) for name, value in self.items()}

    def __getitem__(self, key: str) -> Any:
        if key not in type(self).__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(field.name for field in dataclasses.fields(self))

    def __len__(self) -> int:
        return len(dataclasses.fields(self))


class Output:
    """Base of the output records: fields by name, by position (`out[0]`) and by key (`out["sample"]`).

    Subclasses are dataclasses. Positions count the fields that are not None, as in diffusers and transformers.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in order."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def keys(self) -> list[str]:
        """Return the names of the fields that are not None, so that `f(**out)` passes them on."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]  # type: ignore[arg-type]

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@functools.cache
def _annotations(cls: type[Config]) -> dict[str, Any]:
    """List the fields of a config with their types."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check_choice(name: str, given: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value, or one of several, that is not implemented."""
    for value in given if isinstance(given, (list, tuple)) else [given]:
        if not isinstance(value, (str, int, float, type(None))) or value not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{name} is {_brief(value)}; implemented here: {known}")


def _check_size(name: str, value: Any, *, is_count: bool, positive: bool) -> None:
    """Refuse more layers, or longer lists, than any network has, and numbers that are not finite."""
    if isinstance(value, tuple):
        if len(value) > MAX_LENGTH:
            raise ValueError(f"{name} must have at most {MAX_LENGTH} items, got {len(value)}; is the file damaged?")
        for item in value:
            _check_size(name, item, is_count=is_count, positive=positive)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}; is the file damaged?")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        largest = MAX_COUNT if is_count else MAX_SIZE if isinstance(value, int) else math.inf
        if not -largest <= value <= largest:
            raise ValueError(f"{name} must be a number up to {largest}, got {_brief(value)}; is the file damaged?")
        if positive and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _brief(value: Any) -> str:
    """Write a value of a config, as far as it is short."""
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if len(value) > 8 else f"[{', '.join(map(_brief, value))}]"
    return repr(value)[:60] if isinstance(value, (str, float, bool, type(None))) else show(value).removeprefix("int ")


def _freeze(value: Any) -> Any:
    """Turn lists and arrays of numbers into tuples, and numbers of numpy and torch into Python's."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "buif":
        return tuple(map(plain, value))
    if isinstance(value, Tensor) and value.ndim == 1 and is_dense(value) and not value.is_complex():
        return tuple(value.tolist())
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    return plain(value)


def _thaw(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    return value


def _is_a(value: Any, annotation: Any) -> bool:
    """Return whether a value fits a field's annotation; an int fits float, a bool fits only bool."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is_a(value, option) for option in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    if origin is not None:  # a mapping, for instance: its content is its owner's to check
        return isinstance(value, origin)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)
