"""Checks of arguments. Each error names the argument, what it must be, and what came.

Numbers and truth values of numpy and torch count as such where they have no dimensions; what is checked is returned as
Python's own, so that nothing behind the door meets the others.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Generator, Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes that networks compute in."""

MAX_NAME = 255
"""Bytes of a file's name in the file systems in use."""


def show(value: object) -> str:
    """Describe a wrong value in few words: its type, and what it is where that is short."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of {value.ndim} dimensions"
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of {value.ndim} dimensions"
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"{kind} of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > 40:
        return f"{kind} {value[:40]!r}..."
    return f"{kind} {value!r}" if isinstance(value, (int, float, complex, str, np.generic)) else kind


def brief(value: object) -> str:
    """Describe a wrong choice: as it is written where that is short, else as `show` does."""
    short = isinstance(value, (str, bool, float, type(None))) or (isinstance(value, int) and abs(value) < 1e18)
    return repr(value) if short and not (isinstance(value, str) and len(value) > 40) else show(value)


def nearest(name: object, known: Iterable[str]) -> str:
    """Suggest a known name for an unknown one: `; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def is_dense(x: Tensor) -> bool:
    """Return whether a tensor holds its numbers one by one: not meta, sparse, nested or quantised."""
    return not (x.is_meta or x.layout != torch.strided or x.is_nested or x.is_quantized)


def plain(value: Any) -> Any:
    """Turn a real number or truth value of numpy or torch of no dimension into Python's; return the rest as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 and is_dense(value) and not value.is_complex() else value
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 and value.dtype.kind in "buif":
        return float(value) if value.dtype.kind == "f" else value.item()
    return value


@overload
def check_number(name: str, value: object, low: float = ..., high: float = ..., *, whole: Literal[True]) -> int: ...
@overload
def check_number(name: str, value: object, low: float = ..., high: float = ..., *, whole: bool = ...) -> Any: ...
def check_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, whole: bool = False
) -> Any:
    """Return a finite number (or whole number) from `low` to `high` as Python's own.

    Args:
        name: of the argument.
        value: a number of Python, or one of numpy or torch without dimensions.
        low: the least.
        high: the largest.
        whole: whether it must be an int.

    Raises:
        TypeError: not a number.
        ValueError: out of range, or not finite.
    """
    number = plain(value)
    kinds = (int,) if whole else (int, float)
    if isinstance(number, bool) or not isinstance(number, kinds):
        raise TypeError(f"{name} must be {'an int' if whole else 'a number'}, got {show(value)}")
    if not low <= number <= high or (not whole and not abs(number) <= 1e308):
        least, largest = (f"{int(end)}" if whole and math.isfinite(end) else f"{end:g}" for end in (low, high))
        if low == -math.inf and high == math.inf:
            limits = "finite"
        else:
            limits = f"at least {least}" if high == math.inf else f"in [{least}, {largest}]"
        found = show(number) if isinstance(number, int) and number.bit_length() > 1000 else repr(number)
        raise ValueError(f"{name} must be {limits}, got {found}")
    return number


def check_flag(name: str, value: object) -> bool:
    """Return a truth value as Python's own.

    Raises:
        TypeError: neither True nor False.
    """
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {show(value)}")
    return flag


def check_text(name: str, value: object) -> None:
    """Refuse what is neither a text nor None.

    Raises:
        TypeError: something else.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a text or None, got {show(value)}")


def check_path(name: str, value: object) -> None:
    """Refuse what cannot be the name of a file, a folder or a repository.

    Raises:
        TypeError: neither a text nor a path.
        ValueError: a name that no file system can hold.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path or a name, got {show(value)}")
    if any(letter == "\0" or "\ud800" <= letter <= "\udc7f" or "\udd00" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{name} must be a name that a file can have, got {show(text)}")
    if any(len(os.fsencode(part)) > MAX_NAME for part in PurePath(text).parts):
        raise ValueError(f"{name} must have names of at most {MAX_NAME} bytes, got {show(text)}; shorten it")


def check_tensor(name: str, value: object, form: str, ndim: int | None = None) -> Tensor:
    """Return a tensor of floating-point numbers that can be computed with.

    Args:
        name: of the argument.
        value: the tensor.
        form: what its dimensions are, such as "(B, L, C)".
        ndim: how many these are; None takes any.

    Raises:
        TypeError: no tensor, or one that does not hold its numbers one by one.
        ValueError: another dtype or number of dimensions, or empty.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {form}, got {show(value)}")
    check_dense(name, value)
    if value.dtype not in FLOATS or (ndim is not None and value.ndim != ndim) or not value.numel():
        raise ValueError(f"{name} must be a float tensor {form}, got {value.dtype} of shape {tuple(value.shape)}")
    return value


def check_dense(name: str, x: Tensor) -> None:
    """Refuse a tensor whose numbers are not there one by one.

    Raises:
        TypeError: meta, sparse, nested or quantised.
    """
    if not is_dense(x):
        if x.is_meta:
            found = "one on the meta device, which holds no numbers; load it onto a device"
        elif x.is_quantized:
            found = "a quantised one; pass its .dequantize()"
        elif x.is_nested:
            found = "a nested one; pass its parts one at a time"
        else:
            found = "a sparse one; pass its .to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {found}")


def check_device(name: str, value: object) -> torch.device:
    """Return a device that exists on this machine.

    Raises:
        TypeError: no device.
        ValueError: unknown, not here, or "meta", on which nothing can be computed.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{name} must be a device such as 'cpu' or 'cuda:0', got {show(value)}")
    try:
        device = torch.device(value)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be a device such as 'cpu' or 'cuda:0', got {show(value)}") from error
    if device.type == "meta":
        raise ValueError(f"{name} must be a device that computes, got meta, where weights would be lost")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:  # what torch's backends say of absence
        reason = re.split(r"[.\n] ", str(error))[0][:100]
        raise ValueError(f"{name} must be one that exists here, got {device}: {reason}") from error
    return device


def read_device_map(device_map: object) -> torch.device | None:
    """Return the device that a `device_map` of diffusers or accelerate names; None for None.

    Args:
        device_map: a device, or the number of a CUDA device; "auto", "balanced", "balanced_low_0" or "sequential" for
            the fastest one here; or a dict all of whose values are one device.

    Raises:
        TypeError: not a device.
        ValueError: several devices, or one that is not here.
    """
    if device_map is None:
        return None
    if isinstance(device_map, Mapping):
        devices = list({str(device): device for device in device_map.values()}.values())
        if len(devices) != 1:
            raise ValueError(f"device_map must name one device, which holds all weights, got {len(devices)}")
        [device_map] = devices
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device(best_device())
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        device_map = f"cuda:{device_map}"
    return check_device("device_map", device_map)


def best_device() -> str:
    """Name the fastest device that torch has here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_generators(name: str, value: object) -> None:
    """Refuse what is neither a generator, nor some of them, nor None.

    Raises:
        TypeError: something else.
    """
    if value is None or isinstance(value, Generator):
        return
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, Generator) for one in value):
        raise TypeError(f"{name} must be a torch.Generator or a list of them, got {type(value).__name__}")


def check_names(name: str, value: object) -> list[str]:
    """Return one name or several as a list.

    Raises:
        TypeError: something that is not made of texts.
    """
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (Sequence, set, frozenset, Mapping)) or not all(isinstance(one, str) for one in names):
        raise TypeError(f"{name} must be a text or a list of texts, got {show(value)}")
    return list(names)


def refuse_values(owner: str, **values: tuple[Any, ...]) -> None:
    """Refuse arguments that are not implemented: name -> (given, the values that are implemented...).

    Raises:
        ValueError: names the argument, what it was given, and what is implemented.
    """
    for name, (given, *known) in values.items():
        if given not in known:
            raise ValueError(f"{owner}: {name} must be {' or '.join(map(repr, known))}, got {brief(given)}")
