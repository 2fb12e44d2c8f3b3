"""Data of which everything is known in closed form, and every solver there is, for the tests of solvers.

Each number of the data is normal, with mean `MEAN` and deviation `SPREAD`. With noise of level sigma added, its
posterior mean is MEAN + SPREAD^2 / (SPREAD^2 + sigma^2) (x - MEAN), and along the ordinary differential equation
(x - MEAN) / sqrt(SPREAD^2 + sigma^2) stays as it is.
"""

import functools
import math

import numpy as np
import torch

from depthdiff import schedulers
from depthdiff.schedulers.exponential import ExponentialPlan
from depthdiff.schedulers.pndm import PNDMPlan

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPREAD = torch.tensor(np.geomspace(0.2, 2.0, 12)).view(1, 2, 2, 3)
MEAN = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 2, 2, 3)


def no_noise(timestep):
    return 0.0


def all_noise(timestep):
    return 1.0


def solver(kind, end="zero", noisy=False, eta=0.0, **settings):
    """Describe a solver: its class, settings, share of noise, whether it adds noise, and where its runs end."""
    return {"kind": kind, "end": end, "noisy": noisy, "eta": eta, "settings": {**BASE, **settings}}


LOW = {"end": "first", "final_sigmas_type": "sigma_min"}
MULTI, SINGLE, SA = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"
EULER, ANCESTRAL, HEUN = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"
KDPM2, KDPM2A, DPM_SDE = "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"
DEIS, UNIPC, DDPM = "DEISMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler"
LCM, TCD, LMS = "LCMScheduler", "TCDScheduler", "LMSDiscreteScheduler"
DDIM_INVERSE, MULTI_INVERSE = "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"
SOLVERS = {
    "Euler": solver("EulerDiscreteScheduler"),
    "Euler, Karras": solver("EulerDiscreteScheduler", use_karras_sigmas=True),
    "Euler, log-linear": solver("EulerDiscreteScheduler", "first", interpolation_type="log_linear"),
    "Euler, to sigma_min": solver("EulerDiscreteScheduler", **LOW),
    "Euler ancestral": solver("EulerAncestralDiscreteScheduler", noisy=True),
    "Heun": solver("HeunDiscreteScheduler"),
    "KDPM2": solver("KDPM2DiscreteScheduler"),
    "KDPM2 ancestral": solver("KDPM2AncestralDiscreteScheduler", noisy=True),
    "LMS": solver("LMSDiscreteScheduler", fix_start=True),
    "DPM-Solver SDE": solver("DPMSolverSDEScheduler", noisy=True),
    "DDPM": solver("DDPMScheduler", noisy=True, clip_sample=False),
    "DDPM, large": solver("DDPMScheduler", noisy=True, clip_sample=False, variance_type="fixed_large"),
    "DDIM": solver("DDIMScheduler", clip_sample=False),
    "DDIM, noisy": solver("DDIMScheduler", noisy=True, eta=1.0, clip_sample=False),
    "PNDM": solver("PNDMScheduler", fix_start=True, set_alpha_to_one=True),
    "DPM++ 1": solver(MULTI, solver_order=1),
    "DPM++ 2": solver(MULTI),
    "DPM++ 2, Heun": solver(MULTI, solver_type="heun", use_karras_sigmas=True),
    "DPM++ 3": solver(MULTI, solver_order=3),
    "DPM++ 3, fixed": solver(MULTI, solver_order=3, fix_order=True, euler_at_final=True),
    "DPM 2": solver(MULTI, algorithm_type="dpmsolver", **LOW),
    "DPM 3": solver(MULTI, algorithm_type="dpmsolver", solver_order=3, use_lu_lambdas=True, **LOW),
    "DPM++ 2, SDE": solver(MULTI, noisy=True, algorithm_type="sde-dpmsolver++"),
    "DPM++ 3, SDE": solver(MULTI, noisy=True, algorithm_type="sde-dpmsolver++", solver_order=3),
    "DPM 2, SDE": solver(MULTI, noisy=True, algorithm_type="sde-dpmsolver", **LOW),
    "DPM++ 2, single": solver(SINGLE),
    "DPM++ 3, single": solver(SINGLE, solver_order=3, solver_type="heun"),
    "DPM 3, single": solver(SINGLE, solver_order=3, algorithm_type="dpmsolver", **LOW),
    "DPM++ 2, single, SDE": solver(SINGLE, noisy=True, algorithm_type="sde-dpmsolver++"),
    "DEIS 2": solver("DEISMultistepScheduler", "first"),
    "DEIS 3": solver("DEISMultistepScheduler", "first", solver_order=3, use_exponential_sigmas=True),
    "UniPC 2": solver("UniPCMultistepScheduler"),
    "UniPC 3, bh1": solver("UniPCMultistepScheduler", solver_order=3, solver_type="bh1"),
    "UniPC 2, noise": solver("UniPCMultistepScheduler", predict_x0=False, **LOW),
    "SA, no noise": solver(SA, "first", tau_func=no_noise, predictor_order=3, corrector_order=4),
    "SA, noise": solver(SA, "first", noisy=True, tau_func=all_noise),
    "SA": solver(SA, "first", noisy=True, algorithm_type="noise_prediction"),
    "TCD": solver("TCDScheduler", "first"),
    "TCD, noisy": solver("TCDScheduler", "first", noisy=True, eta=0.3),
    "LCM": solver("LCMScheduler", "boundary", noisy=True),
    "DDIM inverse": solver("DDIMInverseScheduler", "noise", clip_sample=False),
    "DPM++ 2, inverse": solver("DPMSolverMultistepInverseScheduler", "noise"),
}


