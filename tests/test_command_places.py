"""The command with odd paths, arguments and streams: refused in one line before any work, or done as a whole."""

import hashlib
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_checkpoint import build_pipeline

from depthdiff import cli
from depthdiff.picture_files import READ

ROOT = Path(__file__).parents[1]
OUTPUTS = ("-o", "--sheet", "--save-depth")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


class ReachedError(Exception):
    """Loading was reached: everything that is checked before was found good."""


def furnish(place):
    """Make a folder with everything that a command may read."""
    (place / "in" / "model" / "unet").mkdir(parents=True)
    (place / "in" / "deep").mkdir()
    for name in ("photo.png", "depth.png"):
        PICTURE.convert("RGB" if name == "photo.png" else "L").save(place / "in" / name)
    for name in ("model/model_index.json", "model/unet/weights.png", "lora.safetensors", "word.pt", "one.safetensors"):
        (place / "in" / name).write_text(f"the content of {name}")
    (place / "out").mkdir()
    (place / "out" / "old.png").write_text("the old one")


SPELLINGS = {
    "plain": lambda path, out: path,
    "absolute": lambda path, out: path.absolute(),
    "up and down": lambda path, out: Path("in", "deep", "..", "..", path),
    "dots and slashes": lambda path, out: f".//{path.parent}/.//{path.name}",
    "link": lambda path, out: linked(out / "a.png", path.absolute()),
    "relative link": lambda path, out: linked(out / "a.png", Path("..", path)),
    "link of a link": lambda path, out: linked(out / "b.png", linked(out / "a.png", Path("..", path)).name),
    "hard link": lambda path, out: hard(out / "a.png", path),
    "linked folder": lambda path, out: linked(out / "there", path.parent.absolute()) / path.name,
    "another case": lambda path, out: path.with_name(path.name.upper()),
}


def linked(name, target):
    name.symlink_to(target)
    return name


def hard(name, target):
    os.link(target, name)
    return name


def over_an_input(rng):
    """Write over something that is read."""
    inputs = {
        "photo": ("in/photo.png", []),
        "depth": ("in/depth.png", ["--depth", "in/depth.png"]),
        "model's file": ("in/model/unet/weights.png", ["--model", "in/model"]),
        "model": ("in/one.safetensors", ["--model", "in/one.safetensors"]),
        "lora": ("in/lora.safetensors", ["--lora", rng.choice(["in/lora.safetensors", "in/lora.safetensors:0.5"])]),
        "word": ("in/word.pt", ["--embedding", rng.choice(["in/word.pt", "in/word.pt:<x>"])]),
    }
    path, more = inputs[rng.choice(sorted(inputs))]
    spelling = rng.choice(sorted(SPELLINGS))
    return [*more, rng.choice(OUTPUTS), SPELLINGS[spelling](Path(path), Path("out"))], f"{path} by {spelling}"


def one_for_two(rng):
    """Write two things to one file, that is there or not."""
    name = Path("out", rng.choice(["old.png", "new.png"]))
    first, second = rng.sample(OUTPUTS, 2)
    spellings = ["plain", "absolute", "up and down", "dots and slashes", "linked folder"]
    if name.exists():
        spellings += ["link", "relative link", "hard link"]
    spelling = rng.choice(spellings)
    more = []
    if rng.random() < 0.3 and first == "-o":
        more, name = ["--num-images", "3"], name.with_name(f"{name.stem}-{rng.randrange(1, 4)}.png")
        spelling = "plain"
    target = name.with_name(name.name.split("-")[0] if more else name.name).with_suffix(".png")
    return [*more, first, target, second, SPELLINGS[spelling](name, Path("out"))], f"twice {spelling}"


def no_place(rng):
    """Name what cannot be written."""
    os.mkfifo("out/pipe.png")
    Path("out/folder.png").mkdir()
    Path("out/broken.png").symlink_to("nowhere/a.png")
    Path("out/loop.png").symlink_to("loop.png")
    Path("out/read-only.png").write_text("x")
    Path("out/read-only.png").chmod(0o444)
    long = [f"out/{'n' * 296}.png", f"out/{'é' * 130}.png", f"{'x/' * 3000}a.png"]
    places = [
        "out/pipe.png",
        "out/folder.png",
        "out/broken.png",
        "out/loop.png",
        "/dev/null",
        "/dev/full",
        "/dev/stdout",
        "out",
        ".",
        "/",
        "",
        "out/",
        "out/no/a.png",
        "in/photo.png/a.png",
        "out/a\0.png",
        "/proc/self/a.png",
        *long,
    ]
    if not os.access("out/read-only.png", os.W_OK):
        places.append("out/read-only.png")
    place = rng.choice(places)
    return [rng.choice(OUTPUTS), place], f"no place {place[:60]!r}"


