"""Memory and time of windows beside whole pictures: random weights of a geometry, each case in a fresh process.

Run it as `PYTHONPATH=scripts python -m bench.windows [full] [--stride 256]`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch
from random_checkpoint import GEOMETRIES, build_pipeline

from bench.fresh import environment
from bench.meters import ROOT, begin_peak, end_peak

SIZE = 512


def measure(geometry: str, width: int, stride: int, steps: int) -> dict[str, float]:
    """Take some steps and decode; return MiB beyond what is in use before, and seconds of a step and of decoding."""
    torch.set_grad_enabled(False)
    pipe = build_pipeline(geometry)
    pipe.set_progress_bar_config(disable=True)
    depth = np.linspace(0, 1, SIZE * width, dtype=np.float32).reshape(SIZE, width)
    windows = (SIZE, stride) if stride else None
    run = pipe.prepare("two tigers", depth_map=depth, num_inference_steps=steps, windows=windows)
    before, begun = begin_peak("cpu"), time.perf_counter()
    for _ in pipe.denoise(run):
        pass
    stepped, step_peak = time.perf_counter(), end_peak("cpu")
    pipe.decode(run)
    peak = end_peak("cpu")
    return {
        "step_mib": (step_peak - before) / 2**20,
        "peak_mib": (peak - before) / 2**20,
        "step_s": (stepped - begun) / len(run),
        "decode_s": time.perf_counter() - stepped,
    }


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("geometry", nargs="?", choices=GEOMETRIES, default="full")
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--case", nargs=3, type=int, metavar=("WIDTH", "STRIDE", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(options.geometry, *options.case)))
        return
    print("| picture | windows | step, MiB | with decoding, MiB | step, s | decoding, s |\n|---|---|---|---|---|---|")
    calls = -(-3 * SIZE // options.stride)  # of the UNet, alike for both, since freed memory is not always reused
    for width, stride, steps in ((SIZE, 0, calls), (4 * SIZE, options.stride, 1), (4 * SIZE, 0, 1)):
        case = [str(width), str(stride), str(steps)]
        command = [sys.executable, "-m", "bench.windows", options.geometry, "--case", *case]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment())
        row = json.loads(done.stdout.splitlines()[-1])
        shown = f"{SIZE}, {stride}" if stride else "none"
        figures = [f"{row[name]:.0f}" for name in ("step_mib", "peak_mib")]
        figures += [f"{row[name]:.1f}" for name in ("step_s", "decode_s")]
        print(f"| {width}x{SIZE} | {shown} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
