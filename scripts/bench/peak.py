"""Peak memory of one step: weights and work, each combination in a fresh process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.fresh import environment
from bench.meters import PACKAGES, PHOTO, ROOT, begin_peak, end_peak, memory

SWITCHES: dict[str, tuple[int, Callable[[Any], Any] | None]] = {
    "none": (1, None),
    "attention slicing": (1, lambda pipe: pipe.enable_attention_slicing()),
    "VAE tiling": (1, lambda pipe: pipe.vae.enable_tiling()),
    "batch 2": (2, None),
    "batch 2, VAE slicing": (2, lambda pipe: pipe.vae.enable_slicing()),
    "model offloading": (1, lambda pipe: pipe.enable_model_cpu_offload()),
    "sequential offloading": (1, lambda pipe: pipe.enable_sequential_cpu_offload()),
}
"""Name -> batch, what switches it on."""
OFFLOADING = ("model offloading", "sequential offloading")


def measure_peak(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Measure every size, switch and package; yield the lines of a table."""
    where = "GPU" if options.device.startswith("cuda") else "process, without its imports"
    yield f"Peak memory of the {where}: weights and one step, {options.exact_dtype}; above 1, depthdiff needs less."
    yield "\n| pixels | switch | depthdiff, MiB | diffusers, MiB | ratio |\n|---|---|---|---|---|"
    for size in options.sizes:
        for switch in options.switches or SWITCHES:
            if switch in OFFLOADING and not options.device.startswith("cuda"):
                continue
            peaks = [run(package, folder, options.exact_dtype, options.device, size, switch) for package in PACKAGES]
            cells = [peak if isinstance(peak, str) else f"{peak / 2**20:.0f}" for peak in peaks]
            ratio = "" if any(isinstance(peak, str) for peak in peaks) else f"{peaks[1] / peaks[0]:.2f}"  # type: ignore[operator]
            yield f"| {size} | {switch} | {' | '.join(cells)} | {ratio} |"


def run(*arguments: Any) -> int | str:
    """Measure one combination in a fresh process: bytes, or why there are none."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.peak", json.dumps([str(a) for a in arguments])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    if done.returncode == 0:
        return int(done.stdout.split()[-1])
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    return "out of memory" if "memory" in last.lower() else last.replace("|", "/")


def peak_of_step(package: str, folder: str, dtype: str, device: str, size: int, switch: str) -> int:
    """Load a pipeline, switch, take one step, and return the peak: bytes."""
    pipeline = __import__(package).StableDiffusionDepth2ImgPipeline
    imports = memory("VmRSS")
    pipe = pipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), local_files_only=True)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.depth_estimator):
        for weight in network.parameters():
            weight.detach().sum()  # weights that are mapped from a file count once they were read
    batch, turn_on = SWITCHES[switch]
    if switch not in OFFLOADING:
        pipe.to(device)
    if turn_on is not None:
        turn_on(pipe)
    pipe.set_progress_bar_config(disable=True)
    with Image.open(PHOTO) as file:
        photo = file.convert("RGB").resize((size, size))
    begin_peak(device)
    pipe(["two tigers"] * batch, [photo] * batch, num_inference_steps=1, strength=1.0, output_type="np")
    return end_peak(device) - (0 if device.startswith("cuda") else imports)


if __name__ == "__main__":
    package, folder, dtype, device, size, switch = json.loads(sys.argv[1])
    print(peak_of_step(package, folder, dtype, device, int(size), switch))
