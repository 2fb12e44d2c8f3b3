"""Schedulers against mathematics: what must come out whatever the reference does."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from depthdiff.config import CheckpointError
from depthdiff.schedulers import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler
from depthdiff.schedulers.lms import lms_weights
from depthdiff.schedulers.pndm import ADAMS_BASHFORTH, RUNGE_KUTTA

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = {**BASE, "set_alpha_to_one": True}
KINDS = {
    "DDIM": (DDIMScheduler, {**LATENT, "clip_sample": False}),
    "PNDM": (PNDMScheduler, {**LATENT, "skip_prk_steps": True}),
    "PNDM, Runge-Kutta": (PNDMScheduler, {**LATENT, "skip_prk_steps": False}),
    "LMS": (LMSDiscreteScheduler, BASE),
    "LMS, Karras": (LMSDiscreteScheduler, {**BASE, "use_karras_sigmas": True}),
}


def make(name, **more):
    kind, settings = KINDS[name]
    return kind(**settings, **more)


def with_true_noise(scheduler, strength, steps=50, shape=(2, 4, 6, 10)):
    """Run a plan with the true noise as every prediction; return the largest error of the clean latents."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    plan = scheduler.plan(steps, strength)
    latents, state = plan.add_noise(clean, noise), plan.init_state()
    for i in range(len(plan)):
        result = plan.step(noise, i, latents, state)
        latents, state = result.prev_sample, result.state
    return (latents - clean).abs().max().item()


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.5, 0.3])
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_ddim_with_the_true_noise_recovers_the_clean_latents(strength, steps):
    """Observed: 1e-7 of float32 tables in float64 arithmetic."""
    assert with_true_noise(make("DDIM"), strength, steps) < 1e-5


@pytest.mark.parametrize("strength", [0.8, 0.5])
@pytest.mark.parametrize("name", ["PNDM", "PNDM, Runge-Kutta", "LMS", "LMS, Karras"])
def test_fixed_starts_end_at_the_clean_latents(name, strength):
    """Observed: at most 6e-6; without `fix_start` 0.30 and 0.19 for PNDM, 0.95 and 0.22 for LMS, as in diffusers."""
    assert with_true_noise(make(name, fix_start=True), strength) < 1e-4
    assert with_true_noise(make(name), strength) > 0.05
    assert with_true_noise(make(name), 1.0) < 1e-4


def test_the_default_has_the_error_of_the_reference():
    """The figures that were measured on diffusers 0.26.3 and 0.42.1; the largest error depends a little on the draw."""
    for name, strength, error in [("PNDM", 0.8, 0.30), ("PNDM", 0.5, 0.19), ("LMS", 0.8, 0.95), ("LMS", 0.5, 0.22)]:
        assert with_true_noise(make(name), strength) == pytest.approx(error, rel=0.35)


def go(plan, network, latents):
    """Walk through a plan with a network of (latents, timestep)."""
    state = plan.init_state()
    for i, timestep in enumerate(plan.timesteps):
        noise_pred = network(plan.scale_model_input(latents, i), timestep)
        latents, _, state = plan.step(noise_pred, i, latents, state)
    return latents


def affine(timestep):
    """Predict noise that depends on the timestep alone: then an inverted step undoes a step."""
    place = torch.linspace(-1, 1, 240, dtype=torch.float64).view(4, 6, 10)
    return place.cos() + float(timestep) / 500


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.3])
@pytest.mark.parametrize(
    "settings", [{}, {"set_alpha_to_one": False, "steps_offset": 1}, {"timestep_spacing": "trailing"}]
)
def test_inversion_and_denoising_lead_back_to_the_start(strength, settings):
    """Observed: 2e-14 in float64."""
    plan = DDIMScheduler(**{**LATENT, "clip_sample": False, **settings}).plan(20, strength)
    clean = torch.randn(2, 4, 6, 10, dtype=torch.float64)
    noisy = go(plan.inverted(), lambda latents, timestep: affine(timestep).expand_as(latents), clean)
    assert (noisy - clean).abs().max() > 0.1
    again = go(plan, lambda latents, timestep: affine(timestep).expand_as(latents), noisy)
    torch.testing.assert_close(again, clean, rtol=0, atol=1e-12)


