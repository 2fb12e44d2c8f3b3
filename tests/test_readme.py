"""The README's programs run, on the bundled model, and what it names is there."""

import re
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_program_and_the_loop(tmp_path, monkeypatch):
    marks = ('"mini"', "mask_image", "pipe.denoise")
    [first, more, loop] = [block for block in BLOCKS if any(mark in block for mark in marks)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    names = {}
    exec(first.replace("strength=1.0", "strength=1.0, num_inference_steps=3"), names)
    assert Image.open(tmp_path / "out.png").size == (128, 128)
    exec(more.replace('"x")', '"x", num_inference_steps=2)'), names)
    assert names["wide"].size == (128, 96)
    exec(loop.replace("strength=0.7", "strength=0.7, num_inference_steps=4"), names)
    assert names["step"].index >= 1 and names["pictures"][0].size == (128, 128)


def test_links_and_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    tree = README.split("## Read it")[1].split("```")[1]
    for name in re.findall(r"[\w/]+\.py|\w+/", tree):
        assert (ROOT / "depthdiff" / name).exists(), name


def test_it_is_short():
    assert README.count("\n") <= 140
