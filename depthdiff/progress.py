"""Check the arguments of tqdm's progress bars early; tqdm itself fails in the middle of the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm.std import tqdm

from depthdiff.checks import check_number, nearest, plain, show

TEXTS = ("desc", "unit", "bar_format", "colour")
FLAGS = ("leave", "disable", "unit_scale", "dynamic_ncols", "write_bytes", "gui", "display", "ascii")
NUMBERS = ("total", "ncols", "nrows", "mininterval", "maxinterval", "miniters", "smoothing", "initial", "position",
           "unit_divisor", "delay", "unit_scale")  # fmt: skip
WHOLE = ("ncols", "nrows", "position")
OTHERS = ("file", "postfix", "lock_args", "ascii")
KNOWN = dict.fromkeys((*TEXTS, *FLAGS, *NUMBERS, *OTHERS))
"""Arguments of tqdm's bars, in a console and in a notebook, but for what is counted."""


def check_bar(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a progress bar that would fail when one is drawn.

    Raises:
        TypeError: tqdm has no such argument, or not of this type.
        ValueError: a number out of range, or a format that tqdm cannot fill.
    """
    for name, value in settings.items():
        if name not in KNOWN:
            raise TypeError(f"set_progress_bar_config got an unknown argument {name!r}{nearest(name, KNOWN)}")
        if value is None or _fits(name, value):
            continue
        if name not in NUMBERS:
            kinds = [kind for kind, names in (("a text", TEXTS), ("True or False", FLAGS)) if name in names]
            raise TypeError(f"{name} must be {' or '.join(kinds) or 'what tqdm takes'}, got {show(value)}")
        check_number(name, value, 0, 2**31, whole=name in WHOLE)
    form = settings.get("bar_format")
    if form is not None:
        try:
            tqdm.format_meter(1, 2, 1.0, bar_format=form)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"bar_format must be a format that tqdm can fill, got {show(form)}: {error}") from error


def _fits(name: str, value: Any) -> bool:
    """Return whether a setting that is not a number has a type that tqdm takes."""
    if name in TEXTS or (name == "ascii" and isinstance(value, str)):
        return isinstance(value, str) and (name != "ascii" or len(value) > 1)
    if name in FLAGS and isinstance(plain(value), bool):
        return True
    if name == "file":
        return hasattr(value, "write") and hasattr(value, "flush")
    return isinstance(value, {"postfix": Mapping, "lock_args": tuple}.get(name, ()))
