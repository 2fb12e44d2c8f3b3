"""The page that lists what is published and what is here."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_its_script_writes():
    command = [sys.executable, "-W", "ignore", "scripts/compatibility.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run scripts/compatibility.py: {done.stdout}{done.stderr}"
