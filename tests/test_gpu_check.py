"""`scripts/gpu_check.sh` on machines that are pretended: what it tries, leaves out, keeps and says."""

import os
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU's timeout")
ROOT = Path(__file__).parents[1]
SMI = """#!/bin/sh
[ "$1" = -L ] && echo "GPU 0: Pretend (UUID: GPU-0)" || echo "Pretend, 80000 MiB, 570.1"
"""
SEES_A_GPU = """
import sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch.cuda":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.is_available = lambda: True
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""
TORCH = """
__version__ = "0.0"
class version:
    cuda = "0.0"
class cuda:
    is_available = staticmethod(lambda: True)
"""
TESTS = """
import time
import pytest
pytestmark = pytest.mark.gpu
def test_first(): pass
def test_second(): pass
def test_compiled_first(): pass
def test_compiled_second(): time.sleep({sleep})
"""
PARTS = ["Tests", "Parity", "Eager", "Captured", "Compiled", "Tests of compiled networks"]


@pytest.fixture
def environment(tmp_path):
    """Environment of a machine with a GPU and no network."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI, encoding="utf-8")
    smi.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "CI")}
    path = f"{smi.parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def bare(folder, *hidden):
    """Make a Python whose packages are this one's without some of them, and with a torch that sees a GPU."""
    venv.EnvBuilder(symlinks=True).create(folder)
    [site] = folder.glob("lib/python*/site-packages")
    for path in map(Path, sys.path):
        if path.name in ("site-packages", "dist-packages"):
            for entry in path.iterdir():
                name = entry.name.partition("-")[0].lower()
                if name not in hidden and entry.suffix != ".pth" and not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)
    (site / "sitecustomize.py").write_text(SEES_A_GPU, encoding="utf-8")
    return str(folder / "bin" / "python")


