"""Two thousand damaged folders: each is refused with our error, which names the file, or loaded as its bytes say.

Each takes less than a second and no more memory than its file is large.
"""

import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from depthdiff import CheckpointError, CLIPTextModel
from depthdiff.checkpoint.hub import read_json
from depthdiff.checkpoint.ldm import TABLES
from depthdiff.checkpoint.weights import read_header

CONFIG = {
    "architectures": ["CLIPTextModel"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 6, "hidden_act": "gelu",
}  # fmt: skip
SLACK = 16 * 2**20
"""Bytes that the interpreter may take for itself; observed: below 4 MiB for a file of 12 MB."""

NUMPY = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def memory(name):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def watched(folder, files=()):
    """Load a folder; return the network or the error, having checked what holds for all of them."""
    size = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    can_watch = os.access("/proc/self/clear_refs", os.W_OK)
    if can_watch:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
    start = time.process_time()
    try:
        result = CLIPTextModel.from_pretrained(folder, torch_dtype="auto")
    except CheckpointError as error:
        result = error
        text = str(error)
        assert len(text) < 1500
        assert any(name in text for name in files), text
    assert time.process_time() - start < 1  # of this process: others may be busy
    if can_watch:
        assert memory("VmHWM") - before < size + SLACK
    return result


def read(path):
    """Read a safetensors file by its definition, and nothing else."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        part = content[8 + length + begin : 8 + length + end]
        if entry["dtype"] == "BF16":
            yield key, torch.frombuffer(bytearray(part), dtype=torch.bfloat16).reshape(entry["shape"])
        else:
            yield key, torch.from_numpy(np.frombuffer(part, NUMPY[entry["dtype"]]).reshape(entry["shape"]).copy())


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    model = CLIPTextModel.from_config(CONFIG)
    return {TABLES["CLIPTextModel"].published(key): value for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def warm(state, tmp_path_factory):
    """Load once in both forms, so that what torch takes for itself is not counted."""
    for suffix in (".safetensors", ".bin"):
        folder = tmp_path_factory.mktemp("warm")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "model.safetensors").write_bytes(save(state))
        torch.save(state, folder / "pytorch_model.bin")
        for dtype in (torch.float16, None):
            CLIPTextModel.from_pretrained(folder, use_safetensors=suffix == ".safetensors", torch_dtype=dtype)


@pytest.fixture
def folder(warm, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


# Safetensors: a fault changes a parsed header (name -> entry) or, where it returns bytes, makes the whole file.


def pack(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + data


JUNK = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    2**31,
    2**53,
    2**63,
    2**64,
    10**30,
    "",
    "x",
    [],
    {},
    [[]],
    [-1],
    [1, 2, 3],
    [2**62] * 3,
]


def any_entry(rng, header):
    return header[rng.choice([key for key in header if key != "__metadata__"])]


def wrong_length(rng, header, data):
    true = len(json.dumps(header))
    return pack(
        header,
        data,
        rng.choice(
            [
                0,
                1,
                2,
                true - rng.randint(1, 9),
                true + rng.randint(1, 9),
                2**23,
                2**23 + 1,
                2**40,
                2**63,
                -1,
                rng.getrandbits(64),
            ]
        ),
    )


def moved_offset(rng, header, data):
    offsets = any_entry(rng, header)["data_offsets"]
    offsets[rng.randrange(2)] += rng.choice([-(10**6), -64, -4, -1, 1, 4, 64, 10**6, 2**40, 2**62, 2**63])


def moved_place(rng, header, data):
    entry, by = any_entry(rng, header), rng.choice([-256, -32, -4, 4, 32, 256, 10**6, 2**50])
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def shared_place(rng, header, data):
    any_entry(rng, header)["data_offsets"] = list(any_entry(rng, header)["data_offsets"])


def junk_in_entry(rng, header, data):
    any_entry(rng, header)[rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(JUNK)


def junk_for_entry(rng, header, data):
    header[rng.choice(list(header))] = rng.choice(JUNK)


def missing_in_entry(rng, header, data):
    any_entry(rng, header).pop(rng.choice(["dtype", "shape", "data_offsets"]))


def wrong_dtype(rng, header, data):
    any_entry(rng, header)["dtype"] = rng.choice(
        ["F64", "F16", "BF16", "I32", "U32", "I8", "BOOL", "F8_E4M3", "F31", "f32", "torch.float32", "C64", "F4"]
    )


def wrong_shape(rng, header, data):
    entry = any_entry(rng, header)
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        [shape[::-1], [*shape, 1], [1] * 70, [*shape, 2**62], [0], [2**32, 2**32], shape[1:], [-8, -8]]
    )


def claimed_size(rng, header, data):
    entry, count = any_entry(rng, header), 10 ** rng.randint(6, 18)
    entry["shape"] = [count]
    entry["data_offsets"][1] = entry["data_offsets"][0] + 4 * count


def repeated_key(rng, header, data):
    text = json.dumps(header)
    key = rng.choice(list(header))
    return pack((text[:-1] + ", " + json.dumps({key: header[key]})[1:]).encode(), data)


def repeated_key_within(rng, header, data):
    key = rng.choice(["dtype", "shape", "data_offsets"])
    text = json.dumps(header).replace('{"dtype"', f'{{"{key}": {json.dumps(rng.choice(JUNK))}, "dtype"', 1)
    return pack(text.encode(), data)


def cut_off(rng, header, data):
    whole = pack(header, data)
    return whole[: rng.choice([rng.randrange(len(whole)), rng.randrange(12), len(whole) - rng.randint(1, 9)])]


def too_long(rng, header, data):
    return pack(header, data + bytes(rng.choice([1, 7, 8, 4096])))


def deep(rng, header, data):
    depth = rng.choice([500, 5_000, 200_000])
    kind = rng.choice(["[", '{"a":', '{"a":['])
    return pack((('{"a":' if kind == "[" else "") + kind * depth).encode(), data)


def huge(rng, header, data):
    if rng.random() < 0.8:
        return pack(b'{"a":"' + b" " * rng.randint(10**4, 10**6) + b'"}' * rng.randint(0, 1), data)
    parts = [
        b'{"a":[' + b"[]," * 10**6 + b"[]]}",
        b'{"a":"' + b"x" * 12_000_000 + b'"}',
        json.dumps(header).encode() + b" " * 10**6,
    ]
    return pack(rng.choice(parts), data)


def no_json(rng, header, data):
    text = json.dumps(header)
    return pack(
        rng.choice(
            [
                rng.randbytes(300),
                b"{" + rng.randbytes(300),
                text.replace('"', "'").encode(),
                b"{}",
                b"{",
                b"[]",
                b"null",
                text.encode("utf-16"),
                text.replace("8", "NaN", 1).encode(),
                b'{"\xff": 1}',
                b"{" + b"9" * 9999,
            ]
        ),
        data,
    )


def metadata(rng, header, data):
    header["__metadata__"] = rng.choice(
        [*JUNK, {"format": 1}, {"format": "pt", "a": None}, {"format": "pt", "x": "\x00"}]
    )


def other_keys(rng, header, data):
    key = rng.choice([key for key in header if key != "__metadata__"])
    entry = header.pop(key)
    new = rng.choice(
        [key.upper(), f"../{key}", key + "\x00", "x" * 5000, f"model.{key}", key[:-1], "", key.replace(".", "..")]
    )
    if rng.random() < 0.8:
        header[new] = entry


def not_finite(rng, header, data):
    values = np.frombuffer(bytearray(data), np.float32).copy()
    values[rng.randrange(len(values))] = rng.choice([np.nan, np.inf, -np.inf])
    return pack(header, values.tobytes())


def flipped_bytes(rng, header, data):
    whole = bytearray(pack(header, data))
    limit = rng.choice([8, len(whole) - len(data), len(whole)])
    for _ in range(rng.choice([1, 1, 2, 8])):
        whole[rng.randrange(limit)] = rng.randrange(256)
    return bytes(whole)


def something_else(rng, header, data):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize {rng.randrange(10**12)}\n"
    kinds = [
        b"",
        pointer.encode(),
        b"<!DOCTYPE html><html>",
        b"\n <html>",
        b'{"error":"Repository not found"}',
        bytes(5000),
        b"\x1f\x8b" + rng.randbytes(99),
        b"GGUF" + rng.randbytes(99),
        b"PK\x03\x04" + rng.randbytes(99),
        b"\x80\x02" + rng.randbytes(99),
        b"Entry not found",
        rng.randbytes(rng.randrange(2000)),
    ]
    return rng.choice(kinds)


FAULTS = [
    wrong_length,
    moved_offset,
    moved_place,
    shared_place,
    junk_in_entry,
    junk_for_entry,
    missing_in_entry,
    wrong_dtype,
    wrong_shape,
    claimed_size,
    repeated_key,
    repeated_key_within,
    cut_off,
    too_long,
    deep,
    huge,
    no_json,
    metadata,
    other_keys,
    not_finite,
    flipped_bytes,
    something_else,
]
HARMLESS = {
    "not_finite",
    "metadata",
    "flipped_bytes",
    "wrong_dtype",
    "shared_place",
    "huge",
    "other_keys",
    "wrong_length",
    "wrong_shape",
    "repeated_key",  # the library takes the last
    "junk_in_entry",  # and ignores a fourth item
}
"""Faults that a file may have and still say plainly what its tensors are, such as other bytes for a weight."""


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_safetensors(folder, state, fault, count):
    """Many files a fault."""
    rng, path = random.Random(fault.__name__), folder / "model.safetensors"
    whole = save(state)
    length = int.from_bytes(whole[:8], "little")
    text, data = whole[8 : 8 + length], whole[8 + length :]
    loaded = 0
    for _ in range(count):
        header = json.loads(text)
        made = fault(rng, header, data)
        path.write_bytes(pack(header, data) if made is None else made)
        result = watched(folder, ["model.safetensors"])
        if isinstance(result, CLIPTextModel):
            loaded += 1
            mine = result.state_dict()
            for key, value in read(path):
                ours = TABLES["CLIPTextModel"].ours(key)
                assert torch.equal(mine[ours].nan_to_num(1e9), value.nan_to_num(1e9))
    assert loaded == (count if fault is not_finite else 0) or fault.__name__ in HARMLESS
    assert loaded < 60 or fault in (not_finite, repeated_key)


# Pickles


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save_old(value, path, protocol=2):
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def test_pickles_with_code(folder, state, tmp_path_factory):
    """Refused by name, and nothing of it runs: in both of torch's formats, in a plain pickle, in each protocol."""
    canary = tmp_path_factory.mktemp("canary") / "ran"
    path = folder / "pytorch_model.bin"
    calls = [
        Call(os.system, f"touch {canary}"),
        Call(exec, f"open({str(canary)!r}, 'w')"),
        Call(eval, f"open({str(canary)!r}, 'w')"),
        Call(Path.touch, canary),
        Call(open, str(canary), "w"),
        Call(bytearray, 10**11),
        Call(torch.load, str(canary)),
        Call(getattr, Call(__import__, "os"), "system"),
    ]
    names = [
        "posix.system",
        "builtins.exec",
        "builtins.eval",
        "pathlib",
        "io.open",
        "builtins.bytearray",
        "torch",
        "getattr",
    ]
    count = 0
    for call, name in zip(calls, names, strict=True):
        for protocol in range(6):
            for content in (call, {**state, "x": call}, {"state_dict": state, "callbacks": [call]}):
                for write in (
                    lambda value, protocol: torch.save(value, path, pickle_protocol=protocol),
                    lambda value, protocol: save_old(value, path, protocol),
                    lambda value, protocol: path.write_bytes(pickle.dumps(value, protocol)),
                ):
                    try:
                        write(content, protocol)
                    except (pickle.PicklingError, RuntimeError, AttributeError, TypeError):  # torch cannot write it so
                        continue
                    count += 1
                    result = watched(folder, ["pytorch_model.bin"])
                    assert isinstance(result, CheckpointError)
                    if protocol == 2 and content is not call:
                        leaf = name.split(".")[-1]
                        assert leaf in str(result) or "cannot be read" in str(result) or "damaged" in str(result), str(
                            result
                        )
    assert count > 200
    assert not canary.exists()


@pytest.mark.parametrize("count", [15, pytest.param(150, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("form", ["zip", "old", "program"])
def test_damaged_pickles(folder, state, form, count):
    """Flipped, cut, and rewritten bytes. A flip among the weights' own bytes is a file with other weights."""
    rng, path = random.Random(form), folder / "pytorch_model.bin"
    (save_old if form == "old" else torch.save)(state, path)
    whole = path.read_bytes()
    if form == "program":
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            program = archive.read(name)
        begin = whole.index(program)
    for _ in range(count):
        damaged = bytearray(whole)
        kind = rng.randrange(4)
        if form == "program":
            for _ in range(rng.choice([1, 1, 2, 5])):
                damaged[begin + rng.randrange(len(program))] = rng.randrange(256)
        elif kind == 0:
            del damaged[rng.randrange(len(whole)) :]
        elif kind == 1:
            place = rng.randrange(len(whole))
            del damaged[place : place + rng.randint(1, 99)]
        else:
            limit = rng.choice([64, 3000, len(whole)])
            for _ in range(rng.choice([1, 2, 9])):
                damaged[-1 - rng.randrange(limit) if kind == 2 else rng.randrange(limit)] = rng.randrange(256)
        path.write_bytes(damaged)
        result = watched(folder, ["pytorch_model.bin"])
        if isinstance(result, CLIPTextModel):
            ours = result.state_dict()
            assert {key: tuple(ours[TABLES["CLIPTextModel"].ours(key)].shape) for key in state} == {
                key: tuple(value.shape) for key, value in state.items()
            }
            [p.sum() for p in ours.values()]  # every byte of it can be read


def test_archives_that_swell(folder, state):
    """Compressed parts, parts that lie over each other, two programs: a small file must not become a large one."""
    path = folder / "pytorch_model.bin"
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in parts if name.endswith("data.pkl"))
    for change in (lambda p: p, lambda p: p | {program: parts[program] + b"0" * 10**8}):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in change(parts).items():
                archive.writestr(name, content)
        assert "compressed" in str(watched(folder, ["pytorch_model.bin"]))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (parts | {"b/data.pkl": parts[program]}).items():
            archive.writestr(name, content)
    assert "2 programs" in str(watched(folder, ["pytorch_model.bin"]))
    torch.save({**state, "epoch": 3}, path)
    assert "'epoch' is not a tensor but int" in str(watched(folder, ["pytorch_model.bin"]))
    torch.save(state, path)
    content, part = path.read_bytes(), f"{program[:-8]}data/0".encode()
    end = content.index(b"PK\x01\x02")  # the list of parts, where each says its size: one says a hundred million
    place = end + content[end:].index(part) - 46
    assert content[place : place + 4] == b"PK\x01\x02"
    path.write_bytes(content[: place + 20] + struct.pack("<II", 10**8, 10**8) + content[place + 28 :])
    assert "larger than the file" in str(watched(folder, ["pytorch_model.bin"]))


# JSON files


def test_configs(folder, state):
    """Junk in each field, in the text, and numbers that no network can have."""
    rng, path = random.Random(0), folder / "config.json"
    (folder / "model.safetensors").write_bytes(save(state))
    text = json.dumps(CONFIG)
    fields = [key for key in CONFIG if key != "architectures"]
    texts = [json.dumps(CONFIG | {field: junk}) for field in fields for junk in JUNK]
    texts += [
        "[" * 10**5,
        '{"a":' * 10**5,
        "",
        "null",
        "[]",
        "<html>",
        text[:-5],
        text.replace('"', "'"),
        text + text,
        "\x00" * 99,
    ]
    texts += [text[:-1] + f', "{field}": 3}}' for field in fields]
    texts += [
        '{"a":[' + "[]," * 10**6 + "[]]}",
        " " * 2**24 + text,
        "version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n",
    ]
    for _ in range(60):
        damaged = bytearray(text.encode())
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        texts.append(damaged.decode("latin-1"))
    for content in texts:
        path.write_text(content, encoding="latin-1")
        watched(folder, ["config.json", "model.safetensors"])
    assert len(texts) > 190


def test_indexes(folder, state):
    """Paths that leave the folder, names that are none, and links."""
    for suffix in ("safetensors", "bin"):
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        outside = folder.parent / f"outside.{suffix}"
        (outside.write_bytes(save(state)) if suffix == "safetensors" else torch.save(state, outside))
        names = [
            f"../outside.{suffix}",
            f"./../outside.{suffix}",
            str(outside),
            f"a/../../outside.{suffix}",
            f"..\\outside.{suffix}",
            "..",
            ".",
            "",
            "/",
            "/etc/passwd",
            "/dev/zero",
            "~/x",
            "x\x00",
            f"x\x00.{suffix}",
            "x" * 5000 + f".{suffix}",
            f"é.{suffix}",
            f"\ud800.{suffix}",
            f" .{suffix}",
            f"missing.{suffix}",
            "config.json",
            f"con:.{suffix}",
            f"http://127.0.0.1:9/x.{suffix}",
        ]
        for value in [*names, *JUNK]:
            for index in (
                {"weight_map": {"a": value}},
                {"weight_map": dict.fromkeys(state, value)},
                {"weight_map": value},
            ):
                (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
                assert isinstance(watched(folder, [f"{stem}.{suffix}.index.json", str(folder)]), CheckpointError)
        (folder / f"{stem}.{suffix}.index.json").unlink()


def test_links(folder, state):
    """A link is followed to a regular file, as the Hub's cache needs; to nothing, devices and pipes it is not."""
    path = folder / "model.safetensors"
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_bytes(save(state))
    path.symlink_to("../blobs/abc")
    result = watched(folder)
    assert all(
        torch.equal(result.state_dict()[TABLES["CLIPTextModel"].ours(key)], value) for key, value in state.items()
    )
    os.mkfifo(folder.parent / "pipe")
    (folder.parent / "secret").write_text("password 123")
    for target in ("nowhere", "model.safetensors", "/dev/zero", "/dev/null", "../pipe", "..", "../secret"):
        path.unlink()
        path.symlink_to(target)
        result = watched(folder, ["model.safetensors"])
        assert isinstance(result, CheckpointError)
        assert "123" not in str(result)
        if target in ("nowhere", "model.safetensors"):
            assert "symbolic link that leads to no file" in str(result)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../secret")
    result = watched(folder, ["config.json"])
    assert isinstance(result, CheckpointError)
    assert "123" not in str(result)


MESSAGES = {
    "cut off": (lambda w: w[:-100], r".*is damaged, cut off or of a newer format: .*Download it again"),
    "Git-LFS pointer": (
        lambda w: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3463726504\n",
        "is a Git-LFS pointer, a note of where the file of 3,463,726,504 bytes is; run `git lfs pull`",
    ),
    "web page": (lambda w: b"<!DOCTYPE html>\n<html>", "is a web page saved under this name"),
    "empty": (lambda w: b"", "is empty; download it again"),
    "hole": (lambda w: bytes(len(w)), "begins with nothing but zeros"),
    "pickle": (lambda w: b"PK\x03\x04" + bytes(99), "is a pickle under the name of a safetensors file"),
    "gzip": (lambda w: b"\x1f\x8b" + w, "is a gzip archive; unpack it"),
    "GGUF": (lambda w: b"GGUF" + w, "is a GGUF file, which this package does not read"),
    "error": (lambda w: b'{"error":"Invalid credentials"}', "is an error message of a server"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_lies_there_instead_is_named(folder, state, case):
    make, message = MESSAGES[case]
    (folder / "model.safetensors").write_bytes(make(save(state)))
    with pytest.raises(CheckpointError, match=f"model.safetensors.* {message}"):
        CLIPTextModel.from_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "model.safetensors").unlink()
    if case != "pickle":
        (folder / "pytorch_model.bin").write_bytes(make(whole))
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            CLIPTextModel.from_pretrained(folder)


PLACES = {  # of two tensors of 8 bytes, bytes of data
    "overlap": ([0, 8], [4, 12], 12),
    "same place": ([0, 8], [0, 8], 8),
    "gap": ([0, 8], [12, 20], 20),
    "beyond the end": ([0, 8], [8, 16], 12),
    "more than promised": ([0, 8], [8, 16], 20),
    "too small": ([0, 8], [8, 12], 12),
    "backwards": ([0, 8], [16, 8], 16),
    "before the data": ([-8, 0], [0, 8], 8),
    "truth value": ([False, 8], [8, 16], 16),
    "fraction": ([0.0, 8.0], [8, 16], 16),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_are_checked_by_the_library(tmp_path, case):
    first, second, size = PLACES[case]
    places = {"a": first, "b": second}
    header = {key: {"dtype": "F32", "shape": [2], "data_offsets": place} for key, place in places.items()}
    (tmp_path / "x.safetensors").write_bytes(pack(header, bytes(size)))
    with pytest.raises(CheckpointError, match=r"x\.safetensors.* cut off.*Download it again"):
        read_header(tmp_path / "x.safetensors")


def test_what_is_too_long_or_no_json_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(pack(b'{"__metadata__":{}}' + b" " * 2**21, b""))
    with pytest.raises(CheckpointError, match=r"claims a header of 2,097,171 bytes, at most 2,097,152 are read"):
        read_header(tmp_path / "x.safetensors")
    for content, message in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n", "is a Git-LFS pointer"),
        ("\n<!DOCTYPE html>", "is a web page saved under this name"),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(CheckpointError, match=rf"x\.json .*{message}"):
            read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{}" + " " * 2**23)
    with pytest.raises(CheckpointError, match=r"has 8,388,610 bytes, at most 8,388,608 of JSON are read"):
        read_json(tmp_path / "x.json")
