"""Adapters and pictures, damaged or made to harm: each is read, or refused by an error of ours, and nothing else."""

import io
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from random_checkpoint import build_pipeline
from safetensors.torch import save

import depthdiff
from depthdiff.config import CheckpointError
from depthdiff.image import read_images
from depthdiff.picture_files import READ, open_image
from tests.test_lora import kohya_file, same, snapshot

PACKAGE = str(Path(depthdiff.__file__).parent)
SECONDS = 5
WORDS = [
    "<toy>",
    "",
    " ",
    "two words",
    "\ud800",
    "<\udfff>",
    "\u202e<x>",
    "e\u0301",
    "\ufeff",
    "\u00a0x",
    "\x00",
    "a" * 10_000,
    "\U0001f98a",
    "ＡＢ",
    "ß",
    "İ",
    "!",
    "<|endoftext|>",
    "x\ny",
    "\u2028",
    "1" * 400,
    "<toy>_1",
]


def is_ours(error):
    """Return whether an error was raised by a `raise` of the package, and not from inside something else."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return type(error) in (CheckpointError, ValueError) and last.filename.startswith(PACKAGE)\
        and "Exceeds the limit" not in str(error)  # fmt: skip


def outcome(call):
    """Call; return "read", "refused", or the traceback of an error that is not ours."""
    start = time.perf_counter()
    try:
        call()
    except Exception as error:
        result = "refused" if is_ours(error) else traceback.format_exc()
    else:
        result = "read"
    took = time.perf_counter() - start
    return result if took < SECONDS else f"took {took:.0f} seconds"


def some_layers(pipe, method, rng):
    """Return an adapter of a few layers."""
    whole = kohya_file(pipe, "lora" if method == "dora" else method)
    stems = rng.sample(sorted({key.split(".")[0] for key in whole}), 4)
    state = {key: value for key, value in whole.items() if key.split(".")[0] in stems}
    if method == "dora":
        for key in [key for key in state if key.endswith("lora_up.weight")]:
            rows = state[key].shape[0]
            state[key.replace("lora_up.weight", "dora_scale")] = torch.rand(rows, *[1] * (state[key].ndim - 1)) + 0.5
    return state


def some_word(pipe, rng):
    """Return a learnt word in one of the forms there are."""
    vectors = torch.rand(2, pipe.text_encoder.config.hidden_size)
    word = rng.choice(WORDS)
    return rng.choice(
        [
            {word: vectors},
            {"string_to_param": {"*": vectors}, "name": word},
            {"emb_params": vectors},
            {word: vectors[0]},
        ]
    )


DTYPES = [torch.int8, torch.bool, torch.int64, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
          torch.float8_e4m3fn]  # fmt: skip
ODD = [None, 3, 10**400, -(10**5000), 1e308, math.nan, "text", [], {}, (1, 2), b"x", True, [torch.rand(2)]]


def change_values(state, rng, pickled):
    """Change one entry of a file in one way."""
    keys = sorted(key for key, value in state.items() if isinstance(value, torch.Tensor))
    if not keys:
        return
    key = rng.choice(keys)
    value = state[key]
    kind = rng.randrange(14 if pickled else 9)
    if kind == 0:
        del state[key]
    elif kind == 1:
        news = ["x", key[1:], key[:-1], key.replace("_", "-"), key.upper(), f"unet.{key}", *WORDS[1:], f"{key}.alpha",
                key.split(".")[0] + ".alpha", key.split(".")[0] + ".dora_scale"]  # fmt: skip
        state[rng.choice(news)] = state.pop(key)
    elif kind == 2:
        state[key] = value.reshape(-1)[: rng.randrange(value.numel())].clone()
    elif kind == 3:
        state[key] = value.T.contiguous() if value.ndim == 2 else value[None]
    elif kind == 4:
        state[key] = value * float(rng.choice(["nan", "inf", "-inf", "0", "1e38", "1e30", "-1e-40"]))
    elif kind == 5:
        state[key] = value.to(rng.choice(DTYPES))
    elif kind == 6:
        state[key] = torch.cat([value.reshape(1, -1)] * rng.choice([2, 3]))
    elif kind == 7:
        state[key] = value.double() * rng.choice([1e200, -1e300, 1e39, 1e-300, 3e38])
    elif kind == 8:
        state[key] = torch.full((1,) * rng.randrange(20), 0.5)
    elif kind == 9:
        state[key] = rng.choice(ODD)
    elif kind == 10:
        state[key.split(".")[0] + ".alpha"] = rng.choice(ODD)
    elif kind == 11:
        state[key] = rng.choice(
            [value.to_sparse(), torch.empty(value.shape, device="meta"), torch.zeros(1).expand(10**9)]
        )
    elif kind == 12:
        state[rng.choice([5, None, ("a",), b"key"])] = state.pop(key)
    else:
        state[key] = {"nested": state[key]}


SETTINGS = [
    5,
    "x",
    None,
    [],
    {},
    -4,
    0,
    1e308,
    10**400,
    True,
    {"": 1},
    {"(.*)*!": 4},
    {"((a+)+)+$": 4},
    {"(": 1},
    {"x" * 99_999: 1},
    {".*": 2},
    {"to_q": "4"},
    {"to_q": -1},
    {"to_q": 1e12},
    {r"^mid_block\.attentions": 2},
    {"\ud800": 1},
]


def some_settings(rng):
    names = ["r", "lora_alpha", "alpha", "alpha_pattern", "rank_pattern", "use_rslora", "target_modules", "bias"]
    return {rng.choice(names): rng.choice(SETTINGS) for _ in range(rng.randrange(4))}


def change_header(content, rng):
    """Change what the header of a safetensors file claims."""
    [length] = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    key = rng.choice(sorted(header))
    kind = rng.randrange(7)
    huge = rng.choice([0, 1, -1, 2**31, 2**62, 2**64, 1.5, "4", None])
    if kind == 0 and key != "__metadata__":
        header[key]["shape"] = [huge] * rng.randrange(70)
    elif kind == 1 and key != "__metadata__":
        header[key]["data_offsets"] = rng.choice([[0, huge], [huge, 4], [4, 0], [], [0], huge])
    elif kind == 2 and key != "__metadata__":
        header[key]["dtype"] = rng.choice(["F64", "F8_E4M3", "I64", "BOOL", "X", "", None, 5, "F4", "U64", "C64"])
    elif kind == 3:
        header[key] = rng.choice([None, 5, [], {}, "x"])
    elif kind == 4:
        component = rng.choice(["unet.", "text_encoder.", ""])
        flat = {f"{component}{name}": value for name, value in some_settings(rng).items()}
        text = rng.choice([json.dumps(flat), "[1]", "[" * 100_000, "", "{", '{"a":' * 5000, json.dumps(flat)[:-1]])
        header["__metadata__"] = {"lora_adapter_metadata": text}
    elif kind == 5:
        return struct.pack("<Q", rng.choice([0, 1, 2**62, 2**24, length + 1])) + content[8:]
    else:
        header = {
            f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(rng.choice([3, 30_000]))
        }
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def change_bytes(content, rng):
    """Damage bytes, the first ones rather than others."""
    kind = rng.randrange(5)
    place = rng.randrange(min(len(content), rng.choice([50, 400, len(content)])))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + rng.randbytes(rng.randrange(1, 9)) + content[place:]
    if kind == 3:
        return content[:place] + content[place + rng.randrange(1, 99) :]
    return content[:place] + b"\xff" * 8 + content[place + 8 :]


def zipped_again(content, rng):
    """Write an archive again: compressed, with parts twice, or with other names."""
    out, kind = io.BytesIO(), rng.randrange(4)
    with zipfile.ZipFile(io.BytesIO(content)) as old, \
         zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if kind == 0 else zipfile.ZIP_STORED) as new:  # fmt: skip
        for part in old.infolist():
            name = f"../{part.filename}" if kind == 1 and rng.random() < 0.3 else part.filename
            data = old.read(part)
            new.writestr(name, data[: len(data) // 2] if kind == 3 and "/data/" in name else data)
        if kind == 2:
            new.writestr(rng.choice(["archive/data/0", "x/data.pkl", "/etc/x"]), b"x" * 100)
    return out.getvalue()


def some_adapter(pipe, rng, place):
    """Write a damaged adapter; return its path, and whether it is meant for words."""
    is_word = rng.random() < 0.25
    method = rng.choice(["lora", "loha", "lokr", "full", "dora"])
    state = some_word(pipe, rng) if is_word else some_layers(pipe, method, rng)
    pickled = rng.random() < 0.4
    how = rng.choice(["values", "values", "bytes", "zip" if pickled else "header", "settings"])
    if how == "values":
        change_values(state, rng, pickled)
    path = place / rng.choice(
        [f"adapter_model.{'bin' if pickled else 'safetensors'}", f"x.{'pt' if pickled else 'safetensors'}"]
    )
    if pickled:
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
        content = buffer.getvalue()
    else:
        tensors = {key: value.contiguous().clone() for key, value in state.items() if isinstance(value, torch.Tensor)
                   and value.layout == torch.strided and key.isprintable()}  # fmt: skip
        content = save(tensors or {"emb_params": torch.rand(1, 4)})
    if how == "bytes":
        content = change_bytes(content, rng)
    elif how == "header":
        content = change_header(content, rng)
    elif how == "zip" and content.startswith(b"PK"):
        content = zipped_again(content, rng)
    if path.stem == "adapter_model":
        text = json.dumps(some_settings(rng)) if how == "settings" else "{}"
        (place / "adapter_config.json").write_text(text)
    path.write_bytes(content)
    return path, is_word


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.fuzz)])
def test_damaged_adapters(tmp_path, count):
    """Each loads, finite, or is refused with an error of ours, and then nothing has changed."""
    pipe, rng, counts, faults = build_pipeline("tiny"), random.Random(0), Counter(), []
    before, tokens = snapshot(pipe), len(pipe.tokenizer)
    for index in range(count):
        place = tmp_path / str(index)
        place.mkdir()
        path, is_word = some_adapter(pipe, rng, place)
        load = pipe.load_textual_inversion if is_word else pipe.load_lora_weights
        result = outcome(lambda load=load, path=path: load(path))
        if result == "read":
            finite = all(value.isfinite().all() for value in snapshot(pipe).values())
            result = "read" if finite else "loaded numbers that are not finite"
            pipe.unload_textual_inversion() if is_word else pipe.unload_lora_weights()
        if not same(pipe, before) or len(pipe.tokenizer) != tokens or pipe.tokenizer.learnt_words:
            result = f"changed the pipeline: {result}"
        counts[result if result in ("read", "refused") else "fault"] += 1
        if result not in ("read", "refused"):
            faults.append(f"{index}: {result}")
    print(counts, *faults)
    assert faults == []
    assert counts["refused"] > count / 4
    assert counts["read"] > count / 20


def pickled(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def views_of_one_storage(count):
    storage = torch.zeros(250_000)
    return {f"lora_unet_x{i}.alpha": storage.view(-1) for i in range(count)}


def deflated(content):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    return out.getvalue()


def empty_tensors(count):
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text


def nested(depth):
    """Write torch's older format, whose program nests tuples."""
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    return head + b"\x80\x02" + b"(" * depth + b"t" * depth + b"." + pickle.dumps([], 2)


