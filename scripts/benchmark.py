"""Time every stage beside diffusers, in one run, in turns; print medians and ratios as a Markdown table.

    python scripts/benchmark.py --geometry full --size 512 --dtype float32 --repeats 5 --stage unet decode

The weights are random, of the published geometry; both packages read the same files. A ratio above 1 means that
depthdiff is faster. Only ratios inside one run mean something.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from random_checkpoint import GEOMETRIES, build_pipeline
from safetensors.torch import load_file, save_file

from depthdiff import CLIPTextModel, UNet2DConditionModel
from depthdiff import StableDiffusionDepth2ImgPipeline as Pipeline
from depthdiff.checkpoint.tables import TABLES

PHOTO = Path(__file__).parent.parent / "tests" / "data" / "coffee.png"
STAGES = ("import", "load", "lora", "text", "depth", "encode", "unet", "decode", "call")
PACKAGES = ("depthdiff", "diffusers")

IMPORT = "import time; s = time.perf_counter(); from {package} import StableDiffusionDepth2ImgPipeline; {end}"
LOAD = """
import time, torch
from {package} import StableDiffusionDepth2ImgPipeline as Pipeline
def peak():  # of this process alone; ru_maxrss would begin with that of the process that started it
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
base = peak()
s = time.perf_counter()
pipe = Pipeline.from_pretrained({folder!r}, torch_dtype=torch.{dtype}, local_files_only=True)
seconds = time.perf_counter() - s
networks = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.depth_estimator]
size = sum(p.numel() * p.element_size() for n in networks for p in n.parameters())
for network in networks:
    for p in network.parameters():
        p.detach().sum()
print(seconds, time.perf_counter() - s, (peak() - base) / size)
"""
FLOOR = """
import time
buffer = bytearray(2**24)
s = time.perf_counter()
for path in {paths!r}:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
print(time.perf_counter() - s)
"""
LORA = """
import statistics, time, torch
from {package} import StableDiffusionDepth2ImgPipeline as Pipeline
def memory(name):
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024
pipe = Pipeline.from_pretrained({folder!r}, torch_dtype=torch.{dtype}, local_files_only=True)
sample = torch.randn(2, 5, {latent}, {latent}, dtype=pipe.unet.dtype)
context = torch.randn(2, 77, pipe.unet.config.cross_attention_dim, dtype=pipe.unet.dtype)
def step():
    times = []
    for _ in range(4):
        s = time.perf_counter()
        with torch.no_grad():
            pipe.unet(sample, 501, encoder_hidden_states=context)
        times.append(time.perf_counter() - s)
    return statistics.median(times[1:])
for p in pipe.text_encoder.parameters():
    p.detach().sum()
without = step()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
base = memory("VmRSS")
s = time.perf_counter()
pipe.load_lora_weights({file!r})
seconds = time.perf_counter() - s
extra = (memory("VmHWM") - base) / 2**20
print(seconds, extra, step() / without)
"""


def write_lora(folder: Path, path: Path, rank: int = 16) -> None:
    """Write a random LoRA for all attention layers of UNet and text encoder, in the layout of diffusers."""
    generator, state = torch.Generator().manual_seed(0), {}
    for component, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        with torch.device("meta"):
            network = kind.from_config(json.loads((folder / component / "config.json").read_text()))
        for key, weight in network.named_parameters():
            if key.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.weight")):
                stem = f"{component}." + TABLES[kind.__name__].published(key).removesuffix(".weight")
                o, i = weight.shape
                state[f"{stem}.lora_A.weight"] = torch.randn(rank, i, generator=generator) * 0.01
                state[f"{stem}.lora_B.weight"] = torch.randn(o, rank, generator=generator) * 0.01
    save_file(state, path)


def fresh(code: str) -> list[float]:
    """Run code in a new process; return the numbers of its last line."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.split("\n")[-2].split()]


