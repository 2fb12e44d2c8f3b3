"""Who raised an error: a `raise` of this package, or something inside of it."""

import ast
import functools
import traceback
from pathlib import Path

import depthdiff

ROOT = Path(depthdiff.__file__).parent
KINDS = (ValueError, TypeError, FloatingPointError, OSError)
"""Of errors, CheckpointError being two of them."""


@functools.cache
def raises(path):
    """List the lines of a file on which a `raise` begins."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return frozenset(node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise))


def judge(error):
    """Say in which way an error is unclear; None where this package raises it itself, and it is of a kind promised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    frame, line = frames[-1]
    path = frame.f_code.co_filename
    if ROOT in Path(path).parents and line in raises(path):
        return None if isinstance(error, KINDS) else f"raises a {type(error).__name__} at {Path(path).name}:{line}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return None  # the system's own word on a file, which names it
    ours = [
        (frame.f_code.co_filename, line) for frame, line in frames if ROOT in Path(frame.f_code.co_filename).parents
    ]
    place = f"{Path(ours[-1][0]).name}:{ours[-1][1]}" if ours else "nowhere"
    return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:90]}"