BOMBS = {
    "expanded.pt": lambda: pickled({"lora_unet_conv_in.alpha": torch.zeros(1).expand(200_000, 200_000)}),
    "expanded-word.bin": lambda: pickled({"<toy>": torch.zeros(1, 40).expand(10**9, 40)}),
    "views.pt": lambda: pickled(views_of_one_storage(3_000)),
    "deflated.pt": lambda: deflated(pickled({"<toy>": torch.zeros(10**8, dtype=torch.uint8)})),
    "many.safetensors": lambda: empty_tensors(30_000),
    "many.pt": lambda: pickled({"x": [torch.zeros(1)] * 21_000}),
    "claims.safetensors": lambda: struct.pack("<Q", 2**40) + b"{" + b" " * 1000,
    "nested.bin": lambda: nested(100_000),
    "number.bin": lambda: pickled({"x.alpha": 10**300_000}),
    "list.pt": lambda: pickled([0] * 1_000_000),
    "loop.pt": lambda: pickled(loop()),
    "laughs.pt": lambda: pickled(laughs()),
}


def loop():
    """Return a dict that holds itself."""
    value = {}
    value["x"] = value
    return value


def laughs():
    """Return few lists that hold each other 10^30 times."""
    value = [torch.zeros(1)]
    for _ in range(30):
        value = [value] * 10
    return {"x.alpha": value}


