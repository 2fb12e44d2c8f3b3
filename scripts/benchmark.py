"""Time every stage beside diffusers, in one run, in turns; print it as Markdown.

    python scripts/benchmark.py --geometry full --size 512 --dtype float32 --repeats 5 --stage unet decode
    python scripts/benchmark.py --stage unet call --dtype bfloat16 --compile --keep-freed
    python scripts/benchmark.py --stage peak --sizes 512 1024
    python scripts/benchmark.py --stage cold
    python scripts/benchmark.py --geometry full --dtype bfloat16 --stage decode --quiet

The weights are random, of the published geometry; both packages read the same files, at the same dtype. A ratio above
1 means that depthdiff is faster. Only ratios inside one run mean something.

Stages: import, load and lora run in fresh processes, and so does cold: the command `depthdiff` against a script for
diffusers. text, depth, encode, unet, decode and call run in this process after a warm-up; preset is a call with
depthdiff's preset "fast" beside all of diffusers' work. For these the table also has the peak of memory beyond what was
in use before, the operations of the plain formulas (matrix products, convolutions, attention), the rate of these, and
that rate as a share of the machine's best square matrix product. preset, and peak, which is a table of its own, run
only where they are named.

What depthdiff's fast computations bring is the difference between a run and one with --plain.

Who shares a machine with others times them as well. With --quiet every timing, of either package, waits until a matrix
product comes near its best rate and counts if one does so right after it too, and turns go on until there are enough;
what happens in between is not seen, which is the longer the slower a package is.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from bench import fresh, peak, warm
from bench.meters import MATMUL_SIZES, PACKAGES, Quiet, Row, machine, matmul_rate
from random_checkpoint import GEOMETRIES, build_pipeline

from depthdiff.options import build_parser
from depthdiff.process import keep_freed_buffers

STAGES = (*fresh.STAGES, *warm.STAGES, "peak")
COLUMNS = ("stage", "depthdiff, s", "diffusers, s", "ratio", "peak, MiB", "GFLOP", "TFLOP/s", "of best", "")


def describe(options: argparse.Namespace, best: float) -> str:
    """Say where and how this ran."""
    kind = f"both compiled ({options.compile})" if options.compile else "eager"
    kind += ", depthdiff without its fast computations" if options.plain else ""
    kind += ", a step of depthdiff's captured" if options.capture else ""
    kept = ", freed memory kept by the allocator" if options.keep_freed else ""
    sizes = " and ".join(map(str, MATMUL_SIZES))
    rate = f" Best matrix product of {sizes} beforehand: {best / 1e12:.3g} TFLOP/s." if best else ""
    spread = f"medians of {options.repeats} (lowest to highest)"
    if options.quiet:
        spread = f"medians of the timings next to which a matrix product reached {options.quiet:.0%} of its best rate "
        spread += f"(lowest to highest; how many, {options.repeats} were wanted)"
    return (
        f"{machine()}.\n\n{options.weights}, {options.size}x{options.size}, "
        f"{options.exact_dtype} on {options.device}, {torch.get_num_threads()} threads, {kind}{kept}; {spread}; "
        f"pairs are depthdiff / diffusers.{rate}"
    )


def cells(row: Row, best: float, quiet: float | None) -> list[str]:
    """Write a row of the table; with the number of timings where not all count."""
    medians = [statistics.median(row.seconds[package]) for package in PACKAGES]
    spreads = [row.seconds[package] for package in PACKAGES]
    counts = [f"; {len(spread)}" if quiet else "" for spread in spreads]
    times = [f"{m:.3g} ({min(s):.3g} to {max(s):.3g}{n})" for m, s, n in zip(medians, spreads, counts, strict=True)]
    rest = ["", "", "", ""]
    if row.flops:
        rates = [row.flops[package] / median for package, median in zip(PACKAGES, medians, strict=True)]
        rest = [
            " / ".join(f"{row.peak[package] / 2**20:.0f}" for package in PACKAGES),
            f"{row.flops['depthdiff'] / 1e9:.4g}",
            " / ".join(f"{rate / 1e12:.3g}" for rate in rates),
            " / ".join(f"{rate / best:.0%}" for rate in rates),
        ]
    return [row.label, *times, f"{medians[1] / medians[0]:.2f}", *rest, row.remark]


def line(parts: Sequence[str]) -> str:
    """Join cells to a line of Markdown."""
    return f"| {' | '.join(parts)} |"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and fill in what depends on other things."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=(512, 768, 1024, 2048), help="for peak (%(default)s)")
    parser.add_argument("--switches", choices=peak.SWITCHES, nargs="+", metavar="SWITCH", help="for peak (all)")
    parser.add_argument("--steps", type=int, help="of a whole call (5; cold: the command's default)")
    parser.add_argument("--strength", type=float, help="of a whole call (1; cold: the command's default)")
    parser.add_argument("--guidance", type=float, help="of a whole call (the command's default)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="float32",
        help="of both packages; auto is what depthdiff chooses by itself (%(default)s)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="%(default)s")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=STAGES[:-2], help="all but preset and peak")
    parser.add_argument(
        "--compile", nargs="?", const="reduce-overhead", metavar="MODE", help="compile both, each in its own way"
    )
    parser.add_argument("--capture", action="store_true", help="capture a step of depthdiff's (GPU)")
    parser.add_argument("--plain", action="store_true", help="leave depthdiff's fast computations off")
    parser.add_argument("--keep-freed", action="store_true", help="glibc's allocator keeps what is freed")
    parser.add_argument(
        "--quiet",
        type=float,
        nargs="?",
        const=0.75,
        metavar="SHARE",
        help="count timings only while the machine is left alone: a matrix product at this share of its best (0.75)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="folder to use, or to make with random weights (a temporary one)"
    )
    options = parser.parse_args(arguments)
    if options.capture and not options.device.startswith("cuda"):
        parser.error("--capture needs a GPU")
    if options.quiet is not None and not 0 < options.quiet <= 1:
        parser.error(f"--quiet must be above 0 and at most 1, got {options.quiet}")
    command = build_parser().parse_args(["prompt", "image"])
    wanted = {name: getattr(options, name) for name in ("steps", "strength", "guidance")}
    options.cold = [getattr(command, name) if value is None else value for name, value in wanted.items()]
    for name, value in {"steps": 5, "strength": 1.0, "guidance": command.guidance}.items():
        if wanted[name] is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    if options.keep_freed and not keep_freed_buffers():
        raise OSError("--keep-freed needs glibc's allocator")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.checkpoint or Path(temporary) / "checkpoint"
        options.weights = f"weights of {folder.resolve().name}"
        if not (folder / "model_index.json").exists():
            options.weights = f"{options.geometry} geometry, random weights"
            dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
            build_pipeline(options.geometry).to(dtype).save_pretrained(folder)
            gc.collect()
        options.exact_dtype = options.dtype
        if options.dtype == "auto":
            dtype = warm.load("depthdiff", folder, "auto", options.device, options.plain).unet.dtype
            options.exact_dtype = str(dtype).removeprefix("torch.")
        timed = [stage for stage in options.stage if stage != "peak"]
        exact = getattr(torch, options.exact_dtype)
        needed = options.quiet or any(stage in warm.STAGES for stage in timed)
        best = matmul_rate(exact, options.device) if needed else 0.0
        options.watch = Quiet(exact, options.device, options.quiet, best) if options.quiet else None
        print(describe(options, best), end="\n\n", flush=True)
        if timed:
            print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n")
            for measure in (fresh.measure_fresh, warm.measure_warm):
                for row in measure(options, folder):
                    best = max(best, options.watch.rate) if options.watch else best
                    print(line(cells(row, best, options.quiet)), flush=True)
            print()
        if "peak" in options.stage:
            for text in peak.measure_peak(options, folder):
                print(text, flush=True)


if __name__ == "__main__":
    main()
