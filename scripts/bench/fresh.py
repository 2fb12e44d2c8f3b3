"""Stages that are timed in fresh processes: importing, loading, and the command from a cold start."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.meters import PACKAGES, ROOT, Row, in_turns
from depthdiff import CLIPTextModel, UNet2DConditionModel
from depthdiff import StableDiffusionDepth2ImgPipeline as Pipeline

STAGES = ("import", "load", "lora", "cold")
PROMPT = "a golden sphere and a blue cube, at sunset"
SCENE, MODEL = ROOT / "docs" / "scene.png", ROOT / "weights" / "mini"
PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
"""Of the attention of UNet and text encoder."""

IMPORT = "import time; s = time.perf_counter(); from {package} import StableDiffusionDepth2ImgPipeline; {end}"
LOAD = """
import time, torch
from {package} import StableDiffusionDepth2ImgPipeline as Pipeline
from bench.meters import memory
base = memory("VmHWM")  # ru_maxrss would begin with that of the process that started this one
s = time.perf_counter()
pipe = Pipeline.from_pretrained({folder!r}, torch_dtype=torch.{dtype}, local_files_only=True)
seconds = time.perf_counter() - s
networks = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.depth_estimator]
size = sum(p.numel() * p.element_size() for n in networks for p in n.parameters())
for network in networks:
    for p in network.parameters():
        p.detach().sum()
print(seconds, time.perf_counter() - s, (memory("VmHWM") - base) / size)
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
from bench.meters import memory
pipe = Pipeline.from_pretrained({folder!r}, torch_dtype=torch.{dtype}, local_files_only=True)
sample = torch.randn(2, 5, {latent}, {latent}, dtype=pipe.unet.dtype)
prompt_embeds = torch.randn(2, 77, pipe.unet.config.cross_attention_dim, dtype=pipe.unet.dtype)
def step():
    times = []
    for _ in range(4):
        s = time.perf_counter()
        with torch.no_grad():
            pipe.unet(sample, 501, encoder_hidden_states=prompt_embeds)
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


def environment() -> dict[str, str]:
    """Let a new process find the package and these scripts, and keep their bytecode, as that of what is installed."""
    paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    found = os.pathsep.join(path for path in paths if path)
    return os.environ | {"PYTHONPATH": found, "PYTHONDONTWRITEBYTECODE": ""}


def fresh(code: str) -> list[float]:
    """Run code in a new process; return the numbers of its last line."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment())
    return [float(number) for number in done.stdout.split("\n")[-2].split()]


def measure_fresh(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Measure the chosen stages of those in `STAGES`."""
    if "import" in options.stage:
        yield measure_import(options)
    if "load" in options.stage:
        yield from measure_load(options, folder)
    if "lora" in options.stage:
        yield measure_lora(options, folder)
    if "cold" in options.stage:
        yield measure_cold(options, folder)


def measure_import(options: argparse.Namespace) -> Row:
    """Measure importing the pipeline."""
    code = {package: IMPORT.format(package=package, end="print(time.perf_counter() - s)") for package in PACKAGES}
    actions = {package: (lambda package=package: fresh(code[package])[0]) for package in PACKAGES}
    return Row("import, fresh process, torch included", in_turns(actions, options.repeats, options.watch))


