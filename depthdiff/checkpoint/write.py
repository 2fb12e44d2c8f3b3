"""One file, written whole or not at all; every file that this package writes goes through here.

The bytes go to a fresh name in the same folder, are flushed to disk, and take the file's place by a rename. Whatever
interrupts this (an error, a full disk, a kill) leaves what was there. What a kill left unfinished, the next file that
is written into that folder removes: an unfinished file or folder whose writer lives is locked.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":  # there, nothing waits for another process, and what a kill left stays
    import fcntl

from depthdiff.config import CheckpointError

PREFIX = ".depthdiff-"
"""How the names of unfinished files and folders begin; the rest is random."""

UNFINISHED = re.compile(re.escape(PREFIX) + "[0-9a-f]{16}")


def fresh_name() -> str:
    """Return a name that nothing else has, short enough for every file system."""
    return f"{PREFIX}{secrets.token_hex(8)}"


def check_target(path: str | os.PathLike[str], *, follow: bool = True) -> Path:
    """Return the absolute path of a file to write, or refuse the place.

    With `follow` it is the file that a link leads to; else the link itself is replaced.

    Raises:
        ValueError: an empty path.
        OSError: the folder does not exist, or the path is a folder, a device or a file that is read-only.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError("the path of a file to write must not be empty")
    target = Path(os.path.realpath(text)) if follow else Path(os.path.abspath(text))
    try:
        kind = os.lstat(target).st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            message = "the folder to write to does not exist; make it first"
            raise FileNotFoundError(errno.ENOENT, message, str(target.parent)) from None
        return target
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "the file to write is a folder; name a file in it", str(path))
    if stat.S_ISLNK(kind) and not follow:
        return target
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "the file to write is a device, a pipe or a broken link; name a file", str(path))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file to write is read-only; make it writable", str(path))
    return target


def try_to_write(folder: Path, needed: int = 0) -> None:
    """Make and remove a file, to know before long work that `needed` bytes can be written into a folder.

    Raises:
        OSError: a file cannot be made there, or there is not enough room.
    """
    with _fresh_file(folder):
        pass
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"there is room for {free:,} bytes, and up to {needed:,} are to be written; free some"
        raise OSError(errno.ENOSPC, message, str(folder))


@contextmanager
def writing(path: str | os.PathLike[str], *, follow: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing; when the block ends without an error, it replaces the old file and keeps its mode.

    Raises:
        ValueError: see `check_target`.
        OSError: likewise, or the file cannot be written.
    """
    target = check_target(path, follow=follow)
    remove_abandoned_files(target.parent)
    with _fresh_file(target.parent) as partial:
        with partial.open("r+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        keep_mode(target, partial)
        os.replace(partial, target)
    flush_folder(target.parent)


def write_file(path: str | os.PathLike[str], content: bytes, *, follow: bool = True) -> None:
    """Write a file whole or not at all; arguments and errors as in `writing`."""
    with writing(path, follow=follow) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a small file of a checkpoint whole or not at all, as UTF-8; a link of its name is replaced."""
    write_file(path, text.encode(), follow=False)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where system and file system can."""
    if os.name == "posix":
        with suppress(OSError):  # the names are right; a file system that cannot flush them has its own way
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def hold(descriptor: int, wait: bool = True) -> bool:
    """Lock an open file or folder until its descriptor is closed; return whether the file system has such locks.

    Raises:
        BlockingIOError: another holds it and `wait` is False.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EBADF):
            return False
        raise
    return True


def remove_abandoned_files(folder: Path) -> None:
    """Remove the unfinished files in a folder whose writers were killed, where the file system can tell."""
    if sys.platform == "win32":
        return
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if UNFINISHED.fullmatch(entry.name)]
    for name in names:
        with suppress(OSError):  # its writer lives, or has just finished, or is another user
            descriptor = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode) and hold(descriptor, wait=False):
                    os.unlink(folder / name)
            finally:
                os.close(descriptor)


@contextmanager
def _fresh_file(folder: Path) -> Iterator[Path]:
    """Make an empty file, locked where the system can, and remove it in the end if it still has this name."""
    while True:
        partial, holding = folder / fresh_name(), None
        try:  # before it is made, since a signal may raise at any moment
            holding = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            if sys.platform == "win32":  # which renames no open file
                os.close(holding)
                holding = None
            if holding is None or _is_ours(holding):
                yield partial
                return
        finally:
            with suppress(OSError):  # it has its own name; or the first error is the one to know
                os.unlink(partial)
            if holding is not None:
                os.close(holding)


def _is_ours(descriptor: int) -> bool:
    """Lock a new file; return False if another process has taken it for abandoned in the moment before."""
    try:
        hold(descriptor, wait=False)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0


def check_plain_name(argument: str, name: object) -> None:
    """Refuse a file name that could lead out of its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set('/\\\0:*?"<>|'):
        raise ValueError(f"{argument} must be the name of a file, without a folder, got {name!r}")


def files_below(place: Path) -> list[Path]:
    """List the files in a folder, and in those that links in it lead to; of a file, the file."""
    if place.is_file():
        return [place]
    files, seen = [], set()
    for root, folders, names in os.walk(place, followlinks=True):
        found = os.stat(root)
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()  # a link that leads back
            continue
        seen.add((found.st_dev, found.st_ino))
        files += [path for name in names if (path := Path(root, name)).is_file()]
    return files


def refuse_same_file(target: Path, sources: Iterable[Path]) -> None:
    """Refuse to write over one of the files that are read, however either is spelt or linked."""
    for source in sources if target.exists() else ():
        if os.path.samefile(source, target):
            raise CheckpointError(f"{target} is {source}, which is read and would be lost; name another file to write")


def keep_mode(old: Path, new: Path) -> None:
    """Give a new file the permissions of the one that it replaces."""
    if old.is_file():
        mode = stat.S_IMODE(old.stat().st_mode)
        if mode != stat.S_IMODE(new.stat().st_mode):
            os.chmod(new, mode)