def test_inversion_of_a_linear_network_gets_better_with_the_steps():
    """A network that looks at the latents, at the other end of each step, is off by the size of a step."""
    clean = torch.randn(2, 4, 6, 10, dtype=torch.float64)
    errors = []
    for steps in (25, 50, 100, 200):
        plan = make("DDIM").plan(steps, 0.8)
        network = lambda latents, timestep: 0.3 * latents + affine(timestep)  # noqa: E731
        errors.append((go(plan, network, go(plan.inverted(), network, clean)) - clean).abs().max().item())
    assert all(after < 0.7 * before for before, after in itertools.pairwise(errors)), errors


def test_an_inverted_plan_is_the_plan_backwards():
    plan = make("DDIM").plan(10, 0.8)
    inverse = plan.inverted()
    assert inverse.numbers == plan.numbers[::-1]
    assert inverse.timesteps.tolist() == plan.timesteps.tolist()[::-1]
    start, noise = torch.randn(2, 4, 6, 10), torch.randn(2, 4, 6, 10)
    assert torch.equal(inverse.add_noise(start, noise), start)  # set_alpha_to_one: a run backwards begins clean
    for i in range(1, len(plan)):
        assert torch.equal(inverse.add_noise(start, noise, i), plan.add_noise(start, noise, len(plan) - i))
    assert torch.equal(go(inverse.inverted(), lambda x, t: x.tanh(), start), go(plan, lambda x, t: x.tanh(), start))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_noise_of_any_step_is_that_of_its_timestep(name, strength):
    """Against the closed form in terms of ᾱ and of sigma. Observed: 4e-6, where sigma is 15."""
    scheduler = make(name)
    plan = scheduler.plan(12, strength)
    clean, noise = torch.randn(2, 4, 6, 10), torch.randn(2, 4, 6, 10)
    for i, number in enumerate(plan.numbers):
        if "LMS" in name:
            levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().log().tolist()
            below = min(int(number), 998)
            if "Karras" in name:
                sigma = math.exp(levels[below] + (number - below) * (levels[below + 1] - levels[below]))
            else:
                sigma = math.exp(levels[below]) * (below + 1 - number) + math.exp(levels[below + 1]) * (number - below)
            expected = clean + sigma * noise
        else:
            alpha_bar = scheduler.alphas_cumprod[int(number)].item()
            expected = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
        torch.testing.assert_close(plan.add_noise(clean, noise, i), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(plan.add_noise(clean, noise), plan.add_noise(clean, noise, 0))
    assert plan.add_noise(clean, noise, len(plan)) is clean
    for index in (-1, len(plan) + 1):
        with pytest.raises(ValueError, match="index must be in"):
            plan.add_noise(clean, noise, index)
    with pytest.raises(ValueError, match="same shape"):
        plan.add_noise(clean, noise[:1])


def test_a_plan_without_steps_leaves_latents_clean():
    plan = make("DDIM").plan(10, 0.05)
    clean = torch.randn(2, 4, 6, 10)
    assert len(plan) == 0
    assert plan.add_noise(clean, torch.randn(2, 4, 6, 10)) is clean
    assert len(plan.inverted()) == 0


# Timesteps of one's own

UNEVEN = [981, 900, 761, 500, 420, 230, 77, 12]


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("name", KINDS)
def test_own_timesteps_with_the_true_noise_end_at_the_clean_latents(name, form):
    """Observed: 2e-6."""
    if "Karras" in name:
        return
    clean, noise = (torch.randn(2, 4, 6, 10, dtype=torch.float64) for _ in range(2))
    for strength, count in ((1.0, 8), (0.5, 4)):
        plan = make(name, **({"fix_start": True} if "LMS" in name else {})).plan(
            timesteps=form(UNEVEN), strength=strength
        )
        numbers = list(dict.fromkeys(plan.numbers))
        assert [one for one in numbers if one in UNEVEN] == UNEVEN[-count:]
        ended = go(plan, lambda x, t: noise, plan.add_noise(clean, noise))
        torch.testing.assert_close(ended, clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in KINDS if "Karras" not in name])
def test_own_timesteps_that_are_the_usual_ones_change_nothing(name):
    """Plan and contract, with the timesteps of ten steps given by hand. Observed: 0."""
    number, start = make(name), torch.randn(2, 4, 6, 10)
    number.set_timesteps(10)
    usual = make("DDIM").plan(10).numbers if "LMS" not in name else number.timesteps.tolist()
    own = make(name)
    own.set_timesteps(timesteps=usual)
    assert torch.equal(own.timesteps, number.timesteps)
    assert own.num_inference_steps == 10
    latents = [start, start]
    for timestep in number.timesteps:
        for i, scheduler in enumerate((number, own)):
            noise_pred = torch.tanh(scheduler.scale_model_input(latents[i], timestep))
            latents[i] = scheduler.step(noise_pred, timestep, latents[i]).prev_sample
        torch.testing.assert_close(*latents, rtol=0, atol=0)
    by_plan = go(own.plan(timesteps=usual), lambda x, t: torch.tanh(x), start)
    torch.testing.assert_close(by_plan, latents[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in KINDS if "Karras" not in name])
