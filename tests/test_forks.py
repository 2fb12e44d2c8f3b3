"""A process forked after a call: it is refused before it would wait for ever, or it works."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU OpenMP and fork are Linux's")

PROGRAM = """
import os, sys, threading, torch
from PIL import Image
from random_checkpoint import build_pipeline

how = sys.argv[1]
torch.set_num_threads(2)
pipe = build_pipeline("tiny")
pipe.set_progress_bar_config(disable=True)

def call():
    pipe("a toy", Image.new("RGB", (64, 64)), num_inference_steps=2)

if how != "never called before":
    call()
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
if how == "one thread":
    torch.set_num_threads(1)
try:
    if how == "another thread":
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
except ValueError as error:
    print(error, flush=True)
    os._exit(3)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [("as it was", 3), ("one thread", 0), ("another thread", 0), ("never called before", 0)],
)
def test_a_forked_process_is_refused_or_works(how, status):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), *sys.path])
    work = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        text, _ = work.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(work.pid, signal.SIGKILL)
        raise
    assert work.returncode == status, text
    if status:
        assert "spawn" in text and "torch.set_num_threads(1)" in text
