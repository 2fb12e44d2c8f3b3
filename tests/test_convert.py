"""Conversion between folder and single file: bitwise there and back, casts, what is kept, memory, and failure."""

import shutil
import subprocess
import sys

import convert
import pytest
import torch
from safetensors.torch import load_file, save_file

from depthdiff import CheckpointError, StableDiffusionDepth2ImgPipeline
from depthdiff.checkpoint.save import Entry, write_safetensors
from depthdiff.convert import to_folder, to_single_file
from tests.ldm import SMALL, random_twins

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
LOST = (
    "transformer.resblocks.3.",
    "text_projection",
    "logit_scale",
    "pretrained.model.head.",
)
"""What a folder has no place for, besides the noise schedule."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Twins of random bfloat16 weights, the folder made from the file."""
    place = tmp_path_factory.mktemp("convert")
    single, folder = random_twins(SMALL, dtype=torch.bfloat16)
    save_file(single, place / "single.safetensors")
    assert convert.main([str(place / "single.safetensors"), str(place / "folder")]) == 0
    return place, single, folder


def weights(folder, name):
    return load_file(folder / name / f"{STEMS.get(name, 'model')}.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def today(key, component):
    """Spell an autoencoder's attention as diffusers does since 0.17."""
    *path, layer, leaf = key.split(".")
    return ".".join([*path, NEW_NAMES.get(layer, layer), leaf]) if component == "vae" else key


def test_a_file_becomes_the_folder_of_its_twin(place):
    """Also the depth net's layers that nothing reads; only the constants 0..76 are not written."""
    folder, twin = place[0] / "folder", place[2]
    for name, tensors in twin.items():
        expected = {today(key, name): tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}
        assert same(weights(folder, name), expected), name
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder)
    assert len(pipe.tokenizer) == 49408
    assert type(pipe.scheduler).__name__ == "PNDMScheduler"


def test_there_and_back_is_bitwise(place):
    """Folder -> file -> folder is the same; file -> folder -> file lacks what LOST and the schedule name, no more."""
    root, single, _ = place
    to_single_file(root / "folder", root / "back.safetensors")
    back = load_file(root / "back.safetensors")
    kept = {k: v for k, v in single.items() if k.split(".")[0].endswith("model") and not any(x in k for x in LOST)}
    assert same(back, kept)
    to_folder(root / "back.safetensors", root / "again")
    for name in place[2]:
        assert same(weights(root / "folder", name), weights(root / "again", name)), name
        config = (root / "folder" / name / "config.json").read_text()
        assert (root / "again" / name / "config.json").read_text() == config


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_casts(place, tmp_path, name):
    dtype = convert.DTYPES[name]
    assert convert.main([str(place[0] / "folder"), str(tmp_path / "x.safetensors"), "--dtype", name]) == 0
    for key, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, place[1][key].to(dtype)), key