def in_turns(actions: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run each action `repeats` times, the packages taking turns and the first of a turn alternating."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats):
        for name in list(actions) if turn % 2 == 0 else list(reversed(actions)):
            seconds[name].append(actions[name]())
    return seconds


def timed(action: Callable[[], Any]) -> Callable[[], float]:
    """Make an action that runs `action` and returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def stage_actions(pipe: Any, size: int, steps: int) -> dict[str, Callable[[], Any]]:
    """List what each stage does, with the interface that both packages share."""
    device, dtype = pipe.device, pipe.unet.dtype
    latent = size // pipe.vae_scale_factor
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    sample, context = random(2, 5, latent, latent), random(2, 77, pipe.unet.config.cross_attention_dim)
    pixels, latents = random(1, 3, size, size).clamp(-1, 1), random(1, 4, latent, latent)
    side = pipe.depth_estimator.config.image_size
    values = random(1, 3, side, side).clamp(-1, 1)
    with Image.open(PHOTO) as file:
        photo = file.convert("RGB").resize((size, size))
    pipe.set_progress_bar_config(disable=True)
    return {
        "text": lambda: pipe.encode_prompt("two tigers", device, 1, True, "bad anatomy"),
        "depth": lambda: pipe.depth_estimator(values),
        "encode": lambda: pipe.vae.encode(pixels),
        "unet": lambda: pipe.unet(sample, 501, encoder_hidden_states=context),
        "decode": lambda: pipe.vae.decode(latents),
        "call": lambda: pipe(
            "two tigers", photo, num_inference_steps=steps, strength=1.0, generator=torch.Generator().manual_seed(0)
        ),
    }


def load_forms(folder: Path, dtype: str) -> dict[str, tuple[Path, str]]:
    """Write the same weights in other forms beside `folder`, once; name -> folder, dtype to load as."""
    half, pickles = (folder.with_name(f"{folder.name}-{form}") for form in ("half", "pickles"))
    if not half.exists():
        Pipeline.from_pretrained(folder, torch_dtype=torch.float16).save_pretrained(half)
    if not pickles.exists():
        shutil.copytree(folder, pickles, ignore=shutil.ignore_patterns("*.safetensors"))
        for path in folder.glob("*/*.safetensors"):
            stem = {"model": "pytorch_model"}.get(path.stem, path.stem)
            torch.save(load_file(path), pickles / path.parent.name / f"{stem}.bin")
    return {
        f"{dtype} safetensors": (folder, dtype),
        f"{dtype} safetensors as float16": (folder, "float16"),
        "float16 safetensors": (half, "float16"),
        f"{dtype} pickles": (pickles, dtype),
        f"{dtype} pickles as float16": (pickles, "float16"),
    }


def measure_load(options: argparse.Namespace, folder: Path) -> list[tuple[str, dict[str, list[float]], str]]:
    """Measure loading in each form, beside the time of reading the files' bytes and nothing else."""
    rows = []
    for form, (place, dtype) in load_forms(folder, options.dtype).items():
        results: dict[str, list[list[float]]] = {package: [] for package in PACKAGES}

        def load(package: str, place: Path = place, dtype: str = dtype, results: Any = results) -> float:
            results[package].append(fresh(LOAD.format(package=package, folder=str(place), dtype=dtype)))
            return results[package][-1][0]

        paths = [str(path) for path in sorted(place.glob("*/*")) if path.suffix in (".safetensors", ".bin")]
        floor = statistics.median(fresh(FLOOR.format(paths=paths))[0] for _ in range(options.repeats))
        actions = {package: (lambda package=package, load=load: load(package)) for package in PACKAGES}
        seconds = in_turns(actions, options.repeats)
        remark = "; ".join(
            f"{package}: {statistics.median(row[1] for row in results[package]):.3g} s until every weight was read, "
            f"peak memory / weights {max(row[2] for row in results[package]):.2f}"
            for package in PACKAGES
        )
        rows.append((f"load, warm cache, {form}", seconds, f"{remark}; reading the bytes alone {floor:.3g} s"))
    return rows


def measure(options: argparse.Namespace, folder: Path) -> list[tuple[str, dict[str, list[float]], str]]:
    """Measure the chosen stages: name, seconds of each package, a remark."""
    rows = []
    if "import" in options.stage:
        code = {package: IMPORT.format(package=package, end="print(time.perf_counter() - s)") for package in PACKAGES}
        actions = {package: (lambda package=package: fresh(code[package])[0]) for package in PACKAGES}
        rows.append(("import, fresh process, torch included", in_turns(actions, options.repeats), ""))
    if "load" in options.stage:
        rows += measure_load(options, folder)
    if "lora" in options.stage:
        file = folder.with_name(folder.name + "-lora.safetensors")
        write_lora(folder, file)
        results: dict[str, list[list[float]]] = {package: [] for package in PACKAGES}

        def load_lora(package: str) -> float:
            names = {"folder": str(folder), "file": str(file), "dtype": options.dtype, "latent": options.size // 8}
            results[package].append(fresh(LORA.format(package=package, **names)))
            return results[package][-1][0]

        actions = {package: (lambda package=package: load_lora(package)) for package in PACKAGES}
        seconds = in_turns(actions, options.repeats)
        remark = "; ".join(
            "{}: {:.0f} MiB more, a UNet call {:.2f} times as long".format(
                package, *(statistics.median(row[i] for row in results[package]) for i in (1, 2))
            )
            for package in PACKAGES
        )
        rows.append(("load a LoRA of rank 16", seconds, remark))
    warm = [stage for stage in STAGES[3:] if stage in options.stage]
    if not warm:
        return rows
    stages = {}
    for package in PACKAGES:
        pipeline = __import__(package).StableDiffusionDepth2ImgPipeline
        pipe = pipeline.from_pretrained(folder, torch_dtype=getattr(torch, options.dtype), local_files_only=True)
        stages[package] = stage_actions(pipe.to(options.device), options.size, options.steps)
    for stage in warm:
        actions = {package: timed(stages[package][stage]) for package in PACKAGES}
        for action in actions.values():
            action()  # warm up
        gc.collect()
        label = {"unet": "UNet, batch 2 (guidance)", "call": f"whole call, {options.steps} steps"}.get(stage, stage)
        rows.append((label, in_turns(actions, options.repeats), ""))
    return rows


def machine(options: argparse.Namespace) -> str:
    """Describe where this ran."""
    import diffusers

    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"{options.geometry} geometry, {options.size}x{options.size}, {options.dtype}, medians of {options.repeats}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument(
        "--checkpoint", type=Path, help="where to keep the random weights (default: a temporary folder)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.checkpoint or Path(temporary) / "checkpoint"
        if not (folder / "model_index.json").exists():
            pipeline = build_pipeline(options.geometry).to(getattr(torch, options.dtype))
            pipeline.save_pretrained(folder)
            del pipeline
            gc.collect()
        rows = measure(options, folder)
    print(machine(options), "\n", sep="\n")
    print("| stage | depthdiff, s | diffusers, s | ratio | |\n|---|---|---|---|---|")
    for label, seconds, remark in rows:
        ours, theirs = (statistics.median(seconds[package]) for package in PACKAGES)
        print(f"| {label} | {ours:.3g} | {theirs:.3g} | {theirs / ours:.2f} | {remark} |")


if __name__ == "__main__":
    main()
