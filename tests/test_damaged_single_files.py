"""600 damaged single files, and pickles with code: refused by name, quickly and unrun, or read rightly."""

import json
import os
import pickle
import random
import re
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save

from depthdiff import AutoencoderKL, CheckpointError, StableDiffusionDepth2ImgPipeline
from depthdiff.checkpoint import weights
from tests.ldm import Geometry, random_twins

TINY = Geometry(channels=(32, 64), attended=(True, False), layers=1, context=64, vae=(32, 64), vae_layers=1,
                vocab=300, text_layers=2, text_ff=64, vit=64, vit_layers=2, vit_ff=64, grid=2, stem=32,
                bit=(128, 128, 256), bit_layers=(1, 1, 1), neck=(128, 128, 32, 32), fusion=32)  # fmt: skip
ROUNDS = [30, pytest.param(300, marks=pytest.mark.fuzz)]
SECONDS = 1.0
"""Of the process's own time, for one file."""


@pytest.fixture(scope="module")
def tensors():
    """The autoencoder of a single file: small, and all of its path through the loader is the same."""
    single, _ = random_twins(TINY, dtype=torch.bfloat16)
    return {key: tensor for key, tensor in single.items() if key.startswith("first_stage_model.")}


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rewrite(data, change):
    """Change the header of a safetensors file and keep its tensors."""
    [length] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def some(header, rng):
    return header[rng.choice([key for key in header if key != "__metadata__"])]


def offsets(header, rng):
    some(header, rng)["data_offsets"][rng.randrange(2)] += rng.choice([-(2**40), -1000, -2, 2, 64, 2**20, 2**62])


def shapes(header, rng):
    entry = some(header, rng)
    entry["shape"] = rng.choice([[], [0], [2**31, 2**31], [-1], [1] * 80, [1.5], "x", None, [*entry["shape"], 2]])


def dtypes(header, rng):
    some(header, rng)["dtype"] = rng.choice(["F32", "I8", "F8_E4M3", "BOOL", "C64", "none", 7, None])


def names(header, rng):
    key = rng.choice([key for key in header if key != "__metadata__"])
    new = rng.choice(["", "a" * 5000, "../" + key, key + ".x", key.replace("first_stage_model.", ""), "\x00" + key])
    header[new] = header.pop(key)


def twice(header, rng):
    key = rng.choice([key for key in header if key != "__metadata__"])
    return json.dumps(header).encode()[:-1] + f",{json.dumps(key)}:{json.dumps(header[key])}}}".encode()