def no_type(rng):
    """Name a type that cannot be written, or read."""
    if rng.random() < 0.3:
        Path("in/bad.png").write_bytes(
            rng.choice([b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"PK\x03\x04", b"\x89PNG\r\n"])
        )
        return [rng.choice(["--depth", "IMAGE"]), "in/bad.png"], "cannot be read"
    Image.init()
    known = {ending for ending, kind in Image.registered_extensions().items() if kind not in Image.SAVE}
    ending = rng.choice(sorted(known | {".xyz", "", ".png2", ".", ".safetensors", ".txt", ". png"}))
    return [rng.choice(OUTPUTS), f"out/a{ending}"], f"type {ending!r}"


NUMBERS = {
    "--strength": ["-0.1", "1.1", "nan", "inf", "1e400", "x", ""],
    "--steps": ["0", "-1", "100001", "9" * 30, "1.5", "nan", "x"],
    "--guidance": ["-1", "nan", "inf", "1e300", "-1e-3", "x"],
    "--seed": ["-1", str(2**64), "9" * 40, "1.5", "x", "nan"],
    "--num-images": ["0", "-1", "1001", "9" * 30, "1.5", "x"],
    "--eta": ["-0.1", "1.1", "nan", "inf", "x"],
    "--size": ["7", "0", "-8", "16385", "9" * 30, "x", "100000"],
    "--clip-skip": ["-1", "x", "1.5"],
    "--deep-cache": ["0", "-1", "x", "1.5"],
    "--token-merging": ["-0.1", "0.8", "nan", "inf", "x"],
    "--lora": [
        "in/lora.safetensors:x",
        "in/lora.safetensors:nan",
        "in/lora.safetensors:1e999",
        "in/nowhere.safetensors",
    ],
    "--embedding": ["in/nowhere.pt", "in/nowhere.safetensors:<x>"],
    "--variant": ["../x", "", "*", "a/b"],
    "--device": ["nonsense", "meta", "cuda:99", "", "-1", "cpu:", "cuda:-1", "xla", "\udcff", "privateuseone"],
    "--depth": ["in", "in/nowhere.png", "/dev/null", ""],
    "PROMPT": ["a \udcff cup", "\ud800"],
    "-n": ["\udcfe"],
    "IMAGE": ["in", "nowhere.png", "/dev/null", "", "a\0.png", "x" * 300],
}


def no_value(rng):
    """Give an option what it cannot be."""
    option = rng.choice(sorted(NUMBERS))
    value = rng.choice(NUMBERS[option])
    return [option, value], f"{option}={value[:40]!r}"


def arguments_of(more):
    """Put options behind, and prompt and image in front."""
    front = {"PROMPT": "a cup", "IMAGE": "in/photo.png"}
    options = [str(one) for one in more]
    for name in front:
        if name in options:
            place = options.index(name)
            front[name] = options[place + 1]
            del options[place : place + 2]
    pairs = [f"{a}={b}" if a.startswith("--") else f"{a}{b}" for a, b in zip(options[::2], options[1::2], strict=True)]
    return [*front.values(), *pairs]


