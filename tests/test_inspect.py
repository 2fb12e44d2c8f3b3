"""`depthdiff inspect`: what it says of good and bad files and folders, and that it reads no tensor."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from depthdiff import StableDiffusionDepth2ImgPipeline
from depthdiff.cli import main
from depthdiff.inspect_checkpoint import inspect
from tests.ldm import SCHEDULE, SMALL, random_twins


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A single file of random bfloat16 weights, and its tensors."""
    path = tmp_path_factory.mktemp("inspect") / "single.safetensors"
    tensors, _ = random_twins(SMALL, dtype=torch.bfloat16)
    save_file(tensors, path)
    return path, tensors


def test_a_whole_file(single, capsys):
    path, tensors = single
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == f"{path}: single file of Stability's own code (ldm), safetensors, " + (
        f"{path.stat().st_size:,} bytes"
    )
    assert text.splitlines()[-1] == "will load"
    report = inspect(path)
    for part, prefix in zip(report.components, ("model.", "first_stage_", "cond_", "depth_"), strict=False):
        own = [tensor for key, tensor in tensors.items() if key.startswith(prefix)]
        assert part.parameters == sum(tensor.numel() for tensor in own)
        assert part.nbytes == sum(tensor.nbytes for tensor in own)
        assert part.dtypes == {"BF16": len(own)}
        assert not part.missing and not part.unknown and not part.problems
    assert {len(report.ignored)} == {13}
    assert report.components[0].config["block_out_channels"] == (64, 128, 192)


