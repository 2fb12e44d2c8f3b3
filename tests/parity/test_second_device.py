"""Runs the tests of `on_second_device.py` in a process of their own, whose torch knows a second device."""

from pathlib import Path

from tests.test_second_device import run_apart


def test_on_a_second_device():
    run_apart(Path(__file__).with_name("on_second_device.py"))
