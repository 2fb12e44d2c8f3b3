"""Full and read-only disks, and disks inside checkpoints: all that was there is there, and nothing unfinished."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def unshare():
    """Return a command that runs another in a mount namespace of its own, or None where the system allows none."""
    for options in ("-m", "-rm"):
        command = ["unshare", options]
        if shutil.which("unshare") is None:
            break
        test = [*command, "sh", "-c", "mount -t tmpfs none /tmp"]
        if subprocess.run(test, capture_output=True).returncode == 0:
            return command
    return None


@pytest.mark.parametrize("count", [6, pytest.param(30, marks=pytest.mark.fuzz)])
def test_disks_that_are_full_read_only_or_mounted_inside(tmp_path, count):
    """Errors are OSError, or one line and status 1."""
    command = unshare()
    if command is None:
        pytest.skip("the system gives no mount namespaces")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    command += [sys.executable, "-m", "tests.small_disk", str(tmp_path), str(count)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    print(Counter("refused" if refused else "saved" for _, _, refused in answers), answers)
    assert done.returncode == 0, done.stderr + (tmp_path / "err").read_text()
    assert [(case, faults) for case, faults, _ in answers if faults] == []
    assert len(answers) == count
    assert sum(refused for _, _, refused in answers) >= count // 2
