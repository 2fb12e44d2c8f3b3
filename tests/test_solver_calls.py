"""Wrong calls of the solvers: one clear error each, before any work."""

import math

import pytest
import torch

from depthdiff import schedulers
from tests.gaussian import (
    ANCESTRAL,
    DDIM_INVERSE,
    DDPM,
    DEIS,
    DPM_SDE,
    EULER,
    HEUN,
    KDPM2,
    KDPM2A,
    LCM,
    LMS,
    MULTI,
    MULTI_INVERSE,
    SA,
    SINGLE,
    TCD,
    UNIPC,
)

KARRAS = {"use_karras_sigmas": True}


def plan_of(kind, settings=None, **arguments):
    return lambda: getattr(schedulers, kind)(**(settings or {})).plan(**arguments)


def started(kind, settings=None, **arguments):
    return lambda: getattr(schedulers, kind)(**(settings or {})).set_timesteps(**arguments)


def called(kind, settings=None, steps=2, calls=1, shape=(2, 4, 6, 10), noise_shape=None, **arguments):
    """Step through a run of diffusers' contract; the last call has the arguments."""

    def work():
        scheduler = getattr(schedulers, kind)(**(settings or {}))
        if steps:
            scheduler.set_timesteps(steps)
        latents = torch.zeros(shape)
        for i in range(calls):
            timestep = scheduler.timesteps[min(i, len(scheduler.timesteps) - 1)]
            last = i == calls - 1
            output = torch.zeros(noise_shape if noise_shape and last else shape)
            scheduler.scale_model_input(latents, timestep)
            scheduler.step(output, timestep, latents, **(arguments if last else {}))

    return work


def stepped(kind, settings=None, index=0, state=None, generator=None, latents=(2, 4, 6, 10), output=(2, 4, 6, 10)):
    """Take a step of a plan."""

    def work():
        plan = getattr(schedulers, kind)(**(settings or {})).plan(3)
        kept = plan.init_state() if state is None else state
        plan.step(torch.zeros(output), index, torch.zeros(latents), kept, generator)

    return work


