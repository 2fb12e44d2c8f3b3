"""Run the commands of docs/recipes.md, and draw the sheets that the page shows.

    python scripts/recipes.py [NAME ...]

Each `depthdiff` line of the page runs in a folder of its own with the inputs that are drawn here. Behind a block, a
comment `<!-- sheet NAME: FILE ... -->` says which files the sheet docs/recipes/NAME.png shows; `FILE*2` lays a picture
side by side in both directions. With names, only these sections run. About five minutes on two cores.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from depthdiff.cli import main as command
from depthdiff.image import contact_sheet

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts" / "mini"))
from scenes import random_scene, render  # noqa: E402

PAGE, SHEETS = ROOT / "docs" / "recipes.md", ROOT / "docs" / "recipes"
SECTION = re.compile(r"```sh\n(.*?)```\n(?:.*?)<!-- sheet ([\w-]+): (.*?) -->", re.DOTALL)
HEIGHT = 128
"""Of the pictures in a sheet, in pixels."""
SEEDS = 20007, 20002, 20005
"""Of the scenes whose exact depth is used, the first one alone and all three side by side."""


def draw_inputs(folder: Path) -> None:
    """Write what the commands read: a photo, a mask, and depth maps in several forms."""
    with Image.open(ROOT / "docs" / "scene.png") as scene:
        scene.convert("RGB").save(folder / "scene.png")
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).ellipse((40, 40, 80, 78), fill=255)
    mask.save(folder / "mask.png")
    maps = list(render([random_scene(seed) for seed in SEEDS]).disparity.numpy())
    save_depth(folder / "depth.png", maps[0])
    np.save(folder / "distance.npy", 1 / maps[0])
    save_depth(folder / "wide.png", np.concatenate(maps, axis=1))
    y, x = np.mgrid[:128, :128] * (2 * np.pi / 64)
    save_depth(folder / "bumps.png", np.cos(x) + np.cos(y))


def save_depth(path: Path, disparity: np.ndarray) -> None:
    """Write a map as a picture of 16 bits in which white is near."""
    scaled = (disparity - disparity.min()) / (disparity.max() - disparity.min())
    Image.fromarray((scaled * 65535).round().astype(np.uint16)).save(path)


def tile(name: str) -> tuple[Image.Image, str]:
    """Read one picture of a sheet, and its label."""
    file, _, times = name.partition("*")
    with Image.open(file) as opened:
        if opened.mode == "I;16":
            values = np.asarray(opened) / 257
            picture = Image.fromarray(values.astype(np.uint8)).convert("RGB")
        else:
            picture = opened.convert("RGB")
    count = int(times or 1)
    whole = Image.new("RGB", (picture.width * count, picture.height * count))
    for i in range(count * count):
        whole.paste(picture, (i % count * picture.width, i // count * picture.height))
    label = file if count == 1 else f"{file}, {count}x{count}"
    return whole, label


def main() -> None:
    """Run the page's sections."""
    wanted = sys.argv[1:]
    SHEETS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        draw_inputs(Path(place))
        os.chdir(place)
        for block, name, shown in SECTION.findall(PAGE.read_text(encoding="utf-8")):
            if wanted and name not in wanted:
                continue
            for line in block.replace("\\\n", " ").strip().splitlines():
                words = shlex.split(line, comments=True)
                if words and command(words[1:]):
                    raise SystemExit(f"failed: {line}")
            pictures, labels = zip(*map(tile, shown.split()), strict=True)
            height = max(HEIGHT, *(picture.height for picture in pictures if picture.height <= 2 * HEIGHT))
            first = pictures[0].resize((round(pictures[0].width * height / pictures[0].height), height))
            contact_sheet([first, *pictures[1:]], labels).save(SHEETS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
