"""Saving is all or nothing, and touches nothing but the files of the checkpoint. Random kills: test_kills.py."""

import json
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch
from random_checkpoint import build_pipeline

from depthdiff import CheckpointError, CLIPTokenizer, StableDiffusionDepth2ImgPipeline, UNet2DConditionModel
from depthdiff.checkpoint.save import owned_files
from depthdiff.checkpoint.transaction import replacing


def fingerprint(folder):
    """Sum the weights of every network of a checkpoint."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, kind in index.items() if kind == [None, None]}
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder, **absent)
    return tuple(
        sum(p.double().sum().item() for p in network.state_dict().values()) for network in pipe.networks.values()
    )


def names_below(folder):
    """List everything below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_killed_between_any_two_steps(tmp_path, monkeypatch):
    """Every call that changes a name on the disk is the last one of a process once: the checkpoint is the old one or
    the new one, the next load or save finishes what was begun, and nothing else is left."""
    old, new = build_pipeline("tiny"), build_pipeline("tiny", 100)
    for one in (old, new):
        one.vae = one.text_encoder = one.depth_estimator = one.tokenizer = None
    start, folder = tmp_path / "start", tmp_path / "checkpoint"
    old.save_pretrained(start, max_shard_size="200KB")
    (start / "README.md").write_text("mine")
    whole = {fingerprint(start): "old"}
    new.save_pretrained(tmp_path / "new")
    whole[fingerprint(tmp_path / "new")] = "new"
    (tmp_path / "new" / "README.md").write_text("mine")
    seen = []
    for last in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        with monkeypatch.context() as patch:
            done = end_at(patch, last)
            try:
                new.save_pretrained(folder)
            except Ended:
                pass
            else:
                assert len(done) == last
                break
        if last % 3:
            seen.append(whole[fingerprint(folder)])
        else:  # a save comes first
            old.scheduler.save_pretrained(folder / "notes")
            seen.append(whole[fingerprint(folder)])
            shutil.rmtree(folder / "notes")
        new.save_pretrained(folder)
        assert names_below(folder) == names_below(tmp_path / "new")
    assert seen == sorted(seen, reverse=True), "once it is the new one it stays so"
    assert seen.count("old") > 5  # 10 observed: before the journal, only whole files take their names
    assert seen.count("new") > 20


class Ended(BaseException):
    """Stands for a kill; from then on nothing may be changed any more."""


def end_at(patch, last):
    """Let the call number `last` of those that change names raise, and every one after it."""
    done = []
    for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
        real = getattr(os, name)

        def counted(*args, real=real, **kwargs):
            if len(done) == last:
                raise Ended
            result = real(*args, **kwargs)
            done.append(real.__name__)
            return result

        patch.setattr(os, name, counted)
    return done


def test_a_folder_is_not_touched_but_for_the_names_that_are_written(pipe, tmp_path):
    """Its identity, rights and times of what is not ours, links, what comes meanwhile, and folders that are open."""
    folder = tmp_path / "checkpoint"
    (folder / "unet").mkdir(parents=True)
    (folder / "private").mkdir()
    (folder / "private").chmod(0o700)
    (folder / "private" / "model.safetensors.bak").write_text("theirs")
    (folder / "unet" / "logs.bin.txt").write_text("theirs")
    (folder / "other-00001-of-00002.safetensors").write_text("theirs")
    (tmp_path / "elsewhere").mkdir()
    (folder / "vae").symlink_to(tmp_path / "elsewhere")  # another disk, say
    os.utime(folder / "unet" / "logs.bin.txt", (1, 1))
    folder.chmod(0o750)
    before = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    was = Path.cwd()
    os.chdir(folder)
    try:
        meanwhile = threading.Event()
        logger = threading.Thread(target=keep_logging, args=(folder, meanwhile))
        logger.start()
        for target in (".", folder, os.path.join("..", "checkpoint")):
            pipe.save_pretrained(target)
        assert Path("model_index.json").is_file()
        meanwhile.set()
        logger.join()
    finally:
        os.chdir(was)
    for path, found in before.items():
        now = path.lstat()
        same = ("st_ino", "st_mode", "st_uid") if stat.S_ISDIR(found.st_mode) else ("st_ino", "st_mode", "st_mtime")
        assert all(getattr(now, key) == getattr(found, key) for key in same), path
    logs = sorted(folder.glob("log-*"))
    assert [log.read_text() for log in logs] == [str(number) for number in range(len(logs))]
    assert (tmp_path / "elsewhere" / "config.json").is_file()
    assert fingerprint(folder)


def keep_logging(folder, end):
    """Write files into a folder until the end."""
    for number in range(10_000):
        if end.wait(0.002):
            break
        (folder / f"log-{number:04}").write_text(str(number))


