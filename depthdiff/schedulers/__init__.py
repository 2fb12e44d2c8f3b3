"""Noise schedules and solvers, one family a file; the classes are imported when they are asked for.

A solver is three things: its formula, a pure function; a `Plan`, whose `step` calls it at an index of a run; and a
scheduler with the published constructor, whose `step` calls it with its attributes. DDIM, DDPM and PNDM build on
`base.SchedulerMixin`, the others, which count their steps, on `indexed.IndexedSchedulerMixin`: those in terms of noise
levels by `sigmas.SigmaSchedulerMixin`, and the exponential integrators by `exponential.ExponentialSchedulerMixin`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

FILES = {
    "DDIMInverseScheduler": "ddim",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepInverseScheduler": "dpm_solver",
    "DPMSolverMultistepScheduler": "dpm_solver",
    "DPMSolverSDEScheduler": "dpm_sde",
    "DPMSolverSinglestepScheduler": "dpm_singlestep",
    "EulerAncestralDiscreteScheduler": "euler",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "SASolverScheduler": "sa_solver",
    "TCDScheduler": "lcm",
    "UniPCMultistepScheduler": "unipc",
}
"""Class -> its file."""


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FILES})
