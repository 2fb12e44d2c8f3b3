"""Programs in the manner of public ones, run with diffusers and with us; nothing but the import is changed.

Each has a docstring that names its kind, a `SEED`, and `main(checkpoint, photo)`, which returns numbers: pictures in
[0, 1] or uint8, latents, losses, in dicts and lists. Names that only diffusers has are imported within a function, and
stay diffusers' in both runs.
"""

from __future__ import annotations

import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten

PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.py"))
PICTURE = 2e-3  # of full range; observed: at most 4e-4 (video_frames, by way of 8 bits between frames), else 1.5e-4
LOSS = 1e-4  # of the loss; observed: at most 2e-6


@pytest.fixture(scope="module")
def photo_file(tmp_path_factory, small_photo):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    small_photo.save(path)
    return str(path)


def text_of(path, package):
    """Return a program's text with its import lines changed."""
    text = re.sub(r"^import diffusers$", f"import {package} as diffusers", path.read_text(encoding="utf-8"), flags=re.M)
    return re.sub(r"^(from|import) diffusers\b", rf"\1 {package}", text, flags=re.M)


def run(path, package, tmp_path, checkpoint, photo, seed=None):
    """Run a program, as a module of its own in an empty folder, and return its numbers: (leaves, structure)."""
    module = types.ModuleType(f"{path.stem}_{package}")
    exec(compile(text_of(path, package), f"{path.stem}.py as of {package}", "exec"), vars(module))
    if seed is not None:
        module.SEED = seed
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path / f"{package}-{seed}"
        folder.mkdir()
        patch.chdir(folder)
        leaves, spec = tree_flatten(module.main(str(checkpoint), photo))
    return [leaf.detach().numpy() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec


def difference(one, two):
    """Return how far two results are apart, as a share of what is allowed."""
    if isinstance(two, float):
        assert isinstance(one, float) and np.isfinite(two)
        return abs(one - two) / (LOSS * max(1, abs(two)))
    assert isinstance(two, np.ndarray), f"programs return arrays and floats, got {type(two)}"
    assert one.shape == two.shape and one.dtype == two.dtype
    assert np.isfinite(two).all() and two.std() > 0, "the result is constant"
    if two.dtype == np.uint8:  # rounding may fall to either side: one level, at a few places
        levels = np.abs(one.astype(int) - two)
        return max(levels.max() / 1.5, (levels > 0).mean() / 0.01)
    return np.abs(one - two).max() / (PICTURE * max(1, np.abs(two).max()))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_program(path, tmp_path, tiny_folder, photo_file):
    """Same numbers in both; others for another seed."""
    theirs, form = run(path, "diffusers", tmp_path, tiny_folder, photo_file)
    ours, own_form = run(path, "depthdiff", tmp_path, tiny_folder, photo_file)
    assert form == own_form and theirs
    shares = [difference(one, two) for one, two in zip(ours, theirs, strict=True)]
    print(f"largest difference, as a share of what is allowed: {max(shares):.2g}")
    assert max(shares) <= 1
    others, _ = run(path, "depthdiff", tmp_path, tiny_folder, photo_file, seed=1)
    assert max(difference(one, two) for one, two in zip(others, theirs, strict=True)) > 5


def test_there_are_enough_and_each_is_short():
    assert len(PROGRAMS) >= 25
    for path in PROGRAMS:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 60, path.name
        assert "in the manner of" in lines[0].lower(), path.name


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_nothing_but_imports_is_changed(path):
    theirs, ours = (text_of(path, package).splitlines() for package in ("diffusers", "depthdiff"))
    changed = [(one, two) for one, two in zip(theirs, ours, strict=True) if one != two]
    assert changed and "depthdiff" not in path.read_text(encoding="utf-8")
    for one, two in changed:
        assert re.match(r"(from|import) diffusers\b", one)
        assert two == one.replace("diffusers", "depthdiff", 1)
