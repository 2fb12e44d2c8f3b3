"""A Hub in trouble, or on the move: connections that break, repositories that change, move and hide, tokens, forms."""

import logging
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file

from depthdiff import CheckpointError, StableDiffusionDepth2ImgPipeline, UNet2DConditionModel
from tests.hub_server import serve
from tests.ldm import SMALL, random_twins

UNET = "unet/diffusion_pytorch_model.safetensors"
SECRET = "hf_averysecrettoken"


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """Serve the tiny checkpoint to this process."""
    folder = tmp_path / "served"
    shutil.copytree(tiny_folder, folder)
    with serve() as server:
        server.publish("owner/depth", folder)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
        huggingface_hub.close_session()
        server.cache, server.folder = tmp_path / "cache", folder
        yield server
        huggingface_hub.close_session()


def load(hub, name="owner/depth", **options):
    return StableDiffusionDepth2ImgPipeline.from_pretrained(name, cache_dir=hub.cache, **options)


def changed(hub, offset):
    """Make the next state of the repository: another UNet."""
    folder = hub.folder.with_name(f"served-{offset}")
    shutil.copytree(hub.folder, folder)
    save_file({key: value + offset for key, value in load_file(folder / UNET).items()}, folder / UNET)
    return folder


def bias(pipe_or_folder):
    unet = getattr(pipe_or_folder, "unet", None)
    return load_file(pipe_or_folder / UNET)["conv_in.bias"] if unet is None else unet.conv_in.bias


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has come is kept by the chunk
    hub.breaks[UNET] = [10_000, 20_000]
    assert torch.equal(bias(load(hub)), bias(hub.folder))
    assert hub.ranges[UNET] == [None, "bytes=10000-", "bytes=30000-"]


def test_a_connection_that_stays_broken(hub):
    """An error of ours; what was whole is kept, and the next call goes on."""
    hub.breaks[UNET] = [0] * 20
    with pytest.raises(CheckpointError, match=r"owner/depth: the download broke off.*run it again"):
        load(hub)
    hub.breaks.clear()
    got = set(hub.log) - {UNET}
    hub.log.clear()
    assert torch.equal(bias(load(hub)), bias(hub.folder))
    assert UNET in hub.log
    assert len(set(hub.log) & got) < len(got)


def test_a_file_that_changed_between_two_calls(hub):
    """Online the new one, and only that is fetched; without a network the last that was had."""
    load(hub)
    new = changed(hub, 1.0)
    hub.publish("owner/depth", new)
    hub.log.clear()
    assert torch.equal(bias(load(hub)), bias(new))
    assert hub.log == [UNET]
    assert torch.equal(bias(load(hub, local_files_only=True)), bias(new))


def test_offline_nothing_is_asked(hub):
    """Also where the network is there and has something newer."""
    load(hub)
    asked = hub.count
    hub.publish("owner/depth", changed(hub, 1.0))
    assert torch.equal(bias(load(hub, local_files_only=True)), bias(hub.folder))
    assert hub.count == asked


def test_a_single_file_on_the_hub(hub, tmp_path):
    """Where to look is passed on: of the file all of it, of the configs all but the revision."""
    (tmp_path / "single").mkdir()
    name, where = "owner/single/x.safetensors", {"cache_dir": hub.cache, "token": SECRET, "revision": "old"}
    save_file(random_twins(SMALL)[0], tmp_path / "single" / "x.safetensors")
    local = StableDiffusionDepth2ImgPipeline.from_single_file(tmp_path / "single" / "x.safetensors", dtype=torch.half)
    assert local.dtype == torch.float16
    local.save_pretrained(tmp_path / "configs")
    hub.publish("owner/single", tmp_path / "single", "old")
    hub.publish("owner/configs", tmp_path / "configs")
    pipe = StableDiffusionDepth2ImgPipeline.from_single_file(name, config="owner/configs", **where)
    assert set(pipe.load_single_file(name, **where)) == set(pipe.networks)
    assert torch.equal(bias(pipe).half(), bias(local))
    assert set(hub.tokens) == {f"Bearer {SECRET}"}
    assert [file for file in hub.log if file.endswith("safetensors")] == ["x.safetensors"]
    asked = hub.count
    StableDiffusionDepth2ImgPipeline.from_single_file(name, config="owner/configs", local_files_only=True, **where)
    pipe.load_single_file(name, local_files_only=True, **where)
    assert hub.count == asked
    pipe.load_single_file(name, force_download=True, **where)
    assert hub.log[-1] == "x.safetensors" and hub.count > asked


def test_a_repository_that_changes_while_it_is_loaded(hub):
    """All files of one call are of one commit."""
    new = changed(hub, 1.0)
    hub.after["model_index.json"] = lambda: hub.publish("owner/depth", new)
    assert torch.equal(bias(load(hub)), bias(hub.folder))
    assert torch.equal(bias(load(hub)), bias(new))


def test_a_repository_that_was_renamed(hub):
    hub.moved["owner/old-name"] = "owner/depth"
    assert torch.equal(bias(load(hub, "owner/old-name")), bias(hub.folder))
    hub.moved |= {"a/a": "b/b", "b/b": "a/a"}
    with pytest.raises(CheckpointError, match="a/a"):
        load(hub, "a/a")
    assert hub.count < 300


