"""The package's shape: who imports whom, what importing costs, how long files and functions are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import depthdiff

ROOT = Path(depthdiff.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ALLOWED = {
    "models": {"checks", "config", "noise", "models"},
    "schedulers": {"checks", "config", "noise", "schedulers"},
    "sampler": {"checks", "schedulers"},
    "checks": set(),
    "config": {"checks"},
    "noise": {"checks"},
}
DEFERRED = {"models/base.py", "models/visits.py", "schedulers/base.py", "tokenizer.py", "image_processor.py"}
DEFERRED |= {"checkpoint/hub.py", "__main__.py"}
"""Files that import the checkpoint package only when a method is called: to load, to save, or for published names;
the one that imports what downloads; and the command, which sets up its process first."""
SLOW = {"huggingface_hub": ("checkpoint/saving.py", "checkpoint/single_file.py")}
"""Libraries that take long to import, and files that therefore import them where they need them."""


def imports(path):
    """List (module, whether it is imported inside a function) of one file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body)) | {
        id(child) for node in tree.body if isinstance(node, ast.If) for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module, id(node) not in top
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in top) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_who_imports_whom(path):
    name = path.relative_to(ROOT)
    part = name.parts[0].removesuffix(".py")
    for module, deferred in imports(path):
        if not module.startswith("depthdiff"):
            assert module.split(".")[0] not in ("diffusers", "transformers", "accelerate", "scipy"), module
            if deferred:
                assert name.as_posix() in SLOW.get(module, ()), f"{name}: {module} is imported inside a function"
            continue
        target = [*module.split("."), ""][1]
        assert target != "cli" or name.name == "__main__.py", "nobody imports the command"
        if deferred:
            assert target == ("cli" if name.name == "__main__.py" else "checkpoint")
            assert name.as_posix() in DEFERRED
        elif part in ALLOWED:
            assert target in ALLOWED[part], f"{name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_long_files_or_functions(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node)
            length = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
            assert length <= 70, f"{node.name} has {length} lines"


def test_public_names_exist_and_are_all():
    for name in depthdiff.__all__:
        assert getattr(depthdiff, name).__doc__, name
    assert set(depthdiff.__all__) == set(depthdiff.HOMES) <= set(dir(depthdiff))
    for name in ("DDIM", "__main__", "cli.main", "no.such", "../x", "", "data"):
        assert not hasattr(depthdiff, name), name


@pytest.mark.parametrize("name", ["models.unet.UNet2DConditionModel", "schedulers.ddim.DDIMScheduler", "cli.main"])
def test_modules_can_be_asked_for(name):
    """As after an import of everything, whatever was asked for first."""
    for first in ("", "depthdiff.CLIPTokenizer; "):
        code = f"import depthdiff; {first}print(depthdiff.{name}.__name__)"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.split() == [name.split(".")[-1]]


def test_the_listed_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"depthdiff.{home}" for name, home in depthdiff.HOMES.items()}


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, depthdiff; print(depthdiff.__version__, 'torch' in sys.modules, len(depthdiff.HOMES))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [depthdiff.__version__, "False", str(len(depthdiff.__all__))]


IMPORT = """
import sys, torch
before = set(sys.modules)
from depthdiff import *
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before if not name.startswith("torch.")}))
print(*sorted(name for name in set(sys.modules) - before if name.startswith("torch.")))
"""
HEAVY = {"diffusers", "transformers", "accelerate", "peft", "scipy", "torchvision", "pandas", "matplotlib"}
HEAVY |= SLOW.keys()


def test_import_is_light_and_silent():
    """Brings in no heavy library, no further part of torch (its compiler, say), and prints nothing."""
    done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    libraries, parts_of_torch = done.stdout.split("\n")[:2]
    assert not HEAVY & set(libraries.split())
    assert not parts_of_torch
