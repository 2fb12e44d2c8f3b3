"""The four networks, one file each; those of diffusion are imported when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

FILES = {"AutoencoderKL": "vae", "AutoencoderTiny": "autoencoder_tiny", "UNet2DConditionModel": "unet"}
"""Class -> its file."""


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FILES})