CHILD = """
import resource, sys
from pathlib import Path
import torch
from random_checkpoint import build_pipeline
from tests.test_fuzz_files import outcome
pipe = build_pipeline("tiny")
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
for path in sys.argv[1:]:
    load = pipe.load_textual_inversion if "word" in path else pipe.load_lora_weights
    print(path, outcome(lambda: load(path)).splitlines()[-1], sep="\\t", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_bombs(tmp_path):
    """Files that ask for much more than they hold: refused within seconds, and within a gigabyte."""
    for name, make in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    (tmp_path / "adapter_model.safetensors").write_bytes(save({"emb_params": torch.rand(1, 4)}))
    (tmp_path / "adapter_config.json").write_text('{"alpha_pattern": {"(.*)*!": 4}}')
    paths = [str(path) for path in sorted(tmp_path.iterdir()) if path.suffix != ".json"]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "scripts")])}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *paths], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(paths), done.stdout + done.stderr
    assert [line for line in lines if line[1] != "refused"] == []


OTHERS = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
    "pdf": b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer << /Root 1 0 R >>\n%%EOF\n",
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(18) + b"\x01\x00\x09\x00" + bytes(40),
    "emf": b"\x01\x00\x00\x00" + bytes(36) + b" EMF" + bytes(60),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>1</script></svg>",
    "text": b"no picture\n",
    "zip": b"PK\x03\x04" + bytes(60),
    "elf": b"\x7fELF\x02\x01\x01" + bytes(60),
    "empty": b"",
    "fits": b"SIMPLE  =                    T" + b" " * 50 + b"END" + b" " * 2800,
    "mpeg": b"\x00\x00\x01\xb3\x01\x00\x10" + bytes(50),
    "gbr": struct.pack(">7I", 28, 2, 4, 4, 1, 0x47494D50, 10) + bytes(16),
}
CLAIMS = [
    struct.pack(order + size, number & mask)
    for order in "<>"
    for size, mask in (("H", 0xFFFF), ("I", 0xFFFFFFFF))
    for number in (0, 1, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1)
]


def whole_pictures():
    """Encode a picture in every type that is read and can be written, and with an orientation."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 37, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    made = dict(OTHERS)
    Image.init()
    for kind in sorted(set(READ) & set(Image.SAVE)):
        for mode, more in (
            ("RGB", {}),
            ("P", {}),
            ("L", {}),
            ("RGBA", {}),
            ("I;16", {}),
            ("1", {}),
            ("RGB", {"exif": exif}),
        ):
            content = io.BytesIO()
            try:
                one = picture.resize((64, 64)) if kind in ("ICNS", "ICO") else picture
                one = (
                    Image.fromarray(np.arange(37 * 23, dtype=np.uint16).reshape(23, 37))
                    if mode == "I;16"
                    else one.convert(mode)
                )
                one.save(content, kind, **more)
            except (OSError, ValueError, KeyError):
                continue
            made[f"{kind} {mode} {bool(more)}"] = content.getvalue()
    return made


