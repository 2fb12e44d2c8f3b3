"""Runs the tests of `on_second_device.py` in a process of their own, whose torch knows a second device."""

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("on_second_device.py")


def test_on_a_second_device():
    """Each in turn; to see more of one, run `pytest tests/on_second_device.py -k ...`."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", FILE]
    done = subprocess.run(command, cwd=FILE.parents[1], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