def contents(place):
    """Say what a folder holds, and what kind everything is."""
    found = {}
    for path in sorted(place.rglob("*")):
        kind = path.lstat().st_mode
        found[path.relative_to(place)] = kind, hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None
    return found


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes pipes and links as POSIX does")
@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.fuzz)])
def test_what_cannot_be_is_refused_in_one_line_before_any_work(tmp_path, monkeypatch, capsys, count):
    """And nothing has changed anywhere."""

    def load(options, dtype):
        raise ReachedError("loading was reached")

    monkeypatch.setattr(cli, "load", load)
    rng, faults, counts = random.Random(0), [], Counter()
    kinds = [over_an_input, one_for_two, no_place, no_type, no_value]
    for index in range(count):
        place = tmp_path / str(index)
        furnish(place)
        monkeypatch.chdir(place)
        kind = kinds[index % len(kinds)]
        more, name = kind(rng)
        other = "another case" in name and not Path(str(more[-1])).exists()  # which is another file here
        other = other and Path(more[-1]).suffix == ".PNG"
        before = contents(place)
        try:
            status = cli.main(arguments_of(more))
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("depthdiff: ")]
        wanted = status == 1 and len(error.splitlines()) == 1 and error.startswith("depthdiff: error: ")
        wanted |= status == 2 and "usage: depthdiff" in error and len(lines) == 1
        reached = "loading was reached" in error
        if not wanted or reached != other or contents(place) != before or "Traceback" in error:
            faults.append((index, name, status, error, reached, contents(place) == before))
        counts[kind.__name__] += 1
    print(counts)
    assert faults == []


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path, monkeypatch, capsys):
    """The unfinished file's name is shorter; and a photo may have a name that is not UTF-8."""
    pipe = build_pipeline("tiny")
    monkeypatch.setattr(cli, "load", lambda options, dtype: pipe)
    monkeypatch.chdir(tmp_path)
    photo = os.fsdecode(b"\xff.png")
    PICTURE.save(photo)
    assert cli.main(["a cup", photo, "--steps", "1", "-o", f"{'n' * 251}.png", "--sheet", f"{'s' * 251}.jpg"]) == 0
    assert cli.main(["a cup", photo, "--steps", "1"]) == 0
    names = {f"{'n' * 251}.png", f"{'s' * 251}.jpg", photo, os.fsdecode(b"\xff-depthdiff.png")}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_depth_maps_of_every_type_can_be_used_again_or_are_refused(tmp_path, monkeypatch, capsys):
    """What is read back correlates with what was estimated (> 0.99), or the type is refused before loading."""
    pipe, loaded = build_pipeline("tiny"), []
    monkeypatch.setattr(cli, "load", lambda options, dtype: loaded.append(1) or pipe)
    monkeypatch.chdir(tmp_path)
    PICTURE.save("photo.png")
    expected = pipe.estimate_depth(PICTURE).float().numpy().squeeze()
    Image.init()
    endings = {}
    for ending, kind in sorted(Image.registered_extensions().items()):
        endings.setdefault(kind, ending)
    kept = set()
    for kind in sorted(set(endings) & set(Image.SAVE)):
        loaded.clear()
        name = f"depth{endings[kind]}"
        status = cli.main(["a cup", "photo.png", "--steps", "1", "--save-depth", name, "-o", "a.png"])
        error = capsys.readouterr().err
        if status:
            assert status == 1
            assert not loaded, kind
            assert "must be of a type that keeps a depth map" in error
            assert not Path(name).exists()
            continue
        kept.add(kind)
        with Image.open(name) as file:
            values = np.asarray(file if file.mode[0] in "IF" else file.convert("L"), dtype=np.float64)
        if kind == "TIFF":  # which holds the numbers as they are
            assert np.array_equal(values, expected)
            continue
        assert math.isclose(values.max(), 255 if values.max() < 256 else 65535, rel_tol=0.02), kind
        large = np.asarray(Image.fromarray(expected).resize(values.shape[::-1], Image.Resampling.BILINEAR))
        assert np.corrcoef(large.ravel(), values.ravel())[0, 1] > 0.99, kind
    assert kept >= {"PNG", "TIFF", "JPEG"}
    assert kept <= set(READ)


PYTHON = f"'{sys.executable}' -m depthdiff"
STREAMS = {
    "no stdout": "{} >&-",
    "no stderr": "{} 2>&-",
    "neither": "{} >&- 2>&- <&-",
    "nobody reads": "{} | true",
    "one line is read": "{} | head -1",
    "nobody reads errors": "{} 2>&1 >/dev/null | true",
    "stdout is full": "{} >/dev/full",
    "stderr is full": "{} 2>/dev/full",
    "ascii": "PYTHONIOENCODING=ascii {}",
    "cp1252": "PYTHONIOENCODING=cp1252 {}",
}
QUICK = ("neither", "one line is read")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs bash and /dev/full")
@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(one, marks=pytest.mark.fuzz) for one in STREAMS if one not in QUICK)]
)
def test_streams_that_are_closed_or_narrow_cost_no_picture(tmp_path, tiny_folder, case):
    photo = tmp_path / "фото\u2028🦊.png"
    PICTURE.save(photo)
    names = ["a-1.png", "a-2.png", "sheet.png", "depth.png"]
    options = f"'a cup' '{photo}' --model '{tiny_folder}' --steps 1 --num-images 2 -o '{tmp_path}/a.png'"
    options += f" --sheet '{tmp_path}/sheet.png' --save-depth '{tmp_path}/depth.png'"
    script = STREAMS[case].format(f"{PYTHON} {options}") + "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*names, photo.name}
    for name in names:
        with Image.open(tmp_path / name) as picture:
            picture.load()