def test_own_timesteps_alike_in_plan_and_contract(name):
    scheduler, latents = make(name), torch.randn(2, 4, 6, 10)
    scheduler.set_timesteps(timesteps=UNEVEN)
    plan = scheduler.plan(timesteps=UNEVEN)
    assert torch.equal(plan.timesteps, scheduler.timesteps)
    expected = go(plan, lambda x, t: torch.tanh(x + t / 500), latents)
    for timestep in scheduler.timesteps:
        noise_pred = torch.tanh(scheduler.scale_model_input(latents, timestep) + timestep / 500)
        latents = scheduler.step(noise_pred, timestep, latents).prev_sample
    torch.testing.assert_close(latents, expected, rtol=0, atol=0)


def test_weights_of_the_multistep_methods_are_exact_integrals():
    """Adams-Bashforth of order k is exact for polynomials of degree below k; Runge-Kutta is Simpson's rule."""
    assert math.isclose(sum(RUNGE_KUTTA), 1.0, rel_tol=1e-15)
    for row in ADAMS_BASHFORTH:
        for degree in range(len(row)):
            integral = sum(weight * (-k) ** degree for k, weight in enumerate(row)) / sum(row)
            assert integral == pytest.approx(1 / (degree + 1), rel=1e-15)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_weights_are_the_integrals(order):
    """Against scipy's quadrature. Observed: 4e-15."""
    sigmas = [14.6, 9.1, 5.5, 3.3, 1.4, 0.7, 0.0]
    for index in range(3, 6):
        weights = lms_weights(sigmas, index, order)
        for current, weight in enumerate(weights):

            def lagrange(x, current=current, index=index):
                others = [k for k in range(order) if k != current]
                here = sigmas[index - current]
                return math.prod((x - sigmas[index - k]) / (here - sigmas[index - k]) for k in others)

            assert weight == pytest.approx(quad(lagrange, sigmas[index], sigmas[index + 1])[0], abs=1e-12)
        assert sum(weights) == pytest.approx(sigmas[index + 1] - sigmas[index], abs=1e-12)
    assert lms_weights(sigmas, 3, 1) == [pytest.approx(sigmas[4] - sigmas[3])]  # Euler's method


@pytest.mark.parametrize("name", KINDS)
def test_timesteps_fall(name):
    """With PNDM's repeated one as the only exception."""
    for steps in (1, 2, 5, 20, 50):
        if "Runge" in name:
            continue
        numbers = make(name).plan(steps).timesteps.tolist()
        rises = [i for i in range(len(numbers) - 1) if numbers[i] <= numbers[i + 1]]
        assert rises == ([1] if name == "PNDM" and steps > 1 else [])


