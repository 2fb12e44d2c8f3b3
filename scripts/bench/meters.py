"""Seconds, bytes, operations, and what the machine could do at best."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

PACKAGES = ("depthdiff", "diffusers")
ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "tests" / "data" / "coffee.png"

MATMUL_SIZES = (2048, 4096)

PROBE = 2048
"""Rows and columns of the matrices whose product tells whether a machine is quiet."""

LONGEST_WAIT, MOST_TURNS = 60.0, 5
"""Seconds that a timing waits for a quiet machine, and turns for each timing that is wanted of one."""


@dataclass
class Row:
    """What was measured of a stage, by package.

    Attributes:
        label: of the stage.
        seconds: one number a repeat.
        remark: what else is to be said.
        peak: bytes that the stage needs at once beyond what was there before it.
        flops: floating-point operations.
    """

    label: str
    seconds: dict[str, list[float]]
    remark: str = ""
    peak: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)


class Quiet:
    """Tells how near to its best the machine is right now, which it may share with others.

    Args:
        dtype: of the matrix product that is timed.
        device: where it runs.
        share: of the best rate so far, 0..1, that makes a machine quiet.
        rate: the best so far, in operations a second.
    """

    def __init__(self, dtype: torch.dtype, device: str, share: float, rate: float) -> None:
        self.matrix = torch.randn(PROBE, PROBE, device=device).to(dtype)
        self.share = share
        self.best = 2 * PROBE**3 / rate

    def probe(self) -> float:
        """Time a matrix product, the shorter of two: seconds."""
        seconds = min(seconds_of(lambda: self.matrix @ self.matrix) for _ in range(2))
        self.best = min(self.best, seconds)
        return seconds

    def wait(self) -> float:
        """Wait until the machine is quiet, though no longer than `LONGEST_WAIT`; return the last product's seconds."""
        deadline = time.perf_counter() + LONGEST_WAIT
        while not self.is_quiet(seconds := self.probe()) and time.perf_counter() < deadline:
            time.sleep(0.2)
        return seconds

    @property
    def rate(self) -> float:
        """The best so far, in operations a second."""
        return 2 * PROBE**3 / self.best

    def is_quiet(self, seconds: float) -> bool:
        """Judge a product by the best so far."""
        return self.best >= self.share * seconds


def in_turns(
    actions: dict[str, Callable[[], float]], repeats: int, quiet: Quiet | None = None
) -> dict[str, list[float]]:
    """Run each action `repeats` times, the packages taking turns and the first of a turn alternating.

    With `quiet`, each timing waits for a quiet machine, only those count after which it still is, and turns go on until
    so many of each action do.

    Raises:
        TimeoutError: no timing of an action counts after `MOST_TURNS` times as many turns.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    counted: dict[str, list[float]] = {}
    for turn in range(repeats * (MOST_TURNS if quiet else 1)):
        for name in list(actions) if turn % 2 == 0 else list(reversed(actions)):
            before = quiet.wait() if quiet else 0.0
            seconds = actions[name]()
            taken[name].append((seconds, max(before, quiet.probe() if quiet else 0.0)))
        counted = {
            name: [seconds for seconds, probe in timings if quiet is None or quiet.is_quiet(probe)]
            for name, timings in taken.items()
        }
        if min(map(len, counted.values())) >= repeats:
            break
    if not all(counted.values()):
        raise TimeoutError(
            f"quiet: others used the machine throughout: of {len(taken[next(iter(taken))])} turns none counts; wait, "
            "or ask for a smaller share"
        )
    return counted


def synchronize() -> None:
    """Wait until a GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(action: Callable[[], Any]) -> float:
    """Time one run of `action`."""
    start = time.perf_counter()
    with torch.no_grad():
        action()
    synchronize()
    return time.perf_counter() - start


def memory(name: str) -> int:
    """Return a line of this process's status, such as VmRSS (now) or VmHWM (the peak), in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def begin_peak(device: str) -> int:
    """Let the peak begin anew, with nothing freed held back; return the bytes that are in use."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def end_peak(device: str) -> int:
    """Return the peak since `begin_peak`: bytes."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else memory("VmHWM")


def peak_of(action: Callable[[], Any], device: str) -> int:
    """Return how many bytes `action` needs at once, beyond what is in use before it."""
    before = begin_peak(device)
    seconds_of(action)
    return max(0, end_peak(device) - before)


def flops_of(action: Callable[[], Any]) -> int:
    """Count the floating-point operations of matrix products, convolutions and attention.

    Of depthdiff's networks those of the plain formulas: while work is watched, their fast computations are off.
    """

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    kernels = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # which torch does not count
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        seconds_of(action)
    return counter.get_total_flops()


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Return the best rate of a square matrix product here, in operations a second."""
    best = 0.0
    for size in MATMUL_SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        deadline, runs = time.perf_counter() + 2, 0
        while runs < 2 or (runs < 20 and time.perf_counter() < deadline):
            best = max(best, 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b))
            runs += 1
    return best


def machine() -> str:
    """Describe the machine and the versions."""
    import diffusers
    import transformers

    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in lines}
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in facts.get("flags", "").split()]
    gpu = "no GPU"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    parts = [
        f"{facts.get('model name') or platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        ", ".join(flags) or "neither amx_bf16 nor avx512_bf16",
        gpu,
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}",
    ]
    return "; ".join(parts)
