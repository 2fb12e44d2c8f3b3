"""Runs the tests of `on_second_device.py` in a process of their own, whose torch knows a second device."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_apart(file):
    """Run the tests of a file; where one fails, show what it shows. For more, run `pytest FILE -k ...` by hand."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


def test_on_a_second_device():
    run_apart(Path(__file__).with_name("on_second_device.py"))