def make(name, **more):
    """Make a scheduler of the table."""
    one = SOLVERS[name]
    return getattr(schedulers, one["kind"])(**{**one["settings"], **more})


def make_plan(name, steps=5, strength=1.0, **more):
    return make(name, **more).plan(steps, strength, eta=SOLVERS[name]["eta"])


def names(**wanted):
    """Return the names of solvers of a kind."""
    return [name for name, one in SOLVERS.items() if all(one[key] == value for key, value in wanted.items())]


@functools.cache
def first_sigma():
    """The noise level of the first training timestep, from the definition."""
    beta = BASE["beta_start"]
    return math.sqrt(beta / (1 - beta))


def level(plan, index):
    """Return the noise level at which a plan calls the network, and the factor alpha of its latents."""
    if hasattr(plan, "sigma"):
        sigma = plan.sigma(index)
        return sigma, alpha_of(sigma) if isinstance(plan, ExponentialPlan) else 1.0
    one = plan.alpha_prod_t[index] if hasattr(plan, "alpha_prod_t") else plan.alphas_cumprod[int(plan.numbers[index])]
    return math.sqrt(1 / float(one) - 1), math.sqrt(float(one))


def alpha_of(sigma):
    return 1 / math.sqrt(1 + sigma**2)


def predict(kind, x0, x, sigma):
    """Return what a network of a prediction type returns for clean latents `x0` and clean + sigma noise `x`."""
    epsilon = (x - x0) / sigma
    return {"epsilon": epsilon, "sample": x0, "v_prediction": (epsilon - sigma * x0) * alpha_of(sigma)}[kind]


def posterior_mean(x, sigma, mean=MEAN, spread=SPREAD):
    return mean + spread**2 / (spread**2 + sigma**2) * (x - mean)


def normal(shape, seed, count=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def walk(plan, network, latents, generator=None, watch=None):
    """Run a plan with a network of (latents / alpha, sigma, index); PNDM's has no level of its own at each call."""
    state = plan.init_state()
    for i in range(len(plan)):
        sigma, alpha = (math.nan, math.nan) if isinstance(plan, PNDMPlan) else level(plan, i)
        if watch is not None:
            watch(latents / alpha, sigma)
        latents, _, state = plan.step(network(latents / alpha, sigma, i), i, latents, state, generator)
    return latents