@pytest.fixture
def tree(tmp_path):
    """The repository as a plain folder, without `.git`."""
    folder = tmp_path / "tree"
    for name in ("depthdiff", "scripts", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def stand_in(tmp_path):
    """The script alone, with torch, diffusers, tests and benchmark of which there is only what it asks for."""

    def make(sleep=0):
        folder = tmp_path / "stand_in"
        for name in ("scripts", "tests/fast", "tests/parity"):
            (folder / name).mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "gpu_check.sh", folder / "scripts")
        files = {
            "torch.py": TORCH,
            "diffusers.py": "StableDiffusionDepth2ImgPipeline = None\n",
            "scripts/benchmark.py": 'import sys\nprint("| benchmark |", *sys.argv[1:])\n',
            "tests/fast/test_gpu.py": TESTS.format(sleep=sleep),
            "tests/test_pipeline.py": "",
            "tests/parity/test_gpu.py": TESTS.format(sleep=0),
            "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["gpu", "full"]\n',
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return make


def check(tree, environment, *arguments):
    """Run the script; return its status, its report, or what it says where there is none."""
    command = ["bash", tree / "scripts" / "gpu_check.sh", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    report = tree / "out" / "gpu.md"
    return done.returncode, report.read_text(encoding="utf-8") if report.exists() else done.stderr


def headings(report):
    return [line[3:] for line in report.splitlines() if line.startswith("## ")]


def test_a_bare_machine(tree, environment, tmp_path):
    """Without diffusers, scipy, peft, accelerate and pip the GPU tests run; they pass only where there is a GPU."""
    environment["PYTHON"] = bare(tmp_path / "python", "diffusers", "scipy", "peft", "accelerate", "pip")
    status, report = check(tree, environment)
    assert status == (0 if torch.cuda.is_available() else 1), report
    assert headings(report) == [PARTS[0], "Parity and timings", PARTS[-1]]
    assert "Left out, as diffusers cannot be imported: ModuleNotFoundError: No module named 'diffusers'" in report
    assert "error" not in report.lower().split("## parity")[0].split("= failures =")[0], "of collection"
    for test in ("fast/test_gpu.py::test_captured_equals_plain[dtype0]", "test_pipeline.py::test_on_a_gpu[to]"):
        assert f"tests/{test} PASSED" in report or f"tests/{test} FAILED" in report
    compiled = report.split("## Tests of compiled networks")[1]
    assert compiled.count("fast/test_gpu.py::test_compiled_is_close_to_plain") >= 4
    assert "torch " + torch.__version__ in report and "Pretend, 80000 MiB" in report and "commit unknown, 20" in report


def test_everything_is_tried_where_everything_is_there(stand_in, environment):
    status, report = check(stand_in(), environment)
    assert (status, headings(report)) == (0, PARTS)
    assert report.count(" PASSED ") == 2 + 2 + 4
    assert report.count("| benchmark | --geometry full") == 3


def test_a_part_that_runs_out_of_time(stand_in, environment):
    """Keeps what came before, says so, and lets the next part run."""
    tree = stand_in()
    parity = tree / "tests" / "parity" / "test_gpu.py"
    parity.write_text(TESTS.format(sleep=60), encoding="utf-8")
    status, report = check(tree, environment, 60, 3)
    assert (status, headings(report)) == (1, PARTS)
    stopped = report.split("## Parity")[1].split("## Eager")[0]
    assert "test_compiled_first PASSED" in stopped and "Stopped after 3 s." in stopped
    assert "test_compiled_second PASSED" not in stopped
    assert "test_compiled_second PASSED" in report.split("## Tests of compiled networks")[1]


def test_parts_for_which_no_time_is_left(stand_in, environment):
    status, report = check(stand_in(), environment, 0)
    assert (status, headings(report)) == (1, PARTS)
    assert report.count("Left out: no time was left.") == len(PARTS)


def test_results_are_there_before_the_end(stand_in, environment):
    """And stay when the script is stopped, which ends what it started."""
    tree = stand_in(sleep=600)
    script = subprocess.Popen(["bash", tree / "scripts" / "gpu_check.sh"], env=environment, stderr=subprocess.DEVNULL)
    report, end = tree / "out" / "gpu.md", time.monotonic() + 60
    while not (report.exists() and report.read_text(encoding="utf-8").count("test_compiled_first PASSED") == 2):
        assert time.monotonic() < end, "no result came"
        time.sleep(0.1)
    script.send_signal(signal.SIGTERM)
    assert script.wait(60) == 1
    text = report.read_text(encoding="utf-8")
    assert headings(text) == PARTS
    assert "Stopped from outside after" in text and text.count("```") % 2 == 0


def test_what_is_missing_is_said_in_one_line(stand_in, environment, tmp_path):
    environment["PYTHON"] = bare(tmp_path / "python", "safetensors")
    status, said = check(stand_in(), environment)
    assert status == 2
    assert said == "gpu_check: missing: safetensors; install it, or put its wheel into .whl/\n"
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    status, said = check(tmp_path / "stand_in", environment)
    assert (status, said.count("\n")) == (2, 1) and "no NVIDIA GPU here" in said


def test_wheels_are_installed_where_their_package_is_missing(stand_in, environment, tmp_path):
    """And for the run alone; those of packages that are there are left."""
    pytest.importorskip("pip")
    tree, python = stand_in(), bare(tmp_path / "python", "tqdm")
    (tree / ".whl").mkdir()
    found = distribution("tqdm")
    assert "tqdm" in packages_distributions()
    with zipfile.ZipFile(tree / ".whl" / f"tqdm-{found.version}-py3-none-any.whl", "w") as wheel:
        for file in found.files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                wheel.write(file.locate(), str(file))
    (tree / ".whl" / "numpy-0.0-py3-none-any.whl").write_bytes(b"damaged")
    status, report = check(tree, {**environment, "PYTHON": python}, 0)
    assert (status, headings(report)) == (1, PARTS), report
    assert check(tree, {**environment, "PYTHON": python}, 0)[0] == 1
    assert subprocess.run([python, "-c", "import tqdm"], capture_output=True).returncode == 1
