"""A folder's files, replaced all or none, while everything else in the folder stays untouched.

New files are written into fresh folders inside the target, one beside the files that they are to replace, so that each
can take its place by a rename on the same file system. When all are on disk, a journal that lists them is written: from
then on the save counts. Killed before that, the old files are whole; killed later, `settle`, which every load and save
of the folder begins with, does the renames that remain.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from depthdiff.checkpoint.write import PREFIX, check_target, flush_folder, fresh_name, hold, keep_mode, write_text
from depthdiff.checks import check_path
from depthdiff.config import CheckpointError

JOURNAL = "journal.json"
MAX_JOURNAL = 2**23
"""Bytes; a journal names the few files of a checkpoint."""


def check_folder(argument: str, folder: Any) -> Path:
    """Return the absolute path of a folder that may not exist yet, or refuse what cannot be one."""
    check_path(argument, folder)
    if not os.fspath(folder):
        raise ValueError(f'{argument} must name a folder, got an empty text; "." is the present one')
    path = Path(os.path.abspath(folder))
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{argument} is a file or in one; name a folder", str(nearest))
    return path


@contextmanager
def replacing(folder: Path, parts: Mapping[str, Sequence[str]]) -> Iterator[Callable[[str], Path]]:
    """Replace the files of a checkpoint, all or none.

    Args:
        folder: of the checkpoint, of `check_folder`; made where it does not exist.
        parts: sub-folders that are written to, "" being the folder itself -> names, or patterns of names, of files that
            the checkpoint consists of: those of an older one that are not written this time are removed.

    Yields:
        A function from the name of a part to the folder into which its new files are to be written.

    Raises:
        OSError: the files cannot be written, or are where folders are needed or vice versa; nothing has changed then.
    """
    made = _make_folders(folder)
    name = fresh_name()
    try:
        settle(folder)
        for part, patterns in parts.items():
            _check_part(folder, part, patterns)
        with _Locks() as locks:
            locks.add(folder)
            _remove_abandoned(folder)
            (folder / name).mkdir()
            holding = _Lock(folder / name)
        try:
            for part in parts:
                made += _make_folders(folder / part)
                (folder / part / name).mkdir(exist_ok=not part)
            yield lambda part: folder / part / name
            for part in parts:
                _flush(folder / part / name)
            with _Locks() as locks:  # from here on there is one journal at a time
                for place in (folder, *sorted(folder / part for part in parts)):
                    locks.add(place)
                    _settle(place, locks)
                journal = {part: _changes(folder / part, name, patterns) for part, patterns in parts.items()}
                write_text(folder / name / JOURNAL, json.dumps(journal))
                _finish(folder, name, journal)
        finally:
            holding.close()
    except BaseException:
        if not (folder / name / JOURNAL).exists():
            for part in sorted(parts, reverse=True):  # the folder's own is the last, by which the others are found
                shutil.rmtree(folder / part / name, ignore_errors=True)
            _remove_folders(made)
        raise


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder and those that it is in; where the block fails, remove those that did not exist."""
    made = _make_folders(folder)
    try:
        yield
    except BaseException:
        _remove_folders(made)
        raise


def settle(folder: Path) -> None:
    """Finish a save of a folder, or of the checkpoint that it is a part of, that was killed after its journal.

    Raises:
        CheckpointError: the journal is damaged, or the folder cannot be written.
    """
    names = _unfinished(folder)
    for root in (folder, folder.parent):
        if any((root / name / JOURNAL).is_file() for name in names):
            try:
                with _Locks() as locks:
                    locks.add(root)
                    _settle(root, locks)
            except CheckpointError:
                raise
            except OSError as error:
                raise CheckpointError(
                    f"{root}: a save was interrupted, and what remains of it cannot be done now: {error}; "
                    "make the folder writable and load it again"
                ) from error


def _settle(root: Path, locks: _Locks) -> None:
    """Finish what journals in a locked folder say."""
    for name in _unfinished(root):
        if (root / name / JOURNAL).is_file():
            journal = _read_journal(root, name)
            for part in sorted(journal):
                locks.add(root / part)
            _finish(root, name, journal)