REFUSALS = {
    "gated, without a token": (401, "GatedRepo", "owner/depth is gated: accept its conditions"),
    "gated, not accepted": (403, "GatedRepo", "owner/depth is gated: accept its conditions"),
    "private": (401, "RepoNotFound", "no such repository, or none that your token may read"),
    "with a wrong token": (
        401,
        "",
        "the Hub answered 401; log in with `hf auth login`",
        "Invalid credentials in Authorization header",
    ),
    "gone": (404, "RepoNotFound", "no such repository"),
    "forbidden": (403, "", "the Hub answered 403; your token may not read it"),
    "too often": (429, "", "the Hub answered 429; that was too often"),
    "broken": (500, "", "the Hub answered 500; try again later"),
    "away": (503, "", "the Hub answered 503; try again later"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(hub, case, caplog):
    status, code, message, *told = REFUSALS[case]
    hub.refused["owner/depth"] = (status, code, *told)
    with caplog.at_level(logging.DEBUG), pytest.raises(CheckpointError, match=message) as caught:
        load(hub, token=SECRET)
    assert f"Bearer {SECRET}" in hub.tokens
    assert SECRET not in caplog.text + "".join(str(error) for error in chain(caught.value))
    assert hub.count < 50


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("token", [SECRET + "\n", "hf secret", "", "hf_é"])
def test_a_token_that_cannot_be_one(hub, token):
    """It would stand in the error of the HTTP library; it is refused before, and not shown."""
    with pytest.raises(CheckpointError, match="token holds") as caught:
        load(hub, token=token)
    assert not token.strip() or token.strip() not in "".join(str(error) for error in chain(caught.value))


def test_a_token_goes_along_and_is_not_told(hub, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        load(hub, token=SECRET)
    assert set(hub.tokens) == {f"Bearer {SECRET}"}
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


def test_the_branch_of_half_weights(hub):
    """Plain names, half the bytes; where there is no such branch the variant is named."""
    with pytest.raises(CheckpointError, match=r"has no revision 'fp16'.*variant=\"fp16\""):
        load(hub, revision="fp16")
    with pytest.raises(CheckpointError, match=r"has no revision 'v9'$"):
        load(hub, revision="v9")
    folder = hub.folder.with_name("half")
    StableDiffusionDepth2ImgPipeline.from_pretrained(hub.folder, torch_dtype=torch.float16).save_pretrained(folder)
    hub.publish("owner/depth", folder, "fp16")
    assert load(hub, revision="fp16", torch_dtype=torch.float16).dtype == torch.float16
    assert torch.equal(bias(load(hub, revision="fp16")), bias(hub.folder).half().float())


def test_pickles_are_fetched_only_where_nothing_else_is(hub):
    """Beside safetensors never, unless asked for; of a repository of pickles all, in one file or in parts."""
    old = hub.folder.with_name("old")
    shutil.copytree(hub.folder, old)
    for path in sorted(old.rglob("*.safetensors")):
        stem = {"model": "pytorch_model"}.get(path.stem, path.stem)
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
    hub.publish("owner/both", old)
    load(hub, "owner/both")
    assert not [name for name in hub.log if name.endswith(".bin")]
    hub.log.clear()
    unet = UNet2DConditionModel.from_pretrained(
        "owner/both", subfolder="unet", use_safetensors=False, cache_dir=hub.cache
    )
    assert torch.equal(unet.conv_in.bias, bias(hub.folder))
    assert hub.log == ["unet/diffusion_pytorch_model.bin"]
    only = hub.folder.with_name("only")
    shutil.copytree(old, only)
    for path in only.rglob("*.safetensors"):
        path.unlink()
    hub.publish("owner/pickles", only)
    hub.log.clear()
    assert torch.equal(bias(load(hub, "owner/pickles")), bias(hub.folder))
    assert len([name for name in hub.log if name.endswith(".bin")]) == 4
    assert torch.equal(bias(load(hub, "owner/pickles", local_files_only=True)), bias(hub.folder))
    alone = UNet2DConditionModel.from_pretrained("owner/pickles", subfolder="unet", cache_dir=hub.cache / "new")
    assert torch.equal(alone.conv_in.bias, bias(hub.folder))


def test_a_web_page_instead_of_weights(hub):
    (hub.folder / UNET).write_text("<!DOCTYPE html><title>Log in to the guest network</title>")
    hub.publish("owner/depth", hub.folder)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors is a web page"):
        load(hub)


@pytest.mark.parametrize("subfolder", ["..", "../x", "/etc", "a/../../b", "a//b", "..\\x"])
def test_subfolders_stay_inside(hub, subfolder):
    for name in ("owner/depth", hub.folder):
        with pytest.raises(CheckpointError, match="subfolder must name a folder inside"):
            UNet2DConditionModel.from_pretrained(name, subfolder=subfolder, cache_dir=hub.cache)
    with pytest.raises(ValueError, match="variant must be part"):
        load(hub, variant="../fp16")
