"""Making pictures again: the same bytes, with changes, from elsewhere, and from what other programs wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from depthdiff import cli
from depthdiff.cli import main
from depthdiff.command_checks import shortcuts
from depthdiff.infotext import read_infotext
from depthdiff.options import SHORTCUT_HELP, build_parser, read_options
from depthdiff.redo import NOT_SET, read_redo
from depthdiff.settings import FILES, KEYS, OTHER_NAMES, STORED

RNG = np.random.default_rng(0)


@pytest.fixture
def place(tmp_path, small_photo, monkeypatch):
    """A working folder with a photo, a mask and a depth map."""
    small_photo.resize((72, 56)).save(tmp_path / "photo.png")
    mask = np.zeros((56, 72), dtype=np.uint8)
    mask[10:40, 20:50] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(RNG.integers(0, 65536, (56, 72), dtype=np.uint16)).save(tmp_path / "depth.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def loaded():
    """Pipelines that were loaded before, which saves most of the time: options of loading -> pipeline."""
    return {}


@pytest.fixture
def paint(place, tiny_folder, loaded, monkeypatch):
    """Run the command; return what it stored."""
    load = cli.load

    def load_once(options, dtype):
        if options.lora or options.embedding:
            return load(options, dtype)
        key = options.model, str(dtype), options.scheduler, options.karras
        if key not in loaded:
            loaded[key] = load(options, dtype)
        return loaded[key]

    monkeypatch.setattr(cli, "load", load_once)

    def run(*options, photo="photo.png", output="a.png"):
        arguments = ["two tigers", *([] if photo is None else [photo]), "--model", tiny_folder, "--steps", 2]
        assert main([*map(str, arguments), "-o", output, *map(str, options)]) == 0
        return None if "--num-images" in options else stored_in(output)

    return run


def stored_in(path):
    with Image.open(path) as picture:
        return json.loads(picture.text["depthdiff"])


def store(path, settings, picture=None):
    """Write a picture with other settings."""
    info = PngInfo()
    info.add_itxt("depthdiff", settings if isinstance(settings, str) else json.dumps(settings))
    (picture or Image.new("RGB", (8, 8))).save(path, pnginfo=info)


def redo(*arguments):
    return main(["redo", *map(str, arguments)])


def same(first, second):
    return Path(first).read_bytes() == Path(second).read_bytes()


CASES = {
    "new seed": [],
    "options": ["-n", "blurry", "--strength", 0.7, "--guidance", 3, "--eta", 0.5, "--scheduler", "ddim", "--seed", 4],
    "a solver that its class alone does not say": ["--scheduler", "dpmpp_2m_sde", "--karras"],
    "karras": ["--scheduler", "Euler Karras"],
    "preset": ["--preset", "fast", "--token-merging", 0.5, "--dtype", "float32"],
    "hires": ["--hires", 1.5, "--hires-strength", 0.6, "--guidance-rescale", 0.3],
    "mask": ["--mask", "mask.png", "--mask-blur", 2, "--mask-content", "noise", "--clip-skip", 1],
    "noise": ["--start", "noise", "--prompt-syntax", "a1111", "--device", "cpu", "--attention", "sliced"],
    "seamless": ["--seamless", "x", "--depth", "depth.png", "--depth-invert", "flip"],
    "windows": ["--windows", 40, 16, "--depth-keep-aspect", "--depth-range", 0.5, "-0.00001"],
    "one side": ["--size", 48, "--dtype", "bfloat16"],
    "height and width": ["--height", 64, "--width", 48, "--resize-mode", "pad"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_the_same_to_the_last_byte(case, paint, capsys):
    paint(*CASES[case])
    capsys.readouterr()
    assert redo("a.png") == 0
    said = capsys.readouterr()
    assert same("a.png", "a-redo.png")
    assert said.out.splitlines()[-1] == "a-redo.png"
    assert not [line for line in said.err.splitlines() if "a.png" in line], "there is nothing to say"


def test_a_depth_map_alone(paint):
    how = paint("--depth", "depth.png", "--width", 64, photo=None)
    assert (how["image"], how["strength"]) == (None, 1)
    assert redo("a.png") == 0
    assert same("a.png", "a-redo.png")


def test_one_of_a_batch(paint, capsys, place):
    """It is made with the others, of which none is written; the first seed follows from the stored one."""
    paint("--num-images", 3, "--seed", 11, "--eta", 1, "--scheduler", "ddim")
    for number in (1, 3):
        assert stored_in(f"a-{number}.png")["seed"] == 10 + number
        assert redo(f"a-{number}.png", "-o", "b.png", "--set", "preview=1") == 0
        assert same(f"a-{number}.png", "b.png")
        assert f"seed {10 + number}\n" in capsys.readouterr().out
    assert {path.name for path in place.glob("b*")} == {"b.png", "b-preview.png"}
    assert redo("a-3.png", "-o", "one.png", "--set", "num-images=1") == 0
    assert "without the others of its batch" in capsys.readouterr().err
    assert (stored_in("one.png")["seed"], stored_in("one.png")["index"]) == (13, 0)
    one, three = (np.asarray(Image.open(name)).astype(int) for name in ("one.png", "a-3.png"))
    assert np.abs(one - three).max() <= 4  # of 255, as sums of a batch may be in another order; observed: 1


def adapters(pipe):
    width, channels = pipe.text_encoder.config.hidden_size, pipe.unet.conv_in.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    Path("styles").mkdir()
    for name in ("one", "two"):
        down, up = torch.rand(2, 5, 3, 3, generator=generator), torch.rand(channels, 2, 1, 1, generator=generator)
        save_file({"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}, f"styles/{name}.safetensors")
    save_file({"emb_params": torch.rand(2, width, generator=generator)}, "word.safetensors")


def test_adapters_from_another_working_folder(paint, pipe, place, capsys, monkeypatch):
    """They are looked for by their path beside the picture, by their name there, and in the working folder."""
    adapters(pipe)
    options = ["--lora", "styles/one.safetensors:0.5", "--lora", "styles/two.safetensors"]
    how = paint(*options, "--embedding", "word.safetensors:<word>", "-n", "<word>")
    assert set(how["sha256"]) == {"image", "lora 1", "lora 2", "embedding 1"}
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert redo("../a.png") == 0
    assert same("../a.png", "../a-redo.png")
    shutil.move("../styles/one.safetensors", "..")
    shutil.move("../styles/two.safetensors", "two.safetensors")
    shutil.move("../photo.png", "photo.png")
    capsys.readouterr()
    assert redo("../a.png", "-o", "b.png") == 0
    assert same("../a.png", "b.png")
    assert "SHA-256" not in capsys.readouterr().err
    Path("../styles").mkdir(exist_ok=True)
    for path in ("two.safetensors", "../one.safetensors", "photo.png"):
        Path(path).unlink()
    assert redo("../a.png") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "photo.png (image), styles/one.safetensors (lora 1), styles/two.safetensors (lora 2)" in line
    assert line.endswith("--set image=PATH --set lora=PATH:0.5 --set lora=PATH")


def test_a_file_that_has_changed_is_named_and_used(paint, small_photo, place, capsys, monkeypatch):
    paint("--mask", "mask.png")
    Image.new("L", (72, 56), 255).save("mask.png")
    capsys.readouterr()
    assert redo("a.png") == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "SHA-256" in line]
    assert line == "depthdiff: mask mask.png is not what a.png was made of: its SHA-256 has changed"
    assert not same("a.png", "a-redo.png")
    # of two files of that name, the one that it was made of counts
    (place / "in").mkdir()
    shutil.copy("photo.png", "in/photo.png")
    monkeypatch.chdir("in")
    small_photo.rotate(180).save("../photo.png")
    assert redo("../a.png", "--set", "mask=none") == 0
    assert "SHA-256" not in capsys.readouterr().err


def test_changes_are_those_of_the_command(paint, capsys):
    """Also where other options must go: a size for a size, what belongs to a mask, a preset's own values."""
    common = ["--seed", 3, "--size", 64]
    paint(*common, "--mask", "mask.png", "--mask-blur", 1, "--hires", 2, "--hires-strength", 0.5)
    changes = ["strength=0.5", "hires=none", "mask=none", "karras=true", "scheduler=euler", "height=80", "size=none"]
    changes += ["windows=64, 32", "preset=fast", "deep-cache=1", "--negative-prompt=a=b", "prompt=none of it"]
    assert redo("a.png", *(f"--set={text}" for text in changes), "-o", "b.png") == 0
    how = stored_in("b.png")
    options = ["none of it", "photo.png", "--steps", "2", "--seed", "3", "--strength", "0.5", "--karras", "-n", "a=b"]
    options += ["--scheduler", "euler", "--height", "80", "--windows", "64", "32", "--preset", "fast"]
    assert main([*options, "--deep-cache", "1", "--model", how["model"], "-o", "c.png"]) == 0
    assert same("b.png", "c.png")
    assert how["guidance_interval"] == list(shortcuts(read_options(["a", "b", "--preset", "fast"])).guidance_interval)


