"""The names under which solvers are known: our short ones, and those of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from depthdiff.checks import brief, nearest


class Named(NamedTuple):
    """A solver by a short name.

    Attributes:
        kind: name of its class.
        others: its names in A1111's program, ComfyUI's and diffusers' older arguments.
        settings: of its constructor that the name stands for.
    """

    kind: str
    others: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}


SHORT_NAMES: Mapping[str, Named] = {
    "pndm": Named("PNDMScheduler", ("PLMS",)),
    "ddim": Named("DDIMScheduler", ("DDIM",)),
    "ddpm": Named("DDPMScheduler", ("DDPM",)),
    "lms": Named("LMSDiscreteScheduler", ("LMS",)),
    "euler": Named("EulerDiscreteScheduler", ("Euler",)),
    "euler_a": Named("EulerAncestralDiscreteScheduler", ("Euler a", "euler_ancestral")),
    "heun": Named("HeunDiscreteScheduler", ("Heun",)),
    "dpm2": Named("KDPM2DiscreteScheduler", ("DPM2",)),
    "dpm2_a": Named("KDPM2AncestralDiscreteScheduler", ("DPM2 a", "dpm_2_ancestral")),
    "dpmpp_2m": Named("DPMSolverMultistepScheduler", ("DPM++ 2M", "dpm"), {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": Named("DPMSolverMultistepScheduler", ("DPM++ 2M SDE",), {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": Named("DPMSolverSinglestepScheduler", (), {"algorithm_type": "dpmsolver++"}),
    "dpmpp_sde": Named("DPMSolverSDEScheduler", ("DPM++ SDE",)),
    "deis": Named("DEISMultistepScheduler", ("DEIS",)),
    "unipc": Named("UniPCMultistepScheduler", ("UniPC", "uni_pc")),
    "sa_solver": Named("SASolverScheduler", ("SA-Solver",)),
    "lcm": Named("LCMScheduler", ("LCM",)),
    "tcd": Named("TCDScheduler", ("TCD",)),
}
"""Short name -> solver. `others` begins with A1111's name, where that program has the solver."""

SUFFIXES = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas"}
"""What A1111's names end in -> the setting it stands for."""


def find_scheduler(name: str, argument: str = "scheduler") -> tuple[str, dict[str, Any]]:
    """Look up a solver.

    Args:
        name: a class's name, a short one, or A1111's, in any case and with or without spaces, hyphens and underscores;
            A1111's may end in "Karras" or "Exponential".
        argument: for errors.

    Returns:
        The name of the class, and settings of its constructor.

    Raises:
        ValueError: an unknown name.
    """
    known: dict[str, Named] = {}
    for short, solver in SHORT_NAMES.items():
        for one in (short, solver.kind, solver.kind.removesuffix("Scheduler"), *solver.others):
            known.setdefault(_plainly(one), solver)
    wanted = _plainly(name) if isinstance(name, str) else ""
    for suffix, setting in {"": None, **SUFFIXES}.items():
        solver_or_none = known.get(wanted.removesuffix(suffix)) if wanted.endswith(suffix) else None
        if solver_or_none is not None:
            as_class = wanted.removesuffix("scheduler") == _plainly(solver_or_none.kind.removesuffix("Scheduler"))
            settings = {} if as_class else dict(solver_or_none.settings)
            return solver_or_none.kind, settings | ({} if setting is None else {setting: True})
    raise ValueError(
        f"{argument} must be one of {', '.join(SHORT_NAMES)}, or the name of a class or A1111's, got {brief(name)}"
        f"{nearest(name, [*SHORT_NAMES, *(one for solver in SHORT_NAMES.values() for one in solver.others)])}"
    )


def _plainly(name: str) -> str:
    """Write a name without what its spellings differ in."""
    return "".join(letter for letter in name.casefold().replace("++", "pp") if letter not in " -_")
