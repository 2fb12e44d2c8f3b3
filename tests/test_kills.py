"""Whatever ends the process at whatever moment, every file is the old or the new one, whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as POSIX does")
SHARES = {"picture": 6, "sheet": 6, "depth": 6, "save_lora_weights": 6, "save_pretrained": 3, "to_folder": 3,
          "to_single_file": 3, "command": 6}  # fmt: skip


@pytest.fixture(scope="module")
def interrupt():
    """Return a function that has work interrupted, in a process that has imported everything."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.killed"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:

        def ask(**question):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            print(question, answer)
            return answer

        yield ask
        process.stdin.close()


def whole(work):
    return pytest.param(work, 100, marks=pytest.mark.fuzz)


@pytest.mark.parametrize(
    ("work", "count"), [case for work, share in SHARES.items() for case in ((work, share), whole(work))]
)
def test_killed_at_any_moment(interrupt, tmp_path, work, count):
    """And the next save leaves nothing unfinished, whatever the kill left."""
    answer = interrupt(work=work, place=str(tmp_path / "place"), count=count, number=signal.SIGKILL)
    assert answer["faults"] == []
    assert answer["statuses"] == {str(-signal.SIGKILL): count}
    assert answer["met"] >= count // 10, "the kills met the writing"


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_command_cleans_up_when_it_is_interrupted(interrupt, tmp_path, name, status, count):
    """Whole files, none unfinished, one line, and the status that shells expect."""
    number = getattr(signal, name)
    answer = interrupt(work="command", place=str(tmp_path / "place"), count=count, number=number)
    assert answer["faults"] == []
    assert answer["statuses"] == {str(status): count}
    word = "interrupted" if name == "SIGINT" else "terminated"
    assert answer["errors"] == {f"depthdiff: {word}\n": count}


def heed_interrupts():
    """Let SIGINT interrupt, as from a terminal; a shell's background jobs ignore it, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.fuzz)])
def test_interrupted_while_it_starts(tmp_path, count):
    """Python itself may end by the signal before it runs anything; then all is one line and status 130."""
    command = [sys.executable, "-m", "depthdiff", "inspect", str(tmp_path)]
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    start = time.perf_counter()
    assert subprocess.run(command, **pipes).returncode == 1
    took, rng, seen = time.perf_counter() - start, random.Random(0), []
    while len(seen) < 8 * count and [status for status, _ in seen].count(130) < count:
        start = time.perf_counter()
        with subprocess.Popen(command, preexec_fn=heed_interrupts, **pipes) as process:
            time.sleep(rng.uniform(0.1, max(0.95 * took, 0.2)))
            process.send_signal(signal.SIGINT)
            error = process.communicate()[1]
        seen.append((process.returncode, error))
        if process.returncode == 1:  # it ended before the signal came; the machine is faster than it was
            took = min(took, time.perf_counter() - start)
    print(seen)
    for status, error in seen:
        assert "Traceback" not in error
        assert status in (130, -signal.SIGINT, 1), "1 where it was done before the signal came"
        assert status != 130 or error == "depthdiff: interrupted\n"
    assert [status for status, _ in seen].count(130) >= count // 2, "the signals met the start"
