"""Answers of a Hub that no Hub gives: each is one clear error or harmless, and the cache heals by force_download."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file

from depthdiff import CheckpointError, StableDiffusionDepth2ImgPipeline
from tests.hub_server import serve

MERGES = "tokenizer/merges.txt"


def of_info(change):
    """Change what the Hub says of the repository."""

    def mangle(path, status, headers, body):
        api = path.startswith("/api/models/") and "/tree/" not in path
        return (status, headers, change(body)) if api and status == 200 else (status, headers, body)

    return mangle


def of_file(change, name=MERGES):
    """Change the headers of a file."""

    def mangle(path, status, headers, body):
        return (status, change(headers), body) if path.endswith(name) else (status, headers, body)

    return mangle


def edit(**values):
    return lambda body: json.dumps({**json.loads(body), **values}).encode()


def cut(path, status, headers, body):
    return status, {**headers, "Content-Length": str(len(body) + 1000)} if path.endswith(MERGES) else headers, body


ANSWERS = {
    "no JSON": of_info(lambda body: b"<html>a guest network</html>"),
    "empty": of_info(lambda body: b""),
    "not UTF-8": of_info(lambda body: b"\xff\xfe{"),
    "a list": of_info(lambda body: b"[]"),
    "a number": of_info(lambda body: b"3"),
    "null": of_info(lambda body: b"null"),
    "nested": of_info(lambda body: b"[" * 100_000),
    "no commit": of_info(edit(sha=None)),
    "a commit that is a number": of_info(edit(sha=5)),
    "a commit that leads out": of_info(edit(sha="../../../escaped")),
    "no files": of_info(edit(siblings=None)),
    "files of another kind": of_info(edit(siblings=[1, 2])),
    "files without a name": of_info(edit(siblings=[{}])),
    "a file that leads out": of_info(edit(siblings=[{"rfilename": "../../../tokenizer/merges.txt"}])),
    "no etag": of_file(lambda headers: {**headers, "ETag": None}),
    "an empty etag": of_file(lambda headers: {**headers, "ETag": '""'}),
    "an etag that is a folder": of_file(lambda headers: {**headers, "ETag": '"."'}),
    "an etag that is the folder above": of_file(lambda headers: {**headers, "ETag": '".."'}),
    "an etag with a slash": of_file(lambda headers: {**headers, "ETag": '"a/b"'}),
    "a long etag": of_file(lambda headers: {**headers, "ETag": '"' + "a" * 5000 + '"'}),
    "no commit in a header": of_file(lambda headers: {**headers, "X-Repo-Commit": None}),
    "another commit in a header": of_file(lambda headers: {**headers, "X-Repo-Commit": "0" * 40}),
    "a length that is a word": of_file(lambda headers: {**headers, "Content-Length": "many"}),
    "a length that is too large": cut,
    "an unknown status": lambda path, status, headers, body: (299, headers, body),
    "no content": lambda path, status, headers, body: (204, headers, b""),
    "a redirection to nowhere": lambda path, status, headers, body: (302, {"Location": "nowhere:"}, b""),
    "a web page for everything": lambda path, status, headers, body: (200, {}, b"<html>"),
}

NAMED = ("a commit that leads out", "a redirection to nowhere", "an unknown status", "no content", "a long etag",
         "a length that is a word", "a length that is too large")  # fmt: skip
"""Answers that look like another trouble, which is named."""


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "served"
    shutil.copytree(tiny_folder, folder)
    with serve() as server:
        server.publish("owner/depth", folder)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
        huggingface_hub.close_session()
        server.cache, server.folder = tmp_path / "cache", folder
        yield server
        huggingface_hub.close_session()


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_that_cannot_be(hub, case, tmp_path):
    """Loading raises an error of ours, which names the entry of the cache, or loads what is right; afterwards
    `force_download=True` loads it from a Hub that is well."""
    expected = load_file(hub.folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"]

    def load(**options):
        pipe = StableDiffusionDepth2ImgPipeline.from_pretrained("owner/depth", cache_dir=hub.cache, **options)
        assert torch.equal(pipe.unet.conv_in.bias, expected)
        assert len(pipe.tokenizer.merges)

    hub.mangle, well, errors = ANSWERS[case], hub.mangle, []
    for again in range(2):
        try:
            load()
        except CheckpointError as error:
            errors.append(str(error))
        if again == 0:
            hub.mangle = well
    for message in errors:
        assert "\n" not in message
        assert "force_download=True" in message or case in NAMED, message
    load(force_download=True)
    load()
    load(local_files_only=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "served"]


def test_a_cache_whose_entry_is_damaged(hub):
    """A folder or a broken link where a file should be: the entry is named, and fetched once more on demand."""
    StableDiffusionDepth2ImgPipeline.from_pretrained("owner/depth", cache_dir=hub.cache)
    [config] = hub.cache.glob("models--owner--depth/snapshots/*/unet/config.json")
    for damage in (
        lambda: (config.unlink(), config.mkdir()),
        lambda: (config.unlink(), config.symlink_to("nowhere")),
        lambda: config.write_text("{"),  # into the file that the link leads to
    ):
        damage()
        with pytest.raises(CheckpointError) as caught:
            StableDiffusionDepth2ImgPipeline.from_pretrained("owner/depth", cache_dir=hub.cache, local_files_only=True)
        assert "force_download=True" in str(caught.value)
        assert "models--owner--depth" in str(caught.value)
        StableDiffusionDepth2ImgPipeline.from_pretrained("owner/depth", cache_dir=hub.cache, force_download=True)