def change_picture(content, rng):
    """Damage the bytes of a picture, or let a number in it claim something."""
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        if not content:
            break
        if rng.random() < 0.4:
            place, claim = rng.randrange(min(len(content), 200)), rng.choice(CLAIMS)
            content = content[:place] + claim + content[place + len(claim) :]
        else:
            content = change_bytes(content, rng)
    return content


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=pytest.mark.fuzz)])
def test_damaged_pictures(tmp_path, monkeypatch, count):
    """Each is a picture or is refused with an error of ours, whatever its name says; no other program is started."""
    mark, programs = tmp_path / "started", tmp_path / "bin"
    programs.mkdir()
    for name in ("gs", "gswin32c", "gswin64c", "convert", "inkscape"):
        (programs / name).write_text(f"#!/bin/sh\ntouch '{mark}'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    rng, counts, faults, made = random.Random(0), Counter(), [], whole_pictures()
    names = [f"photo.{ending}" for ending in ("png", "jpg", "webp", "tiff", "gif", "bmp", "eps", "PNG")]
    path = Path(tmp_path / "x")
    for index in range(count):
        kind = rng.choice(sorted(OTHERS) if rng.random() < 0.1 else sorted(made))
        path = tmp_path / rng.choice(names)
        path.write_bytes(change_picture(made[kind], rng))

        def read(path=path):
            [picture] = read_images(open_image(path, "image"))
            assert picture.mode == "RGB"
            assert picture.width * picture.height > 0

        result = outcome(read)
        counts[result if result in ("read", "refused") else "fault"] += 1
        if result not in ("read", "refused"):
            faults.append(f"{index} {kind}: {result}")
    print(counts, len(made))
    assert faults == []
    assert not mark.exists()
    assert min(counts["read"], counts["refused"]) > count / 5
