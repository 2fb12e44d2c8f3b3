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
from pathlib import Path, PurePosixPath
from typing import Any

from depthdiff.checkpoint.files import read_json
from depthdiff.checkpoint.write import PREFIX, check_target, flush_folder, fresh_name, hold, write_text
from depthdiff.checks import check_path
from depthdiff.config import CheckpointError

JOURNAL = "journal.json"


def check_folder(argument: str, folder: Any) -> Path:
    """Return the absolute path of a folder that may not exist yet, or refuse what cannot be one.

    Raises:
        TypeError: not a path.
        ValueError: an empty path, or one that no file system can hold.
        NotADirectoryError: it, or what it would be in, is a file.
    """
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
        OSError: a file is where a folder is needed or the other way round, or the files cannot be written. Nothing has
            changed then.
    """
    made = _make_folders(folder)
    name = fresh_name()
    committed = False
    try:
        settle(folder)
        for part, patterns in parts.items():
            _check_part(folder, part, patterns)
        with locked(folder):
            _remove_abandoned(folder)
            (folder / name).mkdir()
            holding = _hold(folder / name)
        try:
            for part in parts:
                made += _make_folders(folder / part)
                (folder / part / name).mkdir(exist_ok=not part)
            yield lambda part: folder / part / name
            journal = {part: _changes(folder / part, name, patterns) for part, patterns in parts.items()}
            write_text(folder / name / JOURNAL, json.dumps(journal))
            committed = True
            _finish(folder, name, journal)
        finally:
            if holding is not None:
                os.close(holding)
    except BaseException:
        if not committed:
            for part in parts:
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
    for name in _unfinished(folder):
        for root in (folder, folder.parent):
            path = root / name / JOURNAL
            if path.is_file():
                journal = read_json(path)
                _check_journal(root, name, journal)
                try:
                    _finish(root, name, journal)
                except OSError as error:
                    raise CheckpointError(
                        f"{root}: a save was interrupted, and what remains of it cannot be done now: {error}; "
                        "make the folder writable and load it again"
                    ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread changes the names in a folder, where the file system can tell."""
    descriptor = _hold(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _hold(folder: Path, wait: bool = True) -> int | None:
    """Lock a folder until the returned descriptor is closed; errors as in `hold`, None where there are no locks."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        held = hold(descriptor, wait)
    except BaseException:
        os.close(descriptor)
        raise
    if held:
        return descriptor
    os.close(descriptor)
    return None


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
            descriptor = _hold(held, wait=False)
        except (BlockingIOError, FileNotFoundError):
            continue  # it lives, or has just ended
        if descriptor is not None:
            os.close(descriptor)
            for place in (*folder.glob(f"*/{name}"), folder / name):
                shutil.rmtree(place, ignore_errors=True)


def _check_part(folder: Path, part: str, patterns: Sequence[str]) -> None:
    """Refuse a file in the place of a part, and a folder or a read-only file in that of one of its files."""
    place = folder / part
    if os.path.lexists(place) and not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder is needed; move it away", str(place))
    for name in patterns:
        if "?" not in name and place.is_dir():
            check_target(place / name, follow=False)


def _changes(place: Path, name: str, patterns: Sequence[str]) -> dict[str, list[str]]:
    """List what a part's new files are, flushed to disk, and which old files they make stale."""
    staged = place / name
    staged.stat()  # refuses a folder that has been removed meanwhile
    new = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if not path.is_dir())
    for one in new:
        if (place / one).is_dir():
            message = "a folder is where a file is to be written; move it away"
            raise IsADirectoryError(errno.EISDIR, message, str(place / one))
        descriptor = os.open(staged / one, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    old = sorted(path.name for path in place.iterdir() if any(fnmatchcase(path.name, pattern) for pattern in patterns))
    return {"replace": new, "remove": [one for one in old if one not in new and not (place / one).is_dir()]}


def _finish(folder: Path, name: str, journal: Mapping[str, Any]) -> None:
    """Do what a journal says; what was done before an interruption is left alone."""
    with locked(folder):
        if not (folder / name / JOURNAL).is_file():
            return  # another process was faster
        for part, changes in journal.items():
            place = folder / part
            for one in changes["replace"]:
                if (place / name / one).exists():
                    (place / one).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(place / name / one, place / one)
            for one in changes["remove"]:
                (place / one).unlink(missing_ok=True)
            flush_folder(place)
        for part in journal:
            if part:
                shutil.rmtree(folder / part / name, ignore_errors=True)
        os.unlink(folder / name / JOURNAL)
        shutil.rmtree(folder / name, ignore_errors=True)


def _check_journal(folder: Path, name: str, journal: Mapping[str, Any]) -> None:
    """Refuse a journal that is none of ours: it must stay inside the folder, and links are not followed."""
    good = all(_is_inside(part) or not part for part in journal)
    for part, changes in journal.items() if good else ():
        places = (folder / name, folder / part, folder / part / name)
        good = good and not any(place.is_symlink() for place in places if place != folder)
        good = good and isinstance(changes, Mapping) and changes.keys() == {"replace", "remove"}
        lists = changes.values() if good else ()
        good = good and all(isinstance(names, list) and all(map(_is_inside, names)) for names in lists)
        good = good and all("/" not in one for one in changes["remove"])
    if not good:
        raise CheckpointError(f"{folder / name / JOURNAL} is damaged or leads out of its folder; delete {name} there")


def _is_inside(name: object) -> bool:
    """Return whether a name leads to something inside the folder that it is relative to."""
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]
