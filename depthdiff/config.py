"""Configs and outputs: the records that every component shares.

A config holds what a checkpoint fixes about one component, under the names of the published `config.json`, and never
the caller's choices (steps, guidance, seeds). A `BaseOutput` is the result of a network or scheduler.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, ParamSpec, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from depthdiff.checks import is_dense, nearest, plain, show

if TYPE_CHECKING:
    from typing_extensions import Self


P = ParamSpec("P")

MAX_COUNT = 1000  # layers in one place; the deepest published network of these kinds has 48
MAX_LENGTH = 100_000  # items of a list; the longest are schedulers' `trained_betas`
MAX_SIZE = 2**19  # integers; the largest published ones are sizes of vocabularies, of some 250,000


class CheckpointError(OSError, ValueError):
    """A file, folder or config of a checkpoint is missing, damaged or of a kind that this package does not support."""


class FrozenDict(dict[str, Any]):
    """A config: a dict whose items can also be read as attributes, and from which nothing can be removed.

    An assignment changes item and attribute together, but not what was built from the config before.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"del, clear, pop, popitem, setdefault and update are not available on a {type(self).__name__}; "
            "call register_to_config on its owner"
        )

    __delattr__ = __delitem__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


class Config(FrozenDict):
    """Base of the configs of transformers' components: a dataclass that is also a dict.

    Subclasses list their fields with the published defaults. `CHOICES` names the values that this package implements,
    of fields and of other keys of a config file, which is refused if it asks for another one. `COUNTS` names the fields
    that are numbers of layers, which a damaged file must not make huge. `POSITIVE` names those that must be above 0.
    `model_type` is transformers' name of the kind.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range, or one that this package does not implement.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    COUNTS: ClassVar[tuple[str, ...]] = ()
    POSITIVE: ClassVar[tuple[str, ...]] = ()
    model_type: ClassVar[str] = ""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # a field's default, an attribute of the class, would hide the item
        dict.__setitem__(self, name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __post_init__(self) -> None:
        values = {name: self[name] for name in _fields(type(self))}
        for name, value in check_values(type(self), _fields(type(self)), values).items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the config from a parsed `config.json`, lists as tuples; keys that are not fields are kept.

        Raises:
            CheckpointError: a value has the wrong type, or is not implemented.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{cls.__name__}: expected a JSON object, got {type(values).__name__}")
        fields = _fields(cls)
        try:
            for key, choices in cls.CHOICES.items():
                check_choice(key, values.get(key, getattr(cls, key, choices[0])), choices)
            config = cls(**{name: values[name] for name in fields if name in values})
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{cls.__name__}: {error}") from error
        for name in values.keys() - fields.keys() - IDENTITY:
            dict.__setitem__(config, name, values[name])
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the items as a plain dict, ready for `json.dump` (tuples become lists)."""
        return {name: to_plain(value) for name, value in self.items()}


IDENTITY = {"_class_name", "_diffusers_version", "_name_or_path", "architectures", "model_type", "transformers_version"}
"""Keys of a config file that name its class, and are rewritten."""


def _rebuild(cls: type[Config], values: dict[str, Any]) -> Config:
    config = cls(**{name: values[name] for name in _fields(cls)})
    for name in values.keys() - _fields(cls).keys():
        dict.__setitem__(config, name, values[name])
    return config