WRONG = {
    "no value": ("strength", "--set must be KEY=VALUE, such as strength=0.6, got 'strength'"),
    "unknown": ("strenght=1", "the command has no option 'strenght'; did you mean 'strength'?"),
    "not an option": ("help=true", "the command has no option 'help'"),
    "type": ("steps=many", "argument --steps: invalid int value: 'many'"),
    "choice": ("start=photo", "argument --start: invalid choice: 'photo'"),
    "range": ("strength=2", "--strength must be in [0, 1], got 2.0"),
    "flag": ("karras=yes", "karras must be true or false, got 'yes'"),
    "one number": ("windows=64", "argument --windows: expected 2 arguments"),
    "prompt": ("prompt=none", "prompt must be a text, got None"),
    "solver": ("scheduler=eular", "must be one of"),
    "no photo": ("image=none", "does not say what photo it was made of; name one with --set image=PATH"),
    "photo missing": ("image=nowhere.png", "image nowhere.png is not a file"),
    "combination": ("mask_blur=3", "--mask-blur needs --mask"),
}


@pytest.fixture
def unloaded(monkeypatch):
    """Nothing is loaded."""

    def load(options, dtype):
        raise AssertionError("loading was reached")

    monkeypatch.setattr(cli, "load", load)


def settings_of(*options):
    """Settings without a picture that they belong to."""
    options = read_options(["two tigers", "photo.png", *map(str, options)])
    stored = {name: getattr(options, name) for name in STORED} | {name: None for name in OTHER_NAMES.values()}
    stored |= {"image": "photo.png", "depth": None, "mask": None, "seed": 3, "index": 0, "device": "cpu"}
    stored |= dict.fromkeys(SHORTCUT_HELP) | {"sha256": {}, "version": "0", "strength": 0.5, "model": "mini"}
    return stored | {"dtypes": {"unet": "float32"}, "scheduler": "PNDMScheduler", "dtype": "float32"}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_changes_are_one_line_before_any_work(case, place, unloaded, capsys):
    store("a.png", settings_of())
    text, message = WRONG[case]
    assert redo("a.png", "--set", text) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("depthdiff: error: ") and message in line
    assert not Path("a-redo.png").exists()