def not_json(header, rng):
    text = json.dumps(header).encode()
    return rng.choice(
        [b"[]", b"{", b"{}", text[: len(text) // 2], b'{"a":' * 50000, b"\xff" * 99, b" " * 99, text + b"}"]
    )


HEADERS = (offsets, shapes, dtypes, names, twice, not_json)


def damage(data, rng):
    """Make a damaged safetensors file."""
    kind = rng.randrange(10)
    if kind < 6:
        change = HEADERS[kind]
        return rewrite(data, lambda header: change(header, rng))
    if kind == 6:
        return data[: rng.randrange(len(data))]
    if kind == 7:
        return struct.pack("<Q", rng.choice([0, 1, 2**20, 2**31, 2**63 - 1, 2**64 - 1])) + data[8:]
    if kind == 8:
        return rng.choice(
            [b"", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", b"\0" * 999]
        )
    place = rng.randrange(8, struct.unpack("<Q", data[:8])[0])
    return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


def damage_pickle(data, rng):
    """Make a damaged file of torch's: cut off, with bytes changed, or with bytes put in."""
    kind, place = rng.randrange(4), rng.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data[place + rng.randrange(1, 99) :]
    near = rng.randrange(min(len(data), 60000)) if kind == 2 else place
    return data[:near] + rng.randbytes(rng.choice([1, 4, 64])) + data[near + 4 :]


def as_pickle(tensors, path, zipped):
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def try_to_load(path):
    """Return the autoencoder's weights where the file loads, else None; check the error, the time and the memory."""
    began, before = time.process_time(), resident()
    state = None
    try:
        state = AutoencoderKL.from_single_file(path, torch_dtype="auto").state_dict()
    except CheckpointError as error:
        assert path.name in str(error) or "autoencoder" in str(error).lower(), error
        assert len(str(error)) < 1500
    assert time.process_time() - began < SECONDS
    assert resident() - before < 3 * path.stat().st_size + 30e6
    return state


@pytest.mark.parametrize("rounds", ROUNDS)
def test_damaged_safetensors(tensors, tmp_path, rounds):
    """What loads has exactly the tensors that the safetensors library reads from the same file."""
    data, rng, loaded = save(tensors), random.Random(0), 0
    for number in range(rounds):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(damage(data, rng))
        state = try_to_load(path)
        if state is not None:
            loaded += 1
            expected = load_file(path)["first_stage_model.encoder.conv_in.weight"]
            assert torch.equal(state["encoder.conv_in.weight"], expected)
        path.unlink()
    assert loaded <= rounds / 4  # a name that is there twice is, as in the library, the last


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles(tensors, tmp_path, zipped, rounds):
    """A byte changed within a tensor is a tensor with that byte: pickles have no check sum that is read."""
    data, rng = as_pickle(tensors, tmp_path / "good.ckpt", zipped), random.Random(zipped)
    for number in range(rounds // 2):
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(damage_pickle(data, rng))
        try_to_load(path)
        path.unlink()


class Code:
    """Runs a call when it is unpickled by a reader that trusts it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(mark):
    yield Code(os.system, f"touch {mark}")
    yield Code(exec, f"open({str(mark)!r}, 'w')")
    yield Code(__import__, "webbrowser")
    yield {"state_dict": Code(open, str(mark), "w")}
    yield {"state_dict": {"first_stage_model.quant_conv.weight": Code(os.mkdir, str(mark))}}
    yield {"callbacks": [Code(print, "x")], "state_dict": {}}


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_pickles_with_code_are_refused_and_not_run(tensors, tmp_path, form):
    mark = tmp_path / "mark"
    for number, attack in enumerate(attacks(mark)):
        path = tmp_path / f"{number}.ckpt"
        content = {"state_dict": dict(tensors), "extra": attack}
        if form == "bare":
            path.write_bytes(pickle.dumps(content["extra"], protocol=2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        with pytest.raises(CheckpointError, match=rf"{number}\.ckpt"):
            StableDiffusionDepth2ImgPipeline.from_single_file(path)
        assert not mark.exists()


def test_torch_refuses_what_the_look_through_would_have_let_by(tensors, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setattr(weights, "_names_in_zip", lambda *_: ())
    monkeypatch.setattr(weights, "_names_in_stream", lambda *_: ())
    for number, attack in enumerate(attacks(mark)):
        torch.save({"state_dict": dict(tensors), "extra": attack}, tmp_path / f"{number}.ckpt")
        with pytest.raises(CheckpointError, match="cannot be read as a pickle of tensors"):
            weights.open_pickle(tmp_path / f"{number}.ckpt")
        assert not mark.exists()


def programs(module, name):
    """Name a global in every way that a pickle has; a name of the older ways may hold dots."""
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    yield b"\x80\x02c" + f"{module}\n{name}\n.".encode()
    yield b"\x80\x02(i" + f"{module}\n{name}\n.".encode()
    yield b"\x80\x04" + texts + b"\x93."


CALLS = (
    "posix.system", "os.Storage", "builtins.eval", "builtins.getattr", "builtins.float32", "torch.hub.load",
    "torch.serialization.load", "torch.storage._load_from_bytes", "torch._utils._rebuild_wrapper_subclass",
    "collections.namedtuple", "torch.nn.parameter.Buffer",
)  # fmt: skip


def test_the_look_through_lets_by_what_makes_tensors_alone(tmp_path):
    """Of all that torch has on its top level dtypes, storages and sizes; in each of the five programs of a file."""
    path, nothing = tmp_path / "x.ckpt", pickle.dumps(None, protocol=2)
    good = {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    good |= {f"torch.{name}" for name in vars(torch) if name.endswith("Storage")} | {"torch.Size"}
    for full in {*CALLS, *(f"torch.{name}" for name in vars(torch))} - good:
        module, _, name = full.rpartition(".")
        for number, program in enumerate(programs(module, name)):
            place = (number + len(full)) % 5
            path.write_bytes(b"".join(program if i == place else nothing for i in range(5)))
            with pytest.raises(CheckpointError, match=rf"it would use {re.escape(full)}\. Nothing of it was run"):
                weights.open_pickle(path)
    path.write_bytes(b"\x80\x02\x82\x07." + nothing * 4)
    with pytest.raises(CheckpointError, match=r"it would use extension\.7\. Nothing"):
        weights.open_pickle(path)


def test_archives_that_unpack_to_more_or_elsewhere(tensors, tmp_path):
    """Compressed parts, a second program, parts with `../`: nothing is written and nothing is believed."""
    good = tmp_path / "good.ckpt"
    as_pickle(tensors, good, True)
    with zipfile.ZipFile(good) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in parts if name.endswith("data.pkl"))
    changes = {
        "bomb": ({**parts, f"{program[:-8]}data/0": b"\0" * 2**27}, zipfile.ZIP_DEFLATED),
        "two programs": ({**parts, "other/data.pkl": parts[program]}, zipfile.ZIP_STORED),
        "outside": ({f"../{name}": part for name, part in parts.items()}, zipfile.ZIP_STORED),
        "empty": ({}, zipfile.ZIP_STORED),
    }
    for case, (content, how) in changes.items():
        path = tmp_path / f"{case}.ckpt"
        with zipfile.ZipFile(path, "w", how) as archive:
            for name, part in content.items():
                archive.writestr(name, part)
        if case == "outside":  # torch may read it; nothing is unpacked
            try_to_load(path)
        else:
            with pytest.raises(CheckpointError, match=case):
                AutoencoderKL.from_single_file(path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".ckpt"] * 5


def test_a_tensor_that_claims_more_than_the_file_holds(tensors, tmp_path):
    """A view that repeats one number a billion times is refused, not filled."""
    key = "first_stage_model.encoder.conv_in.weight"
    torch.save({**tensors, key: torch.zeros(1, dtype=torch.bfloat16).expand(2**15, 2**15)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="claims more numbers than the file holds"):
        AutoencoderKL.from_single_file(tmp_path / "x.ckpt")