THREE = [torch.Generator(), torch.Generator(), torch.Generator()]
SDE = {"algorithm_type": "sde-dpmsolver++"}
CALLS = {
    "karras and timesteps": (
        plan_of(EULER, KARRAS, timesteps=[900, 100]),
        ValueError,
        "timesteps must be None with use_karras_sigmas, which chooses them",
    ),
    "karras and timesteps of a contract": (
        started(MULTI, KARRAS, timesteps=[900, 100]),
        ValueError,
        "timesteps must be None with use_karras_sigmas, which chooses them",
    ),
    "continuous and timesteps": (
        plan_of(EULER, {"timestep_type": "continuous", "prediction_type": "v_prediction"}, timesteps=[900, 100]),
        ValueError,
        'timesteps must be None with timestep_type "continuous": they follow',
    ),
    "rising sigmas": (
        plan_of(EULER, sigmas=[1.0, 2.0, 0.0]),
        ValueError,
        "sigmas must not rise, got 2 after 1; sort them",
    ),
    "sigmas that rise at the end": (
        plan_of(MULTI, sigmas=[1.0, 0.0, 0.5]),
        ValueError,
        "sigmas must not rise, got 0.5 after 0; sort them",
    ),
    "one sigma": (
        plan_of(HEUN, sigmas=[1.0]),
        ValueError,
        r"sigmas must hold 2 to \d+ numbers, got 1; the last one is where the run ends",
    ),
    "negative sigma": (plan_of(UNIPC, sigmas=[1.0, -1.0]), ValueError, "sigmas must be at least 0, got -1.0"),
    "sigmas of nan": (plan_of(EULER, sigmas=[math.nan, 0.0]), ValueError, "sigmas must be at least 0, got nan"),
    "sigmas of words": (plan_of(EULER, sigmas=["a", "b"]), TypeError, "sigmas must be a number, got str 'a'"),
    "one number as sigmas": (
        plan_of(EULER, sigmas=3.0),
        TypeError,
        "sigmas must be a list of falling numbers, got float 3.0",
    ),
    "sigmas for DDPM": (
        plan_of(DDPM, sigmas=[1.0, 0.0]),
        ValueError,
        "sigmas must be None: (DDPM|LCM)Scheduler goes by timesteps; pass timesteps",
    ),
    "sigmas for LCM": (
        plan_of(LCM, sigmas=[1.0, 0.0]),
        ValueError,
        "sigmas must be None: (DDPM|LCM)Scheduler goes by timesteps; pass timesteps",
    ),
    "sigmas and steps": (
        plan_of(EULER, num_inference_steps=3, sigmas=[1.0, 0.0]),
        ValueError,
        "num_inference_steps, timesteps or sigmas must be given, one of them, got both",
    ),
    "three at once": (
        plan_of(EULER, num_inference_steps=3, timesteps=[3], sigmas=[1.0, 0.0]),
        ValueError,
        "num_inference_steps, timesteps or sigmas must be given, one of them, got three",
    ),
    "nothing": (
        plan_of(KDPM2),
        ValueError,
        "num_inference_steps or timesteps must be given, one of them, got neither",
    ),
    "steps and timesteps": (
        started(UNIPC, num_inference_steps=3, timesteps=[3, 2, 1]),
        ValueError,
        "num_inference_steps or timesteps must be given, one of them, got both",
    ),
    "steps and timesteps of LCM": (
        started(LCM, num_inference_steps=3, timesteps=[3, 2, 1]),
        ValueError,
        "num_inference_steps or timesteps must be given, one of them, got both",
    ),
    "rising timesteps": (
        started(DEIS, timesteps=[1, 2]),
        ValueError,
        "timesteps must fall, each once, got 2 after 1; sort them",
    ),
    "fractional timesteps": (started(SA, timesteps=[2.5, 1.0]), TypeError, "timesteps must be an int, got float 2.5"),
    "late timesteps": (plan_of(HEUN, timesteps=[1000, 1]), ValueError, r"timesteps must be in \[0, 999\], got 1000"),
    "more steps than LCM's": (
        plan_of(LCM, num_inference_steps=51),
        ValueError,
        "num_inference_steps must be from 1 to 50, got 51",
    ),
    "more steps than are left of LCM's": (
        started(LCM, num_inference_steps=30, strength=0.5),
        ValueError,
        "num_inference_steps must be at most 25, .*got 30; take fewer, or raise",
    ),
    "original steps of TCD": (
        started(TCD, num_inference_steps=4, original_inference_steps=2000),
        ValueError,
        r"original_inference_steps must be in \[1, 1000\], got 2000",
    ),
    "strength of TCD": (
        started(TCD, num_inference_steps=4, strength=1.5),
        ValueError,
        r"strength must be in \[0, 1\], got 1.5",
    ),
    "strength of nan": (
        plan_of(UNIPC, num_inference_steps=4, strength=math.nan),
        ValueError,
        r"strength must be in \[0, 1\], got nan",
    ),
    "eta": (plan_of(TCD, num_inference_steps=4, eta=2.0), ValueError, r"eta must be in \[0, 1\], got 2.0"),
    "too many steps": (
        plan_of(SINGLE, num_inference_steps=1001),
        ValueError,
        "num_inference_steps must be from 1 to 1000, got 1001",
    ),
    "no steps": (plan_of(SA, num_inference_steps=0), ValueError, "num_inference_steps must be from 1 to 1000, got 0"),
    "half a step": (
        plan_of(KDPM2A, num_inference_steps=2.5),
        TypeError,
        "num_inference_steps must be an int, got float 2.5",
    ),
    "offset": (
        plan_of(MULTI, {"timestep_spacing": "leading", "steps_offset": 999}, num_inference_steps=5),
        ValueError,
        "steps_offset 999 with 5 steps reaches timestep 1829; use fewer steps",
    ),
    "mu": (
        started(MULTI, num_inference_steps=5, mu=1.0),
        ValueError,
        "mu must be None, got 1.0: it is for flow matching",
    ),
    "mu of UniPC": (
        started(UNIPC, num_inference_steps=5, mu=1.0),
        ValueError,
        "mu must be None, got 1.0: it is for flow matching",
    ),
    "another T": (
        started(HEUN, num_inference_steps=5, num_train_timesteps=500),
        ValueError,
        "num_train_timesteps must be 1000, as in the config, got 500",
    ),
    "another T of KDPM2": (
        started(KDPM2A, num_inference_steps=5, num_train_timesteps=500),
        ValueError,
        "num_train_timesteps must be 1000, as in the config, got 500",
    ),
    **{
        f"inverted {kind}": (
            lambda kind=kind: plan_of(kind, num_inference_steps=5)().inverted(),
            NotImplementedError,
            "Plan cannot be inverted; plans of DDIMScheduler and DPMSolverMultistepScheduler can",
        )
        for kind in (EULER, HEUN, SINGLE, DEIS, UNIPC, SA, LCM, DDPM)
    },
    "inverted SDE": (
        lambda: plan_of(MULTI, SDE, num_inference_steps=5)().inverted(),
        ValueError,
        r"algorithm_type must be dpmsolver or dpmsolver\+\+ for a plan to be inverted, got sde",
    ),
    **{
        f"{kind} not started": (
            called(kind, steps=0),
            ValueError,
            "num_inference_steps is None: call set_timesteps before step",
        )
        for kind in (MULTI, SINGLE, DEIS, UNIPC, SA, LCM, TCD, MULTI_INVERSE, DDIM_INVERSE)
    },
    **{
        f"{kind} too often": (
            called(kind, calls=4 if kind in (HEUN, KDPM2, DPM_SDE) else 3),
            ValueError,
            "step must be called for [23] timesteps alone; call set_timesteps",
        )
        for kind in (EULER, HEUN, KDPM2, DPM_SDE, MULTI, SINGLE, DEIS, UNIPC, SA, LCM)
    },
    **{
        f"{kind} of another shape": (
            called(kind, noise_shape=(2, 4, 6, 9)),
            ValueError,
            r"model_output and sample must have the same shape, got \(2, 4, 6, 9\) and \(2, 4, 6, 10\)",
        )
        for kind in (EULER, HEUN, DPM_SDE, MULTI, UNIPC, SA, LCM, DDPM)
    },
    **{
        f"three generators for {kind}": (
            stepped(kind, more, generator=THREE),
            ValueError,
            "generator .*one, or (one for each|a list) of 2.*, got 3|a list of 2, one a sample, got 3",
        )
        for kind, more in ((ANCESTRAL, {}), (DPM_SDE, {}), (MULTI, SDE), (SINGLE, SDE), (SA, {}), (LCM, {}), (DDPM, {}))
    },
    "seed as generator": (
        stepped(ANCESTRAL, generator=3),
        TypeError,
        "generator must be a torch.Generator or a list of them, got int",
    ),
    "seed as generator of DPM-Solver SDE": (
        stepped(DPM_SDE, generator=3),
        TypeError,
        "generator must be a torch.Generator or a list of them, got int",
    ),
    "three seeds": (
        stepped(DPM_SDE, {"noise_sampler_seed": (1, 2, 3)}),
        ValueError,
        "noise_sampler_seed must be one, or one for each of 2 samples, got 3",
    ),
    "index": (stepped(UNIPC, index=3), ValueError, r"index must be in \[0, 2\], got 3"),
    "negative index": (stepped(EULER, index=-1), ValueError, r"index must be in \[0, 2\], got -1"),
    "state of another": (
        stepped(UNIPC, state=("x",)),
        TypeError,
        r"state must be that of the step before, or init_state\(\) for the first, got tuple",
    ),
    "shapes of a plan": (
        stepped(KDPM2, output=(2, 4, 6, 9)),
        ValueError,
        r"noise_pred and latents must have the same shape, got \(2, 4, 6, 9\)",
    ),
    "variance_noise": (
        called(MULTI, SDE, variance_noise=torch.zeros(2, 4, 6, 9)),
        ValueError,
        r"variance_noise and sample must have the same shape, got \(2, 4, 6, 9\)",
    ),
    "variance_noise of no tensor": (
        called(MULTI, SDE, variance_noise=[1.0]),
        TypeError,
        r"variance_noise must be a tensor \(B, C, h, w\), got list",
    ),
    "churn": (called(EULER, s_churn=-1.0), ValueError, "s_churn must be at least 0, got -1.0"),
    "churn of nan": (called(EULER, s_tmax=math.nan), ValueError, "s_tmax must be at least 0, got nan"),
    "s_noise": (called(DPM_SDE, s_noise=math.inf), ValueError, "s_noise must be at least 0, got inf"),
    "eta of a step": (called(TCD, eta=1.5), ValueError, r"eta must be in \[0, 1\], got 1.5"),
    "order of LMS": (called(LMS, order=0), ValueError, r"order must be in \[1, 20\], got 0"),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_are_refused(name):
    work, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        work()


def test_refused_calls_change_nothing():
    """A run goes on after a wrong call as if there had been none."""
    ends = []
    for wrong in (False, True):
        scheduler = schedulers.UniPCMultistepScheduler()
        scheduler.set_timesteps(4)
        latents = torch.ones(2, 4, 6, 10)
        for i, timestep in enumerate(scheduler.timesteps):
            if wrong and i:
                with pytest.raises(ValueError, match="same shape"):
                    scheduler.step(torch.zeros(2, 4, 6, 9), timestep, latents)
                with pytest.raises(ValueError, match="must be given"):
                    scheduler.set_timesteps()
            latents = scheduler.step(latents.tanh(), timestep, latents).prev_sample
        ends.append(latents)
    assert torch.equal(*ends)