def test_places_of_another_kind_are_refused_before_anything_is_written(pipe, tmp_path):
    """By name; and then nothing is there that was not there before."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "one" / "model_index.json").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "unet").write_text("a note")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "scheduler").symlink_to("nowhere")
    before = names_below(tmp_path)
    for target, error, message in (
        ("", ValueError, "save_directory must name a folder, got an empty text"),
        (None, TypeError, "save_directory must be a path or a name, got NoneType"),
        (3, TypeError, "save_directory must be a path or a name, got int 3"),
        (b"x", TypeError, "save_directory must be a path or a name, got bytes"),
        (tmp_path / "file", NotADirectoryError, "save_directory is a file"),
        (tmp_path / "file" / "below", NotADirectoryError, "save_directory is a file or in one"),
        (tmp_path / "one", IsADirectoryError, "is a folder.*model_index.json"),
        (tmp_path / "two", NotADirectoryError, "a file is where a folder is needed.*unet"),
        (tmp_path / "three", NotADirectoryError, "a file is where a folder is needed.*scheduler"),
    ):
        with pytest.raises(error, match=message):
            pipe.save_pretrained(target)
    for part in (pipe.unet, pipe.scheduler, pipe.tokenizer, pipe.feature_extractor):
        for target in ("", None, tmp_path / "file"):
            with pytest.raises((ValueError, TypeError, NotADirectoryError), match="save_directory"):
                part.save_pretrained(target)
    for name, values in {
        "variant": ["../x", 5, "", "*"],
        "max_shard_size": [0, -1, "x", True, "5 apples"],
    }.items():
        for value in values:
            with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
                pipe.save_pretrained(tmp_path / "new", **{name: value})
    assert names_below(tmp_path) == before


def test_a_read_only_file_is_not_replaced(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path)
    (tmp_path / "config.json").chmod(0o444)
    if os.access(tmp_path / "config.json", os.W_OK):
        pytest.skip("root may write everything")
    with pytest.raises(PermissionError, match="read-only"):
        pipe.unet.save_pretrained(tmp_path)


def test_a_link_to_a_file_is_replaced_and_not_followed(pipe, tmp_path):
    """As the cache of huggingface_hub keeps its files: what they lead to belongs to other checkpoints as well."""
    pipe.unet.save_pretrained(tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    for path in list((tmp_path / "snapshot").iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    build_pipeline("tiny", 100).unet.save_pretrained(tmp_path / "snapshot")
    assert {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()} == before
    new = UNet2DConditionModel.from_pretrained(tmp_path / "snapshot")
    assert not torch.equal(new.conv_in.bias, pipe.unet.conv_in.bias)


EVIL = {
    "leads out": {"": {"replace": [], "remove": ["../victim"]}},
    "leads out of a part": {"..": {"replace": [], "remove": ["victim"]}},
    "absolute": {"": {"replace": ["/etc/x"], "remove": []}},
    "another form": {"": ["model_index.json"]},
    "through a link": {"link": {"replace": [], "remove": ["victim"]}},
    "over a link to a file": {"": {"replace": ["link/victim"], "remove": []}},
    "a link on the way to a part": {"link/.": {"replace": [], "remove": ["victim"]}},
    "below a link": {"": {"replace": [], "remove": ["link/victim"]}},
}


@pytest.mark.parametrize("case", EVIL)
def test_a_journal_from_elsewhere_touches_nothing(pipe, tmp_path, case):
    """A checkpoint may come from anybody, with a journal in it."""
    folder = tmp_path / "checkpoint"
    pipe.unet.save_pretrained(folder)
    (tmp_path / "victim").write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    (folder / ".depthdiff-0").mkdir()
    (folder / ".depthdiff-0" / "journal.json").write_text(json.dumps(EVIL[case]))
    with pytest.raises(CheckpointError, match=r"journal.json is damaged or leads out of its folder"):
        UNet2DConditionModel.from_pretrained(folder)
    assert (tmp_path / "victim").read_text() == "mine"


def killed_after_its_journal(monkeypatch, save):
    """Run a save that ends before the first of its renames."""
    real = os.replace

    def replace(source, target):
        if Path(source).parent.name.startswith(".depthdiff-") and not Path(target).parent.name.startswith(
            ".depthdiff-"
        ):
            raise Ended  # a staged file would take its place
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Ended):
            save()


@pytest.mark.parametrize("linked", [False, True])
def test_a_component_whose_save_was_killed_is_whole_in_its_pipeline(pipe, tmp_path, monkeypatch, linked):
    """Whoever loads it: by itself, as a sub-folder, with the pipeline; also where its folder is a link."""
    new = build_pipeline("tiny", 100)
    for load in (
        lambda: UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint" / "unet"),
        lambda: UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint", subfolder="unet"),
        lambda: StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "checkpoint").unet,
    ):
        for save in (
            lambda: new.unet.save_pretrained(tmp_path / "checkpoint" / "unet", max_shard_size="200KB"),
            lambda: new.save_pretrained(tmp_path / "checkpoint", max_shard_size="200KB"),
        ):
            pipe.save_pretrained(tmp_path / "checkpoint")
            if linked:
                (tmp_path / "checkpoint" / "unet").rename(tmp_path / "elsewhere")
                (tmp_path / "checkpoint" / "unet").symlink_to(tmp_path / "elsewhere")
            killed_after_its_journal(monkeypatch, save)
            assert torch.equal(load().conv_in.bias, new.unet.conv_in.bias)
            assert not [path for path in tmp_path.rglob(".depthdiff-*")]
            shutil.rmtree(tmp_path / "checkpoint")
            shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)


def test_a_save_that_was_killed_is_no_longer_finished_after_a_newer_one(pipe, tmp_path, monkeypatch):
    """The newer one has begun before the kill, and ends after it."""
    folder, killed = tmp_path / "checkpoint", build_pipeline("tiny", 100)
    pipe.save_pretrained(folder)
    expected = fingerprint(folder)
    real, done = CLIPTokenizer.save_pretrained, []

    def save(tokenizer, place):
        if not done:
            done.append(True)
            killed_after_its_journal(monkeypatch, lambda: killed.unet.save_pretrained(folder / "unet"))
            killed_after_its_journal(monkeypatch, lambda: killed.save_pretrained(folder, max_shard_size="100KB"))
        return real(tokenizer, place)

    monkeypatch.setattr(CLIPTokenizer, "save_pretrained", save)
    pipe.save_pretrained(folder)
    assert done
    assert fingerprint(folder) == expected
    assert fingerprint(folder) == expected
    assert not list(folder.rglob(".depthdiff-*"))
    assert [path.name for path in (folder / "unet").glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]


def test_private_files_stay_private(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o600)
    pipe.unet.save_pretrained(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_two_processes_save_at_once(tmp_path):
    """One of them is last, as a whole."""
    folder = tmp_path / "checkpoint"
    pipes = [build_pipeline("tiny", seed) for seed in (0, 100)]
    whole = set()
    for index, one in enumerate(pipes):
        one.save_pretrained(tmp_path / str(index))
        whole.add(fingerprint(tmp_path / str(index)))
    threads = [threading.Thread(target=one.save_pretrained, args=(folder,)) for one in pipes * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fingerprint(folder) in whole
    assert not list(folder.glob("**/.depthdiff-*"))


def test_a_part_is_saved_while_the_whole_is_saved(pipe, tmp_path):
    """What the whole has not finished is not taken for abandoned; it is last, and so it counts."""
    folder, parts = tmp_path / "checkpoint", {"": ("model_index.json",), "unet": owned_files(pipe.unet, None)}
    with replacing(folder, parts) as staged:
        (staged("") / "model_index.json").write_text("{}")
        pipe.unet.save_pretrained(staged("unet"))
        build_pipeline("tiny", 100).unet.save_pretrained(folder / "unet")
    assert torch.equal(UNet2DConditionModel.from_pretrained(folder / "unet").conv_in.bias, pipe.unet.conv_in.bias)
    assert not list(folder.glob("**/.depthdiff-*"))


def test_a_link_to_a_folder_stays_a_link(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    build_pipeline("tiny", 100).unet.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not torch.equal(UNet2DConditionModel.from_pretrained(tmp_path / "real").conv_in.bias, pipe.unet.conv_in.bias)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_over_an_old_checkpoint(pipe, tmp_path):
    """What the user has beside it stays; parts of the old weights do not."""
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


def test_the_index_of_split_weights_counts_them(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in pipe.unet.state_dict().values())


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

    before = names_below(tmp_path)
    for name in ("fsync", "mkdir", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space"):
                build_pipeline("tiny", 100).save_pretrained(folder)
            with pytest.raises(OSError, match="No space"):
                build_pipeline("tiny", 100).save_pretrained(tmp_path / "new")
        assert fingerprint(folder) == old
        assert names_below(tmp_path) == before


def test_pickles_are_not_written(pipe, tmp_path):
    with pytest.warns(UserWarning, match="safe_serialization=False is ignored: pickles are never written") as found:
        pipe.unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
        pipe.save_pretrained(tmp_path / "pipe", safe_serialization=False)
    assert [one.filename for one in found] == [__file__] * 2
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for folder, where in ((tmp_path / "unet", None), (tmp_path / "pipe", "unet")):
        saved = type(pipe.unet).from_pretrained(folder, subfolder=where).state_dict()
        assert all(torch.equal(saved[key], value) for key, value in pipe.unet.state_dict().items())


def test_new_folders_may_be_deep_and_have_ordinary_rights(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "a" / "b" / "c")
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "a" / "b" / "c").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    shutil.rmtree(tmp_path / "a")
