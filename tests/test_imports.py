"""The package's shape: who imports whom, what importing costs, how long files and functions are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import depthdiff

ROOT = Path(depthdiff.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ORDER = (
    ("checks",),
    ("arguments", "config", "decoding", "forks", "hooks", "process", "progress", "turns"),
    ("checkpoint", "noise", "image"),
    ("models", "schedulers", "tokenizer", "image_processor", "parts", "utils"),
    ("fast", "registry", "sharing"),
    ("approximations", "conditioning", "depth_maps", "devices", "estimators", "inputs"),
    ("interruption", "masks", "seamless", "sizes", "windows"),
    ("pipeline_utils", "prompt_syntax"),
    ("adapters", "single_files", "run", "call_options", "call_state"),
    ("convert", "inspect_checkpoint", "picture_files", "precision", "guidance", "scene"),
    ("depth_files", "previews", "prompts"),
    ("preparation",),
    ("pipeline",),
    ("options",),
    ("command_checks",),
    ("command_inputs", "settings"),
    ("infotext",),
    ("redo",),
    ("cli",),
    ("__main__",),
)
"""Files and folders of the package; each may import from those of the lines before it alone."""
DEFERRED = {("checkpoint/hub.py", "checkpoint"), ("__main__.py", "cli")}
"""What is imported inside a function: what downloads, and the command, which sets up its process first."""
SLOW = {
    "huggingface_hub": ("checkpoint/save.py", "checkpoint/single_file.py"),
    "OpenEXR": ("depth_files.py",),
    "peft": ("models/peft.py",),
    "shtab": ("options.py",),
}
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


def place(unit):
    return next(i for i, units in enumerate(ORDER) if unit in units)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_file_imports_from_those_before_it(path):
    name = path.relative_to(ROOT)
    unit = name.parts[0].removesuffix(".py")
    if unit == "__init__":
        return
    for module, deferred in imports(path):
        if not module.startswith("depthdiff"):
            assert module.split(".")[0] not in ("diffusers", "transformers", "accelerate", "scipy"), module
            if deferred:
                assert name.as_posix() in SLOW.get(module, ()), f"{name}: {module} is imported inside a function"
            continue
        target = [*module.split("."), ""][1]
        if deferred:
            assert (name.as_posix(), target) in DEFERRED, f"{name}: {module} is imported inside a function"
        elif target not in ("", unit):
            assert place(target) < place(unit), f"{name} imports {module}"


def test_no_file_imports_itself_by_a_detour():
    files = {path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): path for path in FILES}
    graph = {}
    for name, path in files.items():
        graph[name] = {module for module, deferred in imports(path) if not deferred and module in files}
    while free := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in free}
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize("folder", ["models", "schedulers"])
def test_the_maths_knows_no_speed(folder):
    """No word of devices, processors, memory formats, tracing or caches in networks and solvers, docstrings aside."""
    words = ("is_cuda", "is_cpu", "mkldnn", "onednn", "is_compiling", "channels_last", "functools.cache", "lru_cache")
    for path in (ROOT / folder).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path.name
        assert not [module for module, _ in imports(path) if module.startswith("depthdiff.fast")], path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_long_files_or_functions(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body  # without signature and docstring
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{node.name} has {length} lines"


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
