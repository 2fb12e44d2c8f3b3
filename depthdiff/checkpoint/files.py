"""Reading and writing the small files of a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from depthdiff.config import CheckpointError

DIFFUSERS_VERSION = "0.42.1"
"""Whose layout is written; their loader wants to read some version."""


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; is the file missing or damaged?") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}; is the file damaged?")
    return values


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