@pytest.mark.parametrize("name", KINDS)
def test_plans_remember_nothing(name):
    """A second run is bitwise the first, and two runs taken in turns do not disturb each other."""
    scheduler = make(name)
    plan = scheduler.plan(8, 0.8)
    start = torch.randn(2, 4, 6, 10)

    def run():
        latents, state = start, plan.init_state()
        for i in range(len(plan)):
            result = plan.step(torch.tanh(latents + i), i, latents, state)
            latents, state = result.prev_sample, result.state
            yield latents

    alone = list(run())
    again = list(run())
    first, second = run(), run()
    in_turns = [(next(first), next(second)) for _ in range(len(plan))]
    for a, b, (c, d) in zip(alone, again, in_turns, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(a, d)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.numbers = ()
    before = list(run())
    scheduler.config.prediction_type = "v_prediction"
    scheduler.alphas_cumprod *= 0.5
    for a, b in zip(before, run(), strict=True):  # a plan is made once and for all
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_two_is_two_batches_of_one(name):
    plan = make(name).plan(6, 0.8)
    start = torch.randn(2, 4, 6, 10)

    def run(latents):
        state = plan.init_state()
        for i in range(len(plan)):
            result = plan.step(torch.tanh(latents + i), i, latents, state)
            latents, state = result.prev_sample, result.state
        return latents

    assert torch.equal(run(start), torch.cat([run(start[:1]), run(start[1:])]))


def test_zero_terminal_snr_ends_in_pure_noise():
    scheduler = DDIMScheduler(**LATENT, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.alphas_cumprod[0] == pytest.approx(DDIMScheduler(**LATENT).alphas_cumprod[0].item(), rel=1e-6)
    clean, noise = torch.randn(1, 4, 6, 10), torch.randn(1, 4, 6, 10)
    assert torch.equal(scheduler.plan(10).add_noise(clean, noise), noise)


def test_configs_read_like_dicts_and_positional_arguments_work():
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", None, False)
    config = scheduler.config
    assert (config.beta_start, config["beta_start"], config.get("nothing", 7)) == (0.00085, 0.00085, 7)
    assert config.clip_sample is False
    assert dict(**config)["beta_schedule"] == "scaled_linear"
    assert "fix_start" not in PNDMScheduler().config
    assert PNDMScheduler.from_config(PNDMScheduler(fix_start=True).config).fix_start is True
    assert PNDMScheduler.from_config(DDIMScheduler.from_config(PNDMScheduler(fix_start=True).config).config).fix_start
    assert len(scheduler) == 1000


X = torch.zeros(2, 4, 6, 10)


def started(kind, steps=0):
    scheduler = kind()
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps[:steps]:
        scheduler.step(X, timestep, scheduler.scale_model_input(X, timestep))
    scheduler.is_scale_input_called = True
    return scheduler


def test_subclasses_with_arguments_of_their_own():
    class Halved(DDIMScheduler):
        def __init__(self, factor, **settings):
            super().__init__(**settings)
            self.alphas_cumprod = self.alphas_cumprod * factor

    scheduler = Halved(0.5, beta_end=0.03)
    assert scheduler.config.beta_end == 0.03
    assert scheduler.alphas_cumprod[0] == pytest.approx(0.5 * DDIMScheduler().alphas_cumprod[0].item())
    scheduler.set_timesteps(10)
    assert scheduler.step(X, 500, X).prev_sample.shape == X.shape


BAD = [
    (lambda: DDIMScheduler(beta_schedule="cubic"), ValueError, "beta_schedule.*'cubic'"),
    (lambda: PNDMScheduler(prediction_type="sample"), ValueError, "prediction_type.*'sample'"),
    (lambda: DDIMScheduler(timestep_spacing="uneven"), ValueError, "timestep_spacing"),
    (lambda: DDIMScheduler(num_train_timesteps=0), ValueError, "num_train_timesteps"),
    (lambda: DDIMScheduler(beta_end=1.5), ValueError, "beta_end"),
    (lambda: DDIMScheduler(trained_betas=[0.1, 0.2]), ValueError, "trained_betas must hold 1000"),
    (lambda: DDIMScheduler(no_such_thing=1), TypeError, "DDIMScheduler.*no_such_thing"),
    (lambda: DDIMScheduler(1000, num_train_timesteps=1000), TypeError, "multiple values.*num_train_timesteps"),
    (lambda: LMSDiscreteScheduler(use_beta_sigmas=1), TypeError, "use_beta_sigmas"),
    (
        lambda: LMSDiscreteScheduler(use_karras_sigmas=True, use_exponential_sigmas=True),
        ValueError,
        "use_karras_sigmas and use_exponential_sigmas exclude",
    ),
    (lambda: DDIMScheduler.from_config({"beta_schedule": "cubic"}), CheckpointError, "beta_schedule"),
    (lambda: DDIMScheduler.from_config(3), ValueError, "config must be"),
    (lambda: DDIMScheduler().plan(0), ValueError, "num_inference_steps must be from 1 to 1000, got 0"),
    (lambda: DDIMScheduler().plan(1001), ValueError, "1001"),
    (lambda: DDIMScheduler().plan(2.5), TypeError, "2.5"),
    (lambda: DDIMScheduler().plan(True), TypeError, "True"),
    (lambda: DDIMScheduler().plan(10, 1.5), ValueError, "strength"),
    (lambda: DDIMScheduler().plan(10, "high"), TypeError, "strength"),
    (lambda: DDIMScheduler().plan(), ValueError, "num_inference_steps or timesteps must be given, .* got neither"),
    (lambda: DDIMScheduler().plan(3, timesteps=[3, 2]), ValueError, "got both"),
    (lambda: DDIMScheduler().set_timesteps(), ValueError, "got neither"),
    (
        lambda: DDIMScheduler().set_timesteps(timesteps=[3, 3]),
        ValueError,
        "timesteps must fall, .* got 3 after 3; sort",
    ),
    (lambda: PNDMScheduler().set_timesteps(timesteps=[1, 2]), ValueError, "got 2 after 1"),
    (lambda: DDIMScheduler().set_timesteps(timesteps=[1000]), ValueError, r"timesteps must be in \[0, 999\], got 1000"),
    (lambda: DDIMScheduler().set_timesteps(timesteps=[-1]), ValueError, "got -1"),
    (lambda: DDIMScheduler().set_timesteps(timesteps=[]), ValueError, "timesteps must hold 1 to"),
    (lambda: DDIMScheduler().set_timesteps(timesteps=[3.5]), TypeError, "timesteps must be an int, got float 3.5"),
    (lambda: DDIMScheduler().set_timesteps(timesteps="321"), TypeError, "timesteps must be a list of falling numbers"),
    (lambda: DDIMScheduler().set_timesteps(timesteps=torch.zeros(2, 2)), TypeError, "tensor of 2 dimensions"),
    (
        lambda: LMSDiscreteScheduler(use_karras_sigmas=True).set_timesteps(timesteps=[3.5]),
        ValueError,
        "timesteps must be None with use_karras_sigmas",
    ),
    (lambda: DDIMScheduler().step(X, 1, X), ValueError, "num_inference_steps is None: call set_timesteps"),
    (lambda: PNDMScheduler().step(X, 1, X), ValueError, "num_inference_steps is None: call set_timesteps"),
    (lambda: PNDMScheduler().step_prk(X, 1, X), ValueError, "num_inference_steps is None: call set_timesteps"),
    (lambda: PNDMScheduler().step(X, 1, X, eta=0.5), TypeError, "eta"),
    (lambda: started(DDIMScheduler).step(X, 1, X, eta=2), ValueError, r"eta must be in \[0, 1\], got 2"),
    (lambda: started(DDIMScheduler).step(X, 1000, X), ValueError, r"timestep must be in \[0, 999\], got 1000"),
    (lambda: started(DDIMScheduler).step(X, 1.5, X), ValueError, "timestep must be a whole number, got 1.5"),
    (lambda: started(LMSDiscreteScheduler, 4).step(X, 999, X), ValueError, "step must be called for 4 timesteps alone"),
    (lambda: started(DDIMScheduler).step(X, 1, X[:1]), ValueError, "model_output and sample must have the same shape"),
    (lambda: started(DDIMScheduler).step(X, 1, X, 1.0, variance_noise=X[:1]), ValueError, "variance_noise and sample"),
    (lambda: started(DDIMScheduler).step(X, 1, X, generator=3), TypeError, "generator must be a torch.Generator"),
    (lambda: started(DDIMScheduler).step(X, 1, X, return_dict=3), TypeError, "return_dict must be True or False"),
    (lambda: started(LMSDiscreteScheduler).step(X, 5.5, X), IndexError, "timestep must be one of `timesteps`, got 5.5"),
    (lambda: started(LMSDiscreteScheduler).step(X, 999, X, 0), ValueError, r"order must be in \[1, 20\], got 0"),
    (lambda: started(LMSDiscreteScheduler).set_begin_index(4), ValueError, r"begin_index must be in \[0, 3\], got 4"),
    (lambda: PNDMScheduler().plan(4).inverted(), NotImplementedError, "plans of DDIMScheduler and DPMSolver"),
    (lambda: LMSDiscreteScheduler().plan(4).inverted(), NotImplementedError, "LMSPlan cannot be inverted"),
    (
        lambda: DDIMScheduler().plan(4, eta=0.5).inverted(),
        ValueError,
        "eta must be 0 for a plan to be inverted, got 0.5",
    ),
    (lambda: DDIMScheduler().plan(4).step(X, 4, X, None), ValueError, r"index must be in \[0, 3\], got 4"),
    (lambda: PNDMScheduler().plan(4).step(X, 0, X, None), TypeError, "state must be that of the step before"),
    (lambda: LMSDiscreteScheduler().plan(4).step(X, 0, X, None), TypeError, "state must be that of the step before"),
    (lambda: DDIMScheduler().add_noise(X, X, [3]), TypeError, "timesteps must be a tensor"),
    (lambda: DDIMScheduler().add_noise(X, X, torch.tensor([1000])), ValueError, "timesteps must be from 0 to 999"),
    (lambda: LMSDiscreteScheduler().add_noise(X, X, torch.tensor([3.5])), ValueError, "among those of this run"),
    (
        lambda: DDIMScheduler().save_pretrained("x", push_to_hub=True),
        ValueError,
        "does not take push_to_hub: upload the saved folder",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