DAMAGED = {
    "no JSON": ("{", "its settings are damaged"),
    "a list": ("[]", "the stored text depthdiff must be an object"),
    "prompt": ({"prompt": 3}, "prompt must be a text, got 3"),
    "steps": ({"steps": "many"}, "argument --steps: invalid int value"),
    "flag of steps": ({"steps": True}, "argument --steps: expected one argument"),
    "index": ({"num_images": 2, "index": 2}, "index must be in [0, 1], got 2"),
    "seed before the first": ({"num_images": 2, "index": 1, "seed": 0}, "seed must be in [1, "),
    "image": ({"image": ["photo.png"]}, "the stored image must be a text"),
    "lora": ({"lora": "a"}, "the stored lora must be a list"),
    "lora's": ({"lora": [3]}, "the stored lora must be a text"),
    "dtypes": ({"dtypes": {"unet": "int8"}}, "dtypes must name networks"),
    "sums": ({"sha256": 3}, "the stored sha256 must be an object"),
    "windows": ({"windows": [64]}, "argument --windows: expected 2 arguments"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_settings_are_one_line(case, place, unloaded, capsys):
    settings, message = DAMAGED[case]
    store("a.png", settings if isinstance(settings, str) else settings_of() | settings)
    assert redo("a.png") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("depthdiff: error: ") and message in line


def test_what_is_not_such_a_picture(place, unloaded, capsys):
    Path("text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save("other.jpg")
    store("a.png", settings_of())
    for arguments, message in (
        (["nowhere.png"], "PICTURE nowhere.png is not a file"),
        (["text.png"], "not a picture of a known type"),
        (["photo.png"], "PICTURE photo.png does not say how it was made; name a PNG that depthdiff wrote"),
        (["other.jpg"], "PICTURE other.jpg does not say how it was made"),
        (["a.png", "-o", "a.png"], "the picture a.png and a.png (file 1 to write) are the same file"),
        (["a.png", "-o", "photo.png"], "must all have different names"),
    ):
        before = {path: path.read_bytes() for path in place.iterdir()}
        assert redo(*arguments) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("depthdiff: error: ") and message in line
        assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_paths_that_a_stranger_stored_are_names(place, unloaded, capsys):
    store("a.png", settings_of() | {"image": "/etc/passwd"})
    assert redo("a.png") == 1
    assert "passwd (image)" in capsys.readouterr().err


def test_pictures_of_older_and_newer_versions(place, capsys):
    """What is missing gets today's default, and a seed is that of one picture."""
    stored = {"prompt": "tigers", "image": "photo.png", "seed": 7, "num_images": 4, "strength": 0.5, "steps": 3}
    stored |= {"scheduler": "DDIMScheduler", "dtype": "float32", "version": "0.1", "taste": "sweet"}
    store("a.png", stored)
    options, lines = read_redo(["a.png"])
    assert (options.seed, options.num_images, options.index, options.eta) == (7, 1, None, 0.0)
    assert (options.scheduler, options.dtype, options.strength) == ("DDIMScheduler", "float32", 0.5)
    missing = [key for key in KEYS if key not in stored]
    assert lines == [
        f"a.png: of 0.1, does not say {', '.join(missing)}; today's defaults are used",
        "a.png: says what this version does not know, and leaves out: taste",
    ]


def test_a_device_that_is_not_here(place):
    store("a.png", settings_of() | {"device": "xpu"})
    options, [line] = read_redo(["a.png"])
    assert options.device == "auto"
    assert "made on another device" in line and "xpu" in line


def test_everything_that_a_picture_depends_on_is_stored(paint):
    """Each option of the command is stored, or is about files that are written, watching, or this run alone."""
    outputs = {"output", "save_depth", "depth_preview", "sheet", "preview", "preview_decoder", "save_partial"}
    resolved = {"preset", "dtype"}  # stored as what they lead to
    names = {action.dest for action in build_parser()._actions} - {*NOT_SET, *outputs, *resolved, "verbose", "offline"}
    assert names == {*STORED, *FILES, *SHORTCUT_HELP, *OTHER_NAMES, "seed", "device"}
    how = paint("--preview", 1)
    assert set(how) == {*KEYS, "size", "scheduler", "dtype"}
    text = json.dumps(how | {"model": None})
    assert str(Path.cwd()) not in text and str(Path.home()) not in text


A1111 = """a (red:1.2) cup <lora:style:0.8>,
on a table
Negative prompt: blurry, Steps: 3
dark
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 12, Size: 96x64, Model hash: 0a1b, Model: v2, \
Denoising strength: 0.7, Clip skip: 2, Mask blur: 4, Lora hashes: "style: 12, other: 34", Version: v1.10.1"""


def web_picture(path, text, **options):
    image = Image.new("RGB", (96, 64))
    if path.endswith(".png"):
        info = PngInfo()
        info.add_text("parameters", text)
        image.save(path, pnginfo=info)
        return
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(options.get("encoding", "utf-16-be"))
    image.save(path, exif=exif)


@pytest.mark.parametrize(
    ("name", "encoding"), [("w.png", ""), ("w.jpg", "utf-16-be"), ("w.webp", "utf-16-be"), ("x.jpg", "utf-16-le")]
)
def test_pictures_of_the_web_ui(name, encoding, place):
    web_picture(name, A1111, encoding=encoding)
    options, lines = read_redo([name, "--set", "image=photo.png"])
    assert options.prompt == "a (red:1.2) cup ,\non a table"
    assert options.negative_prompt == "blurry, Steps: 3\ndark"
    found = (options.steps, options.scheduler, options.karras, options.guidance, options.seed)
    assert found == (20, "DPM++ 2M", True, 7.0, 12)
    assert (options.width, options.height, options.strength, options.clip_skip) == (96, 64, 0.7, 1)
    assert (options.prompt_syntax, options.start, options.mask_blur, options.hires) == ("a1111", "image", None, None)
    assert options.output == Path(f"{name[0]}-redo.png")
    lines = [line.removeprefix(f"{name}: ") for line in lines]
    assert lines[0] == ("<lora:style:0.8> in the prompt has no counterpart; name its file with --set lora=FILE:0.8")
    names = ["Model hash", "Model", "Lora hashes", "Version", "the picture will not be the same", "Mask blur"]
    assert [line.split(":")[0] for line in lines[1:]] == names
    assert all("has no counterpart" in line for line in (*lines[1:5], lines[6]))
    options, lines = read_redo([name, "--set", "image=photo.png", "--set", "mask=mask.png"])
    assert options.mask_blur == 4 and "Mask blur" not in str(lines)
    with pytest.raises(ValueError, match="does not say what photo it was made of; name one with --set image=PATH"):
        read_redo([name])


def test_text_to_image_of_the_web_ui():
    text = "cup\nSteps: 5, Sampler: Restart, Schedule type: Karras, Seed: 1, Size: 64x64, Denoising strength: 0.4, "
    values, lines = read_infotext(text + "Clip skip: 1, Hires upscale: 2, Hires steps: 3")
    assert (values["start"], values["strength"], values["hires"], values["hires_strength"]) == (
        "noise",
        "1",
        "2",
        "0.4",
    )
    assert values["clip_skip"] is None and "scheduler" not in values and "karras" not in values
    assert [line.split(":")[0] for line in lines[:2]] == ["Sampler", "Schedule type"]
    assert "start=noise" in lines[2] and lines[3] == "Hires steps: 3 has no counterpart"
    values, lines = read_infotext("cup\nSteps: 5, Sampler: DPM++ 2M Karras, Seed: 1, Hires upscale: 9")
    assert values["scheduler"] == "DPM++ 2M Karras" and "hires" not in values
    assert values["negative_prompt"] == "" and "Hires upscale: 9 has no counterpart" in lines


def test_a_picture_of_the_web_ui_is_made(place, tiny_folder, capsys):
    web_picture("w.png", A1111.replace("Steps: 20", "Steps: 2"))
    model = ["--set", f"model={tiny_folder}", "--set", "image=photo.png"]
    assert redo("w.png", *model) == 0
    assert "depthdiff: w.png: Model: v2 has no counterpart; name a checkpoint with" in capsys.readouterr().err
    how = stored_in("w-redo.png")
    assert (how["size"], how["scheduler"], how["seed"]) == ([96, 64], "DPMSolverMultistepScheduler", 12)
    assert redo("w-redo.png", "-o", "again.png") == 0
    assert same("w-redo.png", "again.png")


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["redo", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("PICTURE", "--set KEY=VALUE", "PICTURE-redo.png", "depthdiff -- redo IMAGE"))
    for arguments in ([], ["a.png", "b.png"], ["a.png", "--strength", "1"]):
        with pytest.raises(SystemExit) as stop:
            main(["redo", *arguments])
        assert stop.value.code == 2
        assert "usage: depthdiff redo" in capsys.readouterr().err


def test_the_small_model_that_comes_along(place):
    """It chooses the size itself."""
    assert main(["two tigers", "photo.png", "--steps", "2", "-o", "a.png"]) == 0
    how = stored_in("a.png")
    options, lines = read_redo(["a.png"])
    assert lines == [] and how["model"] == options.model == "mini"
    assert redo("a.png") == 0
    assert same("a.png", "a-redo.png")
