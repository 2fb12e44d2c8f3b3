"""`python -m depthdiff`, the same as the command `depthdiff`."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from types import FrameType


def leave(signum: int, frame: FrameType | None) -> None:
    """End the process at once: while there is nothing to lose, and libraries that are being imported may be in the way.

    A KeyboardInterrupt within an import can be lost, or come out as another error.
    """
    if sys.stderr is not None:
        os.write(2, b"depthdiff: interrupted\n")
    os._exit(130)


def main() -> int:
    """Run the command; return its exit status.

    What is imported stays until the end: looking through it for garbage meanwhile took 0.2 of 1.3 seconds.
    """
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)  # until the command's work begins, and when all is written
    gc.disable()
    try:
        from depthdiff.cli import main as command

        gc.freeze()
    finally:
        gc.enable()
    return command()


if __name__ == "__main__":
    sys.exit(main())
