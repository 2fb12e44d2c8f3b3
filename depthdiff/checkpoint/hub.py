"""From a name to files: a folder is used as it is, a Hub id is downloaded, only as far as it is needed.

The bundled model goes by the name "mini".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthdiff.checkpoint.files import read_json
from depthdiff.checkpoint.transaction import settle
from depthdiff.checks import check_path, check_places
from depthdiff.config import CheckpointError

Name = str | os.PathLike[str]

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
BUNDLED = "mini"
"""The name of the small model that comes with the package; a folder of that name is reached as "./mini"."""


def bundled() -> Path:
    """Find the bundled model: inside the installed package, or beside it in its repository."""
    package = Path(__file__).parent.parent
    places = [root / "weights" / BUNDLED for root in (package, package.parent)]
    for place in places:
        if place.is_dir():
            return place
    raise CheckpointError(f"this installation lacks the bundled model, expected at {places[0]}; reinstall depthdiff")


def fetch(
    name_or_path: Name,
    filenames: Sequence[str],
    *,
    subfolder: str | None = None,
    optional: Sequence[str] = (),
    revision: str | None = None,
    cache_dir: Name | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Find the folder that holds some files, and download those that are missing.

    Args:
        name_or_path: a folder, a Hub id such as "owner/name", or "mini".
        filenames: that must be there.
        subfolder: of the folder or repository in which they are.
        optional: files, or patterns with `*`, that may be there.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are stored; huggingface_hub's own cache if absent.
        token: for gated repositories.
        local_files_only: never ask the network.
        force_download: ignore the cache.

    Returns:
        The local folder, `subfolder` included.

    Raises:
        TypeError: an argument of a wrong type.
        CheckpointError: neither folder nor repository, not reachable, or a file is missing.
    """
    check_path("the model's name", name_or_path)
    check_places(
        subfolder=subfolder,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    steps = re.split(r"[/\\]", subfolder.rstrip("/")) if subfolder else []
    if subfolder and (subfolder.startswith("/") or {"..", ""} & set(steps)):
        raise CheckpointError(f"subfolder must name a folder inside of {name_or_path}, got {subfolder!r}")
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):  # else it would stand in the error of a header
        raise CheckpointError("token holds a space, a line break or another character that no token has")
    root = bundled() if name_or_path == BUNDLED else Path(name_or_path)
    if not str(name_or_path) or not root.is_dir():
        _refuse_paths(name_or_path)
        prefix = f"{subfolder}/" if subfolder else ""
        from depthdiff.checkpoint.download import download  # deferred: what it needs takes 0.2 s to import

        root = download(
            str(name_or_path),
            allow_patterns=[prefix + name for name in (*filenames, *optional)],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    else:
        settle(root)
        if subfolder and (root / subfolder).is_dir():
            settle(root / subfolder)
    folder = root / subfolder if subfolder else root
    missing = [name for name in filenames if not (folder / name).is_file()]
    if missing:
        place = f"{name_or_path}/{subfolder}" if subfolder else name_or_path
        raise CheckpointError(f"{place} has no {', '.join(missing)}; is it a checkpoint in the layout of diffusers?")
    return folder


def commit_of(folder: Path) -> str | None:
    """Tell which commit of a repository a folder of the cache holds; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) else None


@contextmanager
def naming_the_cache(folder: Path) -> Iterator[None]:
    """Let errors about files in the cache of the Hub say how its entry is made whole again."""
    entry = next((p.parent.parent for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    try:
        yield
    except CheckpointError as error:
        if entry is None or not entry.name.startswith("models--") or "force_download" in str(error):
            raise
        message = f"{error}. If the cache is damaged, pass force_download=True, or delete {entry}"
        raise CheckpointError(message) from error


def fetch_config(name_or_path: Name, filename: str, **where: Any) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; `where` is as in `fetch`, and so are the errors."""
    return read_json(fetch(name_or_path, [filename], **where) / filename)


def _refuse_paths(name: Name) -> None:
    """Tell a mistyped path, or a file, from a Hub id."""
    text = str(name)
    if Path(text).is_file():
        raise CheckpointError(
            f"{text} is a file, expected a folder in the layout of diffusers or a Hub id; from_single_file loads files"
        )
    if text.startswith((".", "~", os.sep)) or text.count("/") > 1 or "\\" in text or not text.strip():
        raise CheckpointError(f"{text!r} is no folder, and no Hub id either, which reads owner/name")
    if not HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text[:80]!r} is no folder, and no Hub id either: these hold letters, digits and -_.")
