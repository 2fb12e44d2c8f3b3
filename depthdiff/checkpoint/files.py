"""Reading the small files of a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from depthdiff.config import CheckpointError

DIFFUSERS_VERSION = "0.42.1"
"""Whose layout is written; their loader wants to read some version."""

MAX_JSON = 2**23
"""Bytes; the largest JSON file of a checkpoint, `tokenizer.json`, has 4 million."""

MAX_PARTS = 100_000
"""Lists and objects in a JSON file: in memory each takes some 100 bytes, in the file as few as 3."""


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; is the file missing or damaged?") from error
    if len(content) > MAX_JSON:
        raise CheckpointError(f"{path} has {size:,} bytes, at most {MAX_JSON:,} of JSON are read; is the file damaged?")
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git-LFS pointer; run `git lfs pull` in that folder")
    if content.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{path} cannot be read: it is a web page saved under this name; download the file itself"
        )
    return parse_json(content, path)


def parse_json(content: bytes, path: Path, part: str = "") -> dict[str, Any]:
    """Parse a JSON object in which no name stands twice.

    Args:
        content: to parse.
        path: of the file, for errors.
        part: of the file, for errors.

    Raises:
        CheckpointError: damaged, or something else.
    """
    name = f"{path}: its {part}" if part else str(path)
    if content.count(b"[") + content.count(b"{") > MAX_PARTS:
        raise CheckpointError(f"{name} cannot be read: it has more than {MAX_PARTS:,} parts; is the file damaged?")
    try:
        values = json.loads(content, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise CheckpointError(f"{name} cannot be read: it is nested too deeply; is the file damaged?") from error
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be read: {error}; is the file missing or damaged?") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} must hold a JSON object, got {type(values).__name__}; is the file damaged?")
    return values


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{repeated[:80]!r} stands twice in one object")
    return values
