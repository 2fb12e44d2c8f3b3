"""From a Hub id to a folder of the cache, and every way in which that can fail, in words.

Downloading, resuming, caching and the environment variables HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT are the business of
huggingface_hub.
"""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from depthdiff.config import CheckpointError

TRANSPORT: type[BaseException] = HfHubHTTPError.__mro__[1]
"""The base of the errors of the HTTP library beneath huggingface_hub; which library that is depends on its version."""

NOT_UNDERSTOOD = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)
"""What huggingface_hub raises where an answer is not what it expects, UnicodeDecodeError and the like included."""

MOVED = {"stabilityai/stable-diffusion-2-depth": "sd2-community/stable-diffusion-2-depth"}
"""Repositories that are gone, and where their files are now; the original was removed in November 2025."""

STATUS = {
    401: "log in with `hf auth login`, or pass token=...",
    403: "your token may not read it",
    429: "that was too often, wait some minutes",
}
"""What to do about an answer."""


def download(repo_id: str, **options: Any) -> Path:
    """Download files of a repository into the cache; `options` are those of huggingface_hub's `snapshot_download`.

    With `force_download` a damaged entry of the cache is made again.

    Returns:
        The folder of the cache in which the files are.

    Raises:
        CheckpointError: no such repository or revision, no leave to read it, no way to reach it, or an answer that no
            Hub gives.
    """
    entry = cache_entry(repo_id, options)
    if options.get("force_download") and not options.get("local_files_only"):
        _remove_what_no_file_replaces(entry)
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
        raise CheckpointError(_explain(repo_id, error, entry)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        remedy = STATUS.get(status, "try again later") if isinstance(status, int) else "try again later"
        raise CheckpointError(f"{repo_id}: the Hub answered {status}; {remedy}") from error
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{repo_id}: the cache is damaged: {error.strerror}, {error.filename}; {healed(entry)}"
        ) from error
    except NOT_UNDERSTOOD as error:
        raise CheckpointError(
            f"{repo_id}: the answer of the Hub cannot be understood ({type(error).__name__}); is there a proxy or a "
            f"login page in between? If this goes on, {healed(entry)}"
        ) from error
    except (OSError, TRANSPORT) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            message = f"{repo_id}: the cache {entry.parent} cannot be written: {error.strerror}; pass another cache_dir"
            raise CheckpointError(message) from error
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(
            f"{repo_id}: the download broke off ({reason}); files that are whole are kept, so run it again to go on"
        ) from error


def cache_entry(repo_id: str, options: Mapping[str, Any]) -> Path:
    """Return where the cache keeps a repository."""
    cache = options.get("cache_dir") or constants.HF_HUB_CACHE
    return Path(cache) / repo_folder_name(repo_id=repo_id, repo_type="model")


def healed(entry: Path) -> str:
    """Say how a damaged entry of the cache is made whole again."""
    return f"pass force_download=True, or delete {entry}"


def _remove_what_no_file_replaces(entry: Path) -> None:
    """Remove folders and links that are in the place of downloaded files, which a download cannot replace."""
    for blob in entry.glob("blobs/*"):
        if blob.is_dir() and not blob.is_symlink():
            shutil.rmtree(blob)
    for path in entry.glob("snapshots/*/**/*"):
        if path.is_symlink() and not path.is_file():
            path.unlink()
        elif path.is_dir() and path.suffix and not any(path.iterdir()):
            path.rmdir()


def _download_moved(repo_id: str, first: Exception, options: dict[str, Any]) -> Path:
    """Fall back on the mirror where the original answers 404, or where only the mirror is in the cache."""
    mirror = MOVED[repo_id]
    try:
        path = download(mirror, **options)
    except CheckpointError as error:
        reason = _explain(repo_id, first, cache_entry(repo_id, options))
        raise CheckpointError(f"{reason}; its mirror fails as well: {error}") from first
    warnings.warn(f"{repo_id} cannot be had; its mirror {mirror} is used instead", stacklevel=2)
    return path


def _explain(repo_id: str, error: Exception, entry: Path) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} is no folder here, and the Hub has no such repository, or none that your token may read"
    start = f"{repo_id} is no folder here, is not in the cache"
    whole = f"; if what is in {entry} is not whole, {healed(entry)}" if entry.exists() else ""
    if isinstance(error.__cause__, FileMetadataError):
        return f"{start}, and the answer of the Hub says too little of a file; is there a proxy in between?{whole}"
    status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
    if isinstance(status, int):
        return f"{start}, and the Hub answered {status}; {STATUS.get(status, 'try again later')}"
    return f"{start}, and the Hub cannot be reached; is the network off?{whole}"