def test_what_cannot_be_converted(place, tmp_path, capsys):
    root = place[0]
    assert convert.main([str(root / "folder"), str(tmp_path / "x.ckpt")]) == 1
    assert "pickles are not written" in capsys.readouterr().err
    unet = {key: tensor for key, tensor in place[1].items() if key.startswith("model.diffusion_model")}
    save_file(unet, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="has no depth_estimator and no text_encoder and no vae"):
        to_folder(tmp_path / "unet.safetensors", tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(root / "folder", broken)
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae/config.json cannot be read"):
        to_single_file(broken, tmp_path / "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "unet.safetensors"]


def test_a_source_is_never_written_over(place, tmp_path, capsys):
    """However it is spelt or linked; and what else is in the target stays."""
    source, folder = tmp_path / "m.safetensors", tmp_path / "folder"
    shutil.copy(place[0] / "single.safetensors", source)
    shutil.copytree(place[0] / "folder", folder)
    (tmp_path / "elsewhere").mkdir()
    (folder / "unet").rename(tmp_path / "elsewhere" / "unet")
    (folder / "unet").symlink_to(tmp_path / "elsewhere" / "unet")
    weights = "unet/diffusion_pytorch_model.safetensors"
    for file in (folder / weights, tmp_path / "elsewhere" / weights, folder / "vae" / ".." / weights):
        before = file.read_bytes()
        assert convert.main([str(folder), str(file)]) == 1
        assert "would be lost" in capsys.readouterr().err
        assert file.read_bytes() == before
    (tmp_path / "target" / "notes").mkdir(parents=True)
    (tmp_path / "target" / "notes" / "mine.bin.txt").write_text("mine")
    (tmp_path / "target" / "style.safetensors").write_text("mine")
    assert convert.main([str(source), str(tmp_path)]) == 1
    assert "is inside" in capsys.readouterr().err
    (tmp_path / "target" / "unet").symlink_to(tmp_path / "back")
    (tmp_path / "back").mkdir()
    linked = tmp_path / "back" / "diffusion_pytorch_model.safetensors"
    shutil.copy(source, linked)
    assert convert.main([str(linked), str(tmp_path / "target")]) == 1
    assert "would be lost" in capsys.readouterr().err
    (tmp_path / "target" / "unet").unlink()
    assert convert.main([str(source), str(tmp_path / "target")]) == 0
    assert source.read_bytes() == (place[0] / "single.safetensors").read_bytes() == linked.read_bytes()
    assert (tmp_path / "target" / "notes" / "mine.bin.txt").read_text() == "mine"
    assert (tmp_path / "target" / "style.safetensors").read_text() == "mine"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)

    def fail():
        raise OSError("no space left")

    def entry(key, read):
        return Entry(key, "F32", (2,), read, lambda: None)

    entries = [entry("a", lambda: torch.zeros(2)), entry("b", fail)]
    with pytest.raises(OSError, match="no space left"):
        write_safetensors(path, entries)
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    with pytest.raises(CheckpointError, match="two tensors would have the name 'a'"):
        write_safetensors(path, entries[:1] * 2)
    write_safetensors(path, [Entry("s", "F16", (), lambda: torch.tensor(2.0), lambda: None), entries[0]])
    assert {key: tensor.shape for key, tensor in load_file(path).items()} == {"a": (2,), "s": ()}


def test_the_file_is_that_of_the_library(tmp_path):
    """Byte for byte: metadata, the order of the tensors, and where they begin."""
    kinds = {torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    tensors = {f"{name}{size}": torch.randn(size).to(kind) for name in "ab" for size in (1, 3) for kind in kinds}
    tensors |= {f"c{kind}": torch.randn(3, 5).to(kind) for kind in kinds} | {"d": torch.randn(2, 1).half()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    entries = [
        Entry(key, kinds[value.dtype], tuple(value.shape), lambda value=value: value, lambda: None)
        for key, value in tensors.items()
    ]
    write_safetensors(tmp_path / "b.safetensors", entries)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    wrong = Entry("a", "F32", (3,), lambda: torch.zeros(2), lambda: None)
    with pytest.raises(CheckpointError, match=r"'a' is \(2,\), expected \(3,\)"):
        write_safetensors(tmp_path / "c.safetensors", [wrong])
    assert not (tmp_path / "c.safetensors").exists()


def test_a_stack_of_two_types_loses_nothing(place, tmp_path):
    shutil.copytree(place[0] / "folder", tmp_path / "mixed")
    path, state = (
        tmp_path / "mixed" / "text_encoder" / "model.safetensors",
        weights(place[0] / "folder", "text_encoder"),
    )
    names = [f"text_model.encoder.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    state[names[1]] = torch.rand(state[names[1]].shape)
    save_file(state, path)
    to_single_file(tmp_path / "mixed", tmp_path / "x.safetensors")
    stacked = load_file(tmp_path / "x.safetensors")[
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    ]
    assert stacked.dtype == torch.float32
    assert torch.equal(stacked, torch.cat([state[name].float() for name in names]))


PEAK = """
import resource, sys, torch
from pathlib import Path
from depthdiff.checkpoint.save import Entry, write_safetensors
from depthdiff.checkpoint.weights import open_safetensors
from depthdiff.checkpoint.weights import give_back
def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
sources = open_safetensors(Path(sys.argv[1]))
base = peak()
def done(source):
    give_back(source.get())
write_safetensors(Path(sys.argv[2]), [
    Entry(key, source.dtype, source.shape, source.get, lambda source=source: done(source))
    for key, source in sources.items()
])
print(peak() - base)
"""


def test_memory_is_that_of_one_tensor(tmp_path):
    """Copying 24 tensors of 8 MB each takes less than 40 MB beyond the start."""
    save_file({f"t{i}": torch.rand(2**21) for i in range(24)}, tmp_path / "a.safetensors")
    arguments = [sys.executable, "-c", PEAK, str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 40e6
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


def test_a_config_that_cannot_be_guessed_is_named(tiny_folder, tmp_path, capsys):
    """Its depth net has fewer groups than any published one; the file is written, and a config makes it load."""
    file, again = tmp_path / "x.safetensors", tmp_path / "again"
    assert convert.main([str(tiny_folder), str(file)]) == 0
    assert "depth_estimator: " in capsys.readouterr().err
    assert convert.main([str(file), str(again)]) == 1
    assert convert.main([str(file), str(again), "--config", str(tiny_folder)]) == 0
