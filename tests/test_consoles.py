"""What notebooks, consoles and shells show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_checkpoint import build_pipeline

import depthdiff
from depthdiff.cli import main
from depthdiff.command_checks import split_option
from depthdiff.run import StableDiffusionPipelineOutput

ROOT = Path(__file__).parents[1]


def test_a_pipeline_lists_its_components(pipe, tiny_folder):
    lines = repr(pipe).splitlines()
    assert lines[0] == "StableDiffusionDepth2ImgPipeline (not loaded from a checkpoint)"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(pipe.components)
    count = sum(weight.numel() for weight in pipe.unet.parameters())
    assert f"  unet: UNet2DConditionModel, {count / 1e6:.1f} M parameters, torch.float32 on cpu" in lines
    loaded = depthdiff.StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder, depth_estimator=None)
    assert str(tiny_folder) in repr(loaded) and "  depth_estimator: None" in repr(loaded)


def test_parts_have_a_readable_repr(pipe):
    assert repr(pipe.tokenizer) == f"CLIPTokenizer({len(pipe.tokenizer)} tokens, model_max_length=77)"
    assert repr(pipe.feature_extractor).startswith("DPTImageProcessor {\n")
    assert repr(pipe.scheduler).startswith("PNDMScheduler {\n")
    assert repr(pipe.unet).startswith("UNet2DConditionModel(\n")


def test_pictures_show_themselves(tmp_path):
    """Side by side; arrays and tensors are left to the notebook."""
    images = [Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 30), "blue")]
    shown = StableDiffusionPipelineOutput(images)._repr_png_()
    (tmp_path / "shown.png").write_bytes(shown)
    with Image.open(tmp_path / "shown.png") as sheet:
        assert sheet.size == (40, 30)
        assert sheet.getpixel((5, 5)) == (255, 0, 0) and sheet.getpixel((25, 25)) == (0, 0, 255)
    assert StableDiffusionPipelineOutput(torch.zeros(1, 3, 8, 8))._repr_png_() is None


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "depthdiff", *map(str, arguments)],
        capture_output=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


def test_no_colours_and_no_bars_into_pipes(tmp_path, tiny_folder, small_photo):
    """Also where a variable of the environment asks for colours elsewhere."""
    small_photo.save(tmp_path / "photo.png")
    done = command(
        *("a cup", tmp_path / "photo.png", "--model", tiny_folder, "--steps", 2),
        *("--device", "auto", "-o", tmp_path / "o.png"),
        TERM="xterm-256color",
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"%|" not in done.stderr
    for arguments in (["--help"], ["inspect", tiny_folder], ["--version"]):
        done = command(*arguments, TERM="xterm-256color")
        assert done.returncode == 0 and b"\x1b" not in done.stdout + done.stderr


def test_version_of_the_package():
    assert command("--version").stdout.decode().strip() == f"depthdiff {depthdiff.__version__}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--completion", shell])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(option in text for option in ("strength", "save-depth", "scheduler"))
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_completion_without_its_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["--completion", "bash"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("needs the package shtab: pip install shtab")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"C:\models\style.safetensors", (r"C:\models\style.safetensors", None)),
        (r"C:\models\style.safetensors:0.5", (r"C:\models\style.safetensors", "0.5")),
        ("C:/models/style.safetensors:0.5", ("C:/models/style.safetensors", "0.5")),
        (r"\\server\share\word.pt:<cup>", (r"\\server\share\word.pt", "<cup>")),
        ("style.safetensors:0.5", ("style.safetensors", "0.5")),
    ],
)
def test_paths_of_windows(text, parts):
    assert split_option(text) == parts


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_narrow_code_pages(encoding, tmp_path, tiny_folder, small_photo):
    """Names that a code page lacks are spelt out, and the picture is written."""
    photo = tmp_path / "фото.png"
    small_photo.save(photo)
    done = command("日本", photo, "--model", tiny_folder, "--steps", 1, PYTHONIOENCODING=encoding, PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "фото-depthdiff.png").exists()


NOTEBOOK = """
from PIL import Image
from depthdiff import StableDiffusionDepth2ImgPipeline
pipe = StableDiffusionDepth2ImgPipeline.from_pretrained({folder!r})
result = pipe("a cup", Image.open({photo!r}), num_inference_steps=3)
"""


def test_in_a_notebook(tmp_path, tiny_folder, small_photo):
    """A bar as a widget that reaches its end, a list of components, and the picture itself."""
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipywidgets")
    small_photo.save(tmp_path / "photo.png")
    source = NOTEBOOK.format(folder=str(tiny_folder), photo=str(tmp_path / "photo.png"))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (source, "pipe", "result")])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    run, pipe, result = (cell.outputs for cell in book.cells)
    [bar] = [out.data for out in run if out.output_type == "display_data"]
    assert "application/vnd.jupyter.widget-view+json" in bar
    widgets = book.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    [progress] = [widget["state"] for widget in widgets if widget["model_name"] == "FloatProgressModel"]
    assert progress["value"] == progress["max"] == 3 and progress["bar_style"] == "success"
    assert not [out for out in run if out.output_type == "error"]
    assert pipe[0].data["text/plain"].startswith("StableDiffusionDepth2ImgPipeline (")
    assert "image/png" in result[0].data


def test_a_pipeline_without_weights_has_a_repr():
    with torch.device("meta"):
        unet = build_pipeline("tiny").unet
    pipe = build_pipeline("tiny")
    pipe.unet = unet
    assert "on meta" in repr(pipe)
