"""Noise schedules and solvers, one family a file; the classes are imported when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

FILES = {"DDIMScheduler": "ddim", "LMSDiscreteScheduler": "lms", "PNDMScheduler": "pndm"}
"""Class -> its file."""


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FILES})