def test_what_no_network_reads(single, tmp_path):
    """Averages, losses and constants of a training: each has its reason, and the weights that are loaded are others."""
    path, tensors = single
    unet = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    averaged = {f"model_ema.{key.replace('.', '')}": value + 1 for key, value in unet.items()}
    averaged |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int32)}
    losses = ("logvar", "lvlb_weights", "loss.logvar", "first_stage_model.loss.discriminator.main.0.weight")
    more = averaged | dict.fromkeys((*losses, "scale_factor", "cond_stage_model.model.attn_mask"), torch.ones(3))
    save_file({**tensors, **{key: value.clone() for key, value in more.items()}}, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert report.loads
    reasons = {"averaged": averaged, "loss": losses, "the scaling of the latents": ["scale_factor"]}
    reasons["noise schedule"] = [key for key in SCHEDULE if key not in losses]
    for reason, keys in reasons.items():
        assert {key for key, why in report.ignored.items() if reason in why} == set(keys), reason
    assert "attn_mask" in next(part.ignored for part in report.components if part.name == "text_encoder")
    one, two = (
        StableDiffusionDepth2ImgPipeline.from_single_file(p, dtype="auto") for p in (path, tmp_path / "x.safetensors")
    )
    for name, network in one.networks.items():
        state = two.networks[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items()), name


def test_pickles_and_parts(single, tmp_path):
    vae = {k.removeprefix("first_stage_model."): v for k, v in single[1].items() if k.startswith("first_stage_model.")}
    torch.save({"state_dict": vae}, tmp_path / "x.vae.pt")
    report = inspect(tmp_path / "x.vae.pt")
    assert report.loads and report.form == "pickle" and [part.name for part in report.components] == ["vae"]
    assert "load_single_file" in report.text()


def test_folders(tiny_folder, tmp_path):
    report = inspect(tiny_folder)
    assert report.loads and report.layout == "folder of diffusers" and report.form == "safetensors"
    assert len(report.components) == 7
    weights = list(tiny_folder.rglob("*.safetensors"))
    assert report.nbytes == sum(path.stat().st_size for path in weights)
    assert inspect(tiny_folder / "unet").loads
    shutil.copytree(tiny_folder, tmp_path / "x")
    path = tmp_path / "x" / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["quant_conv.bias"]
    save_file({**state, "lid": torch.zeros(1)}, path)
    (tmp_path / "x" / "tokenizer" / "merges.txt").unlink()
    report = inspect(tmp_path / "x")
    parts = {part.name: part for part in report.components}
    assert not report.loads
    assert (parts["vae"].missing, parts["vae"].unknown) == (["quant_conv.bias"], ["lid"])
    assert "merges.txt cannot be read" in parts["tokenizer"].problems[0]
    assert not parts["unet"].problems


BAD = {
    "four channels": "text-to-image.*takes 4 channels",
    "missing": "missing: 1 keys, first: out.0.bias",
    "lora": "some layers have tensors of no method known here, or too few",
    "nothing": "there is no such file or folder",
    "text": "is not a safetensors file|has 5 bytes",
}


@pytest.mark.parametrize("case", BAD)
def test_what_will_not_load(single, tmp_path, capsys, case):
    path, tensors = tmp_path / "x.safetensors", dict(single[1])
    if case == "four channels":
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(64, 4, 3, 3)
    elif case == "missing":
        del tensors["model.diffusion_model.out.0.bias"]
    elif case == "lora":
        tensors = {"lora_unet_a.lora_up.weight": torch.zeros(1)}
    if case == "text":
        path.write_text("hello")
    elif case != "nothing":
        save_file(tensors, path)
    assert main(["inspect", str(path)]) == 1
    lines = capsys.readouterr().out
    assert re.search(BAD[case], lines), lines
    assert lines.splitlines()[-1] == "will not load"


def test_inspect_may_also_be_a_prompt(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert "depthdiff -- inspect IMAGE" in capsys.readouterr().out
    assert main(["--", "inspect", str(tmp_path / "no.png")]) == 1
    assert "no.png is not a file" in capsys.readouterr().err


SIZE = """
import sys
from depthdiff.inspect_checkpoint import inspect
def now():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
base = now()
assert inspect(sys.argv[1]).loads
print(now() - base)
"""


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_no_tensor_is_read(single, tmp_path, form):
    """A file with 160 MB of ignored weights besides takes less than 60 MB more memory to look at."""
    path = tmp_path / f"big.{form}"
    tensors = {**single[1], "model_ema.big": torch.rand(40, 2**20)}
    save_file(tensors, path) if form == "safetensors" else torch.save(tensors, path)
    done = subprocess.run([sys.executable, "-c", SIZE, str(path)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 60e6


def lora_of(pipe, component, spelling):
    network = getattr(pipe, component)
    layer = next(name for name, _ in network.named_modules() if name.endswith(("attn1.to_q", "self_attn.q_proj")))
    outs, ins = network.get_submodule(layer).weight.shape
    down, up = torch.ones(4, ins), torch.ones(outs, 4)
    if spelling == "kohya":
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + layer.replace(".", "_")
        return {
            f"{prefix}.lora_down.weight": down,
            f"{prefix}.lora_up.weight": up,
            f"{prefix}.alpha": torch.tensor(2.0),
        }
    return {f"{component}.{layer}.lora_A.weight": down, f"{component}.{layer}.lora_B.weight": up}


@pytest.mark.parametrize("spelling", ["kohya", "peft"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "folder"])
def test_adapters(spelling, form, pipe, tmp_path):
    """Files and folders that `load_lora_weights` takes: which networks, how many layers, which ranks."""
    state = lora_of(pipe, "unet", spelling) | lora_of(pipe, "text_encoder", spelling)
    path = tmp_path / ("x.bin" if form == "bin" else "pytorch_lora_weights.safetensors")
    if form == "bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    report = inspect(tmp_path if form == "folder" else path)
    assert report.loads and report.layout == "adapter"
    assert [(part.name, part.kind) for part in report.components] == [("unet", "LoRA"), ("text_encoder", "LoRA")]
    assert all(part.config == {"layers": 1, "ranks": "4"} for part in report.components)
    assert sum(part.parameters for part in report.components) == sum(tensor.numel() for tensor in state.values())
    assert "load_lora_weights loads it" in report.text()
    pipe.load_lora_weights(tmp_path if form == "folder" else path)


@pytest.mark.parametrize("width", [768, 1024, 24])
def test_learnt_words(width, tmp_path):
    save_file({"<cup>": torch.ones(3, width)}, tmp_path / "learned_embeds.safetensors")
    report = inspect(tmp_path)
    assert report.loads and report.layout == "textual inversion"
    [word] = report.components
    assert word.name == "<cup>" and word.config["vectors"] == 3
    made = {768: "768 channels, of Stable Diffusion 1", 1024: "1024 channels, of Stable Diffusion 2"}
    assert word.config["made for"] == made.get(width, "24 channels")


@pytest.mark.parametrize("name", ["scheduler", "tokenizer", "feature_extractor", "vae"])
def test_single_components(name, tiny_folder, tmp_path):
    report = inspect(tiny_folder / name)
    assert report.loads and [part.name for part in report.components] == [name]
    assert f"it is a {name} alone" in report.text()
    if name == "scheduler":
        folder = tmp_path / "scheduler"
        shutil.copytree(tiny_folder / name, folder)
        config = json.loads((folder / "scheduler_config.json").read_text())
        (folder / "scheduler_config.json").write_text(json.dumps(config | {"_class_name": "EDMEulerScheduler"}))
        report = inspect(folder)
        assert not report.loads
        assert "scheduler (EDMEulerScheduler)" in report.text()
        assert "implemented here: DDIMInverseScheduler, DDIMScheduler, DDPMScheduler" in report.text()