class _Lock:
    """A folder's lock, released when it is forgotten, too; `works` is whether the file system has such locks.

    It waits for whoever holds it, or raises BlockingIOError if `wait` is False.
    """

    def __init__(self, folder: Path, wait: bool = True) -> None:
        self.descriptor, self.works = -1, False
        if sys.platform != "win32":
            self.descriptor = os.open(folder, os.O_RDONLY)
            self.works = hold(self.descriptor, wait)

    def close(self) -> None:
        """Release it."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close


class _Locks:
    """Locks of folders, in which no other process or thread changes names meanwhile; each is taken once."""

    def __init__(self) -> None:
        self.locks: dict[tuple[int, int], _Lock] = {}

    def __enter__(self) -> _Locks:
        return self

    def __exit__(self, *error: object) -> None:
        for lock in self.locks.values():
            lock.close()

    def add(self, folder: Path) -> None:
        """Wait for a folder."""
        found = folder.stat()
        if (found.st_dev, found.st_ino) not in self.locks:
            self.locks[found.st_dev, found.st_ino] = _Lock(folder)


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those that it is in; return those that did not exist, outermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()][::-1]
    for place in missing:
        place.mkdir(exist_ok=True)
    return missing


def _remove_folders(made: Sequence[Path]) -> None:
    for place in reversed(made):
        with suppress(OSError):  # not empty: somebody else has written there
            place.rmdir()


def _unfinished(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.startswith(PREFIX) and entry.is_dir())


def _remove_abandoned(folder: Path) -> None:
    """Remove what saves left that were killed before their journal; living ones hold their folder's lock.

    A folder that is a part of a checkpoint may hold what a save of the whole has not finished: that holds its own.
    """
    for name in _unfinished(folder):
        whole = folder.parent / name
        held = whole if whole.is_dir() else folder / name
        if (held / JOURNAL).exists():
            continue
        try:
            lock = _Lock(held, wait=False)
        except (BlockingIOError, FileNotFoundError):
            continue  # it lives, or has just ended
        lock.close()
        for place in (*folder.glob(f"*/{name}"), folder / name) if lock.works else ():
            shutil.rmtree(place, ignore_errors=True)


def _check_part(folder: Path, part: str, patterns: Sequence[str]) -> None:
    """Refuse a file where a part is needed, and a folder or a read-only file where one of its files is."""
    place = folder / part
    if os.path.lexists(place) and not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder is needed; move it away", str(place))
    for name in patterns:
        if "?" not in name and place.is_dir():
            check_target(place / name, follow=False)


def _flush(staged: Path) -> None:
    """Flush new files to disk; those of other libraries were not."""
    staged.stat()  # refuses a folder that has been removed meanwhile
    for path in staged.iterdir():
        if not path.is_file():
            message = "a component has saved more than files, which is not supported"
            raise IsADirectoryError(errno.EISDIR, message, str(path))
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _changes(place: Path, name: str, patterns: Sequence[str]) -> dict[str, list[str]]:
    """List a part's new files, and the old ones that they make stale."""
    new = sorted(path.name for path in (place / name).iterdir())
    for one in new:
        if (place / one).is_dir():
            message = "a folder is where a file is to be written; move it away"
            raise IsADirectoryError(errno.EISDIR, message, str(place / one))
    old = sorted(path.name for path in place.iterdir() if any(fnmatchcase(path.name, pattern) for pattern in patterns))
    return {"replace": new, "remove": [one for one in old if one not in new and not (place / one).is_dir()]}


def _finish(folder: Path, name: str, journal: Mapping[str, Any]) -> None:
    """Do what a journal of locked folders says; what was done before an interruption is left alone."""
    for part, changes in journal.items():
        place = folder / part
        for one in changes["replace"]:
            if (place / name / one).exists():
                keep_mode(place / one, place / name / one)
                os.replace(place / name / one, place / one)
        for one in changes["remove"]:
            (place / one).unlink(missing_ok=True)
        flush_folder(place)
    os.unlink(folder / name / JOURNAL)
    for part in sorted(journal, reverse=True):
        shutil.rmtree(folder / part / name, ignore_errors=True)


def _read_journal(folder: Path, name: str) -> dict[str, dict[str, list[str]]]:
    """Read a journal, and refuse one that is not ours.

    It may change files in the folder and in folders in it, and in one that a link leads to only if the save has left
    its own folder there.
    """
    path = folder / name / JOURNAL
    try:
        with path.open("rb") as file:
            journal = json.loads(file.read(MAX_JOURNAL))
        good = isinstance(journal, dict) and all(not part or _is_plain(part) for part in journal)
    except (ValueError, RecursionError):
        good = False
    for part, changes in journal.items() if good else ():
        staged = folder / part / name
        good = good and staged.is_dir() and not staged.is_symlink()
        good = good and isinstance(changes, dict) and changes.keys() == {"replace", "remove"}
        lists = changes.values() if good else ()
        good = good and all(isinstance(names, list) and all(map(_is_plain, names)) for names in lists)
    if not good:
        raise CheckpointError(f"{path} is damaged or leads out of its folder; delete {name} there")
    return journal


def _is_plain(name: object) -> bool:
    """Return whether a name is that of something in a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