def measure_cold(options: argparse.Namespace, folder: Path) -> Row:
    """Measure the command, from the start of the process to its end, beside a script that does the same job."""
    place = folder.parent / f"{folder.name}-cold"
    place.mkdir(exist_ok=True)
    ours, theirs = (place / f"{package}.png" for package in PACKAGES)
    steps, strength, guidance = options.cold
    command = [sys.executable, "-m", "depthdiff", PROMPT, SCENE, "-o", ours, "--seed", 0, "--device", options.device]
    command += ["--steps", steps, "--strength", strength, "--guidance", guidance]
    command += [] if options.dtype == "auto" else ["--dtype", options.dtype]

    def run(command: list[Any]) -> float:
        start = time.perf_counter()
        subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=ROOT, env=environment())
        return time.perf_counter() - start

    run(command)  # also brings the files into the system's cache
    with Image.open(ours) as file:
        dtype = json.loads(file.text["depthdiff"])["dtype"]  # type: ignore[attr-defined]
    script = [sys.executable, ROOT / "scripts" / "bench" / "repaint.py", MODEL, PROMPT, SCENE, theirs]
    script += [steps, strength, guidance, 0, options.device, dtype]
    run(script)
    actions = {"depthdiff": lambda: run(command), "diffusers": lambda: run(script)}
    seconds = in_turns(actions, options.repeats, options.watch)
    pictures = [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (ours, theirs)]
    remark = f"{dtype}; the pictures differ by at most {abs(pictures[0] - pictures[1]).max()} of 255"
    label = f"cold start to PNG, bundled model, {steps} steps, strength {strength:g}, guidance {guidance:g}"
    return Row(label, seconds, remark)


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


def measure_load(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Measure loading in each form, beside the time of reading the files' bytes and nothing else."""
    for form, (place, dtype) in load_forms(folder, options.exact_dtype).items():
        results: dict[str, list[list[float]]] = {package: [] for package in PACKAGES}

        def load(package: str, place: Path = place, dtype: str = dtype, results: Any = results) -> float:
            results[package].append(fresh(LOAD.format(package=package, folder=str(place), dtype=dtype)))
            return results[package][-1][0]

        paths = [str(path) for path in sorted(place.glob("*/*")) if path.suffix in (".safetensors", ".bin")]
        floor = statistics.median(fresh(FLOOR.format(paths=paths))[0] for _ in range(options.repeats))
        actions = {package: (lambda package=package, load=load: load(package)) for package in PACKAGES}
        seconds = in_turns(actions, options.repeats, options.watch)
        remark = "; ".join(
            f"{package}: {statistics.median(row[1] for row in results[package]):.3g} s until every weight was read, "
            f"peak memory / weights {max(row[2] for row in results[package]):.2f}"
            for package in PACKAGES
        )
        yield Row(f"load, warm cache, {form}", seconds, f"{remark}; reading the bytes alone {floor:.3g} s")


def write_lora(folder: Path, path: Path, rank: int = 16) -> None:
    """Write a random LoRA for all attention layers of UNet and text encoder, in the layout of diffusers."""
    generator, state = torch.Generator().manual_seed(0), {}
    for component, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        with torch.device("meta"):
            network = kind.from_config(json.loads((folder / component / "config.json").read_text()))
        for key, weight in network.named_parameters():
            if key.removesuffix(".weight").endswith(PROJECTIONS):
                stem = f"{component}.{key.removesuffix('.weight')}"
                o, i = weight.shape
                state[f"{stem}.lora_A.weight"] = torch.randn(rank, i, generator=generator) * 0.01
                state[f"{stem}.lora_B.weight"] = torch.randn(o, rank, generator=generator) * 0.01
    save_file(state, path)


def measure_lora(options: argparse.Namespace, folder: Path) -> Row:
    """Measure loading a LoRA, what memory it takes, and how much longer a UNet call is."""
    file = folder.with_name(folder.name + "-lora.safetensors")
    write_lora(folder, file)
    results: dict[str, list[list[float]]] = {package: [] for package in PACKAGES}

    def load_lora(package: str) -> float:
        names = {"folder": str(folder), "file": str(file), "dtype": options.exact_dtype, "latent": options.size // 8}
        results[package].append(fresh(LORA.format(package=package, **names)))
        return results[package][-1][0]

    actions = {package: (lambda package=package: load_lora(package)) for package in PACKAGES}
    seconds = in_turns(actions, options.repeats, options.watch)
    remark = "; ".join(
        "{}: {:.0f} MiB more, a UNet call {:.2f} times as long".format(
            package, *(statistics.median(row[i] for row in results[package]) for i in (1, 2))
        )
        for package in PACKAGES
    )
    return Row("load a LoRA of rank 16", seconds, remark)