class BaseOutput(dict[str, Any]):
    """Base of the output records: dicts whose items are also attributes (`out.sample`) and positions (`out[0]`).

    Subclasses are dataclasses. Items and positions are the fields that are not None; iterating yields their names.
    A record can also be made of one dict of its items, as code that maps over dicts does.
    """

    def __init_subclass__(cls) -> None:
        torch.utils._pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        first = getattr(self, names[0])
        if type(first) is dict and all(getattr(self, name) is None for name in names[1:]):
            if unknown := first.keys() - set(names):
                given = ", ".join(sorted(map(str, unknown)))
                raise TypeError(f"{type(self).__name__} has {', '.join(names)}, got {given}")
            for name in names:
                object.__setattr__(self, name, first.get(name))
        for name in names:
            self._keep(name, getattr(self, name))

    def _keep(self, name: str, value: Any) -> None:
        if value is not None:
            dict.__setitem__(self, name, value)
        elif name in self:
            dict.__delitem__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            self._keep(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __getitem__(self, key: int | slice | str) -> Any:
        return dict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in order."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return tuple(dict.__getitem__(self, field.name) for field in fields if field.name in self)

    def __reduce__(self) -> tuple[Any, ...]:
        values = tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return type(self), values


def constructor_fields(cls: type) -> dict[str, Any]:
    """List the arguments of a class's constructor with their types: name -> annotation."""
    return _arguments(inspect.unwrap(cls.__init__))  # type: ignore[misc]


@functools.cache
def _arguments(init: Callable[..., None]) -> dict[str, Any]:
    hints = get_type_hints(init)
    return {name: hints.get(name, Any) for name in list(inspect.signature(init).parameters)[1:]}


def check_values(owner: type, fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config with lists as tuples, or refuse them by `owner`'s CHOICES, COUNTS and POSITIVE."""
    checked: dict[str, Any] = {}
    for name, annotation in fields.items():
        value = _freeze(values[name])
        if not _is_a(value, annotation):
            raise TypeError(f"{name} must be {_written(annotation)}, got {_brief(value)}")
        if name not in getattr(owner, "UNBOUNDED", ()):
            _check_size(name, value, is_count=name in owner.COUNTS, positive=name in owner.POSITIVE)  # type: ignore[attr-defined]
        if name in owner.CHOICES:  # type: ignore[attr-defined]
            check_choice(name, value, owner.CHOICES[name])  # type: ignore[attr-defined]
        checked[name] = value
    return checked


def register_to_config(init: Callable[P, None]) -> Callable[P, None]:
    """Make a constructor keep its arguments, checked and with lists as tuples, as the object's `config`.

    Names that begin with an underscore, such as `_class_name`, are kept in the config and not passed on; those in the
    class's `ignore_for_config` are passed on and not kept.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def registering(*args: P.args, **kwargs: P.kwargs) -> None:
        self: Any = args[0]
        private = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_")}
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = [name for name in kwargs if name not in signature.parameters]
            hint = nearest(unknown[0], list(signature.parameters)[1:]) if unknown else ""
            raise TypeError(f"{type(self).__name__}: {error}{hint}") from None
        given = set(list(bound.arguments)[1:])
        bound.apply_defaults()
        values = {name: bound.arguments[name] for name in list(signature.parameters)[1:]}
        values = check_values(type(self), _arguments(init), values)
        kept = {name: value for name, value in values.items() if name not in self.ignore_for_config}
        defaulted = [name for name in kept if name not in given]
        config = FrozenDict(kept | {"_use_default_values": defaulted} | private)
        object.__setattr__(self, "_internal_dict", config)
        init(self, **values)

    return registering


def _written(annotation: Any) -> str:
    """Write a type as the source code does."""
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


@functools.cache
def _fields(cls: type[Config]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def check_choice(name: str, given: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value, or one of several, that is not implemented."""
    for value in given if isinstance(given, (list, tuple)) else [given]:
        if not isinstance(value, (str, int, float, type(None))) or value not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{name} is {_brief(value)}; implemented here: {known}")


def _check_size(name: str, value: Any, *, is_count: bool, positive: bool) -> None:
    """Refuse more layers and longer lists than any network has, and numbers that are not finite."""
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
    """Write a value of a config in few words."""
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if len(value) > 8 else f"[{', '.join(map(_brief, value))}]"
    return repr(value)[:60] if isinstance(value, (str, float, bool, type(None))) else show(value).removeprefix("int ")


def _freeze(value: Any) -> Any:
    """Convert lists and arrays of numbers to tuples, and numbers of numpy and torch to Python's."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "buif":
        return tuple(map(plain, value))
    if isinstance(value, Tensor) and value.ndim == 1 and is_dense(value) and not value.is_complex():
        return tuple(value.tolist())
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    return plain(value)


def to_plain(value: Any) -> Any:
    """Return a value of a config as JSON has it: tuples as lists, configs as dicts."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
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
    if origin is not None:  # such as a mapping, whose content its owner checks
        return isinstance(value, origin)
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    return isinstance(value, annotation)
