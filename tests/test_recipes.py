"""The page of recipes: its commands are understood, and its pictures are there."""

import re
import shlex
from pathlib import Path

import pytest

from depthdiff.options import read_options

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_there_are_commands():
    assert len(COMMANDS) > 12 and all(words[0] == "depthdiff" for words in COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[-1])
def test_a_command_is_understood(words):
    if words[1] != "redo":  # whose options are of its own; tests/test_redo.py
        options = read_options(words[1:])
        assert options.image is not None or options.depth is not None


def test_sheets_and_links_exist():
    for name in re.findall(r"<!-- sheet ([\w-]+):", PAGE):
        assert f"](recipes/{name}.png)" in PAGE
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
