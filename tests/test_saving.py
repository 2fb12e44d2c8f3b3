"""Saving is all or nothing: killed at any moment, the folder is the old checkpoint or the new one, whole."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_checkpoint import build_pipeline

from depthdiff import CheckpointError, StableDiffusionDepth2ImgPipeline, UNet2DConditionModel
from depthdiff.checkpoint import saving

ROOT = Path(__file__).parent.parent

WRITER = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)  # a process with one thread may fork
from random_checkpoint import build_pipeline
pipes = [build_pipeline("tiny", seed) for seed in (0, 100)]
start = time.perf_counter()
pipes[0].save_pretrained(sys.argv[1], max_shard_size="20KB")
seconds = time.perf_counter() - start
for line in sys.stdin:
    saves, part, turn = int(line.split()[0]), float(line.split()[1]), int(line.split()[2])
    begun, told = os.pipe()
    child = os.fork()
    if child == 0:
        for turn in range(turn, turn + 200):
            os.write(told, b".")
            pipes[turn % 2].save_pretrained(sys.argv[1], max_shard_size="20KB")
        os._exit(0)
    for _ in range(saves + 1):
        os.read(begun, 1)
    time.sleep(part * seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(begun)
    os.close(told)
    print("killed", flush=True)
"""


def fingerprint(folder):
    """Sum the weights of every network of a checkpoint."""
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder)
    return tuple(
        sum(p.double().sum().item() for p in network.state_dict().values()) for network in pipe.networks.values()
    )


def test_killed_at_any_moment(tmp_path):
    """Fifty kills of processes that save two checkpoints in turns over each other; five begin without a folder."""
    folder = tmp_path / "checkpoint"
    whole = {}
    for seed in (0, 100):
        build_pipeline("tiny", seed).save_pretrained(folder)
        whole[fingerprint(folder)] = seed
    assert len(whole) == 2
    rng, seen, half_done = random.Random(0), [], 0
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = ['{ROOT}/scripts', '{ROOT}']\n" + WRITER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, str(folder)], **pipes) as writer:
        for kill in range(50):
            if kill % 10 == 9:
                shutil.rmtree(folder, ignore_errors=True)
            writer.stdin.write(f"{rng.randrange(3)} {rng.random()} {kill}\n")  # within the first, second or third save
            writer.stdin.flush()
            assert writer.stdout.readline() == "killed\n"
            if folder.exists():  # else the first save had not come to its end
                seen.append(whole[fingerprint(folder)])
            for path in tmp_path.glob(".checkpoint.saving-*"):
                half_done += 1
                shutil.rmtree(path)
        writer.stdin.close()
    assert len(seen) >= 35
    assert half_done >= 15  # the kills came while files were being written
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] in (["checkpoint"], [])


def test_a_link_to_a_folder_stays_a_link(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    build_pipeline("tiny", 100).unet.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not torch.equal(UNet2DConditionModel.from_pretrained(tmp_path / "real").conv_in.bias, pipe.unet.conv_in.bias)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two renames"])
def test_over_an_old_checkpoint(pipe, tmp_path, monkeypatch, exchange):
    """What the user has beside it stays; parts of the old weights do not."""
    if not exchange:
        monkeypatch.setattr(saving, "_exchange_in_one_step", lambda new, folder: False)
    folder = tmp_path / "checkpoint"
    pipe.save_pretrained(folder, max_shard_size="50KB")
    (folder / "README.md").write_text("mine")
    (folder / "unet" / "notes").mkdir()
    (folder / "unet" / "notes" / "a.txt").write_text("also mine")
    before = len(list((folder / "unet").glob("*.safetensors")))
    other = build_pipeline("tiny", 100)
    other.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "unet" / "notes" / "a.txt").read_text() == "also mine"
    assert before > 1
    assert [path.name for path in (folder / "unet").glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]
    loaded = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    for key, value in other.unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_stays_of_an_old_folder(pipe, tmp_path, monkeypatch):
    """Its rights, its links, and its other files also where the file system has no hard links."""
    folder = tmp_path / "unet"
    pipe.unet.save_pretrained(folder, max_shard_size="50KB")
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in pipe.unet.state_dict().values())
    folder.chmod(0o750)
    (tmp_path / "elsewhere").write_text("theirs")
    (folder / "link").symlink_to("../elsewhere")
    (folder / "README.md").write_text("mine")
    for links in (True, False):
        if not links:
            monkeypatch.setattr(saving.os, "link", without_links)
        pipe.unet.save_pretrained(folder)
        assert folder.stat().st_mode & 0o777 == 0o750
        assert (folder / "link").readlink() == Path("../elsewhere")
        assert (folder / "README.md").read_text() == "mine"
        names = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "link"]
        assert sorted(path.name for path in folder.iterdir()) == names  # and no parts of the old weights


def without_links(*paths, **options):
    raise OSError(95, "Operation not supported")


def test_weights_in_another_memory_layout_are_saved_as_they_are(pipe, tmp_path):
    """A pipeline that has worked holds its convolutions channels last, which no file can say."""
    expected = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    pipe.unet.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "unet")
    for key, value in UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict().items():
        assert torch.equal(value, expected[key])


def test_a_pipeline_without_a_part(pipe, tmp_path):
    """Its index says that there is none, and loading asks for one."""
    pipe.depth_estimator = None
    pipe.save_pretrained(tmp_path / "checkpoint")
    index = json.loads((tmp_path / "checkpoint" / "model_index.json").read_text())
    assert index["depth_estimator"] == [None, None]
    with pytest.raises(CheckpointError, match=r"has no depth_estimator.*pass one as depth_estimator="):
        StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "checkpoint")
    again = StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "checkpoint", depth_estimator=None)
    assert again.depth_estimator is None


def test_a_variant_beside_the_plain_weights(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "unet")
    pipe.unet.half().save_pretrained(tmp_path / "unet", variant="fp16")
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype="auto").dtype == torch.float32
    half = UNet2DConditionModel.from_pretrained(tmp_path / "unet", variant="fp16", torch_dtype="auto")
    assert half.dtype == torch.float16


def test_saving_over_the_folder_that_is_in_use(tmp_path):
    """The weights are mapped from the very files that are replaced."""
    build_pipeline("tiny").save_pretrained(tmp_path / "checkpoint")
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "checkpoint")
    expected = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    pipe.save_pretrained(tmp_path / "checkpoint")
    again = StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "checkpoint")
    for key, value in expected.items():
        assert torch.equal(pipe.unet.state_dict()[key], value)
        assert torch.equal(again.unet.state_dict()[key], value)


def test_a_failure_leaves_the_old_folder_and_nothing_else(pipe, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    pipe.save_pretrained(folder)
    old = fingerprint(folder)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        build_pipeline("tiny", 100).save_pretrained(folder)
    assert fingerprint(folder) == old
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_places_that_cannot_be_written(pipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError, match="is a file"):
        pipe.save_pretrained(tmp_path / "file")
    with pytest.raises(FileExistsError, match="file"):
        pipe.unet.save_pretrained(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="safe_serialization"):
        pipe.unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_new_folders_may_be_deep_and_have_ordinary_rights(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "a" / "b" / "c")
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "a" / "b" / "c").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    shutil.rmtree(tmp_path / "a")
