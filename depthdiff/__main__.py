"""`python -m depthdiff`, the same as the command `depthdiff`."""

from __future__ import annotations

import gc
import sys

import numpy  # noqa: F401  # before torch, which would import it and lose an interrupt meanwhile


def main() -> int:
    """Run the command; return its exit status.

    What is imported stays until the end: looking through it for garbage meanwhile took 0.2 of 1.3 seconds.
    """
    gc.disable()
    try:
        from depthdiff.cli import main as command

        gc.freeze()
    finally:
        gc.enable()
    return command()


if __name__ == "__main__":
    sys.exit(main())
