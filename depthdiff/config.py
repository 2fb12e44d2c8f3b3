"""Configs and outputs: the small frozen records that every component shares.

A `Config` holds what a checkpoint fixes about one component, under the names of the published `config.json`; what the
caller chooses (steps, guidance, seeds) never enters it. An `Output` is what a network or scheduler hands back.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from typing_extensions import Self


MAX_COUNT = 1000
"""Layers that a config may ask for in one place; the deepest published network of these kinds has 48."""

MAX_LENGTH = 100_000
"""Items of a list in a config; the longest are schedulers' `trained_betas`."""


class CheckpointError(OSError, ValueError):
    """A file, folder or config of a checkpoint is missing, damaged or of a kind that this package does not have."""


@dataclass(frozen=True)
class Config(Mapping[str, Any]):
    """Base of the configs: a frozen dataclass that can also be read like a dict, as diffusers' configs can.

    Subclasses list their fields with the published defaults. `CHOICES` names the values that this package implements;
    a config file that asks for another one is refused by name instead of being built wrongly. It may also name keys
    that are no fields, for features whose mere presence matters. `COUNTS` names the fields that say how many layers
    there are: a damaged file must not have a network built without end.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    COUNTS: ClassVar[tuple[str, ...]] = ()

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
        for key, choices in cls.CHOICES.items():
            given = values.get(key, getattr(cls, key, choices[0]))
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if value not in choices:
                    known = ", ".join(repr(choice) for choice in choices)
                    raise CheckpointError(f"{cls.__name__}: {key} is {value!r}; implemented here: {known}")
        annotations = get_type_hints(cls)
        known_values = {}
        for field in dataclasses.fields(cls):
            if field.name in values:
                value = _freeze(values[field.name])
                if not _is_a(value, annotations[field.name]):
                    raise CheckpointError(f"{cls.__name__}: {field.name} must be {field.type}, got {value!r}")
                _check_size(f"{cls.__name__}: {field.name}", value, is_count=field.name in cls.COUNTS)
                known_values[field.name] = value
        try:
            return cls(**known_values)
        except (ValueError, ArithmeticError) as error:
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


def _check_size(name: str, value: Any, *, is_count: bool) -> None:
    """Refuse more layers, or longer lists, than any network has, and NaN, which fits no comparison."""
    if isinstance(value, tuple):
        if len(value) > MAX_LENGTH:
            raise CheckpointError(
                f"{name} must have at most {MAX_LENGTH} items, got {len(value)}; is the file damaged?"
            )
        for item in value:
            _check_size(name, item, is_count=is_count)
    elif value != value or (is_count and isinstance(value, int) and value > MAX_COUNT):
        raise CheckpointError(f"{name} must be a number up to {MAX_COUNT}, got {str(value)[:40]}; is the file damaged?")


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    return value


def _is_a(value: Any, annotation: Any) -> bool:
    """Tell whether a JSON value fits a field's annotation; an int fits float, a bool fits only bool."""
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
