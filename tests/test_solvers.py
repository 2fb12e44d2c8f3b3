"""Solvers against mathematics: orders of convergence, distributions, and runs with the true noise."""

import itertools
import math

import numpy as np
import pytest
import torch

from depthdiff import schedulers
from tests.gaussian import (
    BASE,
    MEAN,
    MULTI,
    SA,
    SINGLE,
    SOLVERS,
    SPREAD,
    alpha_of,
    first_sigma,
    level,
    make,
    make_plan,
    names,
    no_noise,
    normal,
    posterior_mean,
    predict,
    walk,
)

# Order of convergence


def falling_levels(count, graded):
    """Space levels from 8 to 0.08 unevenly in sigma and in its logarithm.

    With `graded`, the first step is divided into ones that double from a tiny one, so that what a multistep method does
    with few predictions, at its start, does not count.
    """
    roots = np.linspace(8 ** (1 / 7), 0.08 ** (1 / 7), count + 1)
    if graded:
        parts = roots[0] + (roots[1] - roots[0]) * 2.0 ** -np.arange(math.ceil(1.6 * math.log2(count)), 0, -1)
        roots = np.concatenate([roots[:1], parts, roots[1:]])
    return roots**7


def exact(sigma, alpha):
    """Return the latents of one solution at a noise level."""
    place = torch.linspace(-2, 2, 12, dtype=torch.float64).view(SPREAD.shape)
    return alpha * (MEAN + place * torch.sqrt(SPREAD**2 + sigma**2))


def error_of(scheduler, count, graded):
    """Return the largest error at the end of a run over `count` steps."""
    plan = scheduler.plan(sigmas=falling_levels(count, graded))
    kind, end, (sigma, alpha) = scheduler.config.prediction_type, float(plan.sigmas[-1]), level(plan, 0)
    last_alpha = 1.0 if alpha == 1 else alpha_of(end)
    network = lambda x, sigma, i: predict(kind, posterior_mean(x, sigma), x, sigma)  # noqa: E731
    return (walk(plan, network, exact(sigma, alpha)) - exact(end, last_alpha)).abs().max().item()


def order_of(scheduler, counts=(96, 192), graded=True):
    """Return the slope of the logarithm of the error."""
    few, many = (error_of(scheduler, count, graded) for count in counts)
    return math.log(few / many) / math.log(counts[1] / counts[0])


HIGH = {"lower_order_final": False}
DPM = {**HIGH, "final_sigmas_type": "sigma_min"}
UNIPC = "UniPCMultistepScheduler"
ORDERS = [
    ("EulerDiscreteScheduler", {}, 1),
    ("HeunDiscreteScheduler", {}, 2),
    ("KDPM2DiscreteScheduler", {}, 2),
    ("LMSDiscreteScheduler", {}, 4),
    *(
        (MULTI, {**DPM, "algorithm_type": kind, "solver_order": order, "solver_type": rule, "fix_order": fix}, reached)
        for kind in ("dpmsolver", "dpmsolver++")
        for order, rule, fix, reached in [
            *((1, "midpoint", False, 1), (2, "midpoint", False, 2), (2, "heun", False, 2)),
            *((3, "midpoint", False, 2), (3, "midpoint", True, 3)),
        ]
    ),
    *(
        (SINGLE, {**DPM, "algorithm_type": kind, "solver_order": order, "solver_type": rule}, order)
        for kind in ("dpmsolver", "dpmsolver++")
        for order, rule in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun"))
    ),
    *(("DEISMultistepScheduler", {**HIGH, "solver_order": order}, order) for order in (1, 2, 3)),
    *(
        (UNIPC, {**DPM, "solver_order": order, "solver_type": rule, "predict_x0": data, **more}, order + gain)
        for order, rule, data in itertools.product((1, 2, 3), ("bh1", "bh2"), (True, False))
        for more, gain in (({}, 1), ({"disable_corrector": tuple(range(1000))}, 0))
    ),
    *(
        (SA, {**HIGH, "algorithm_type": kind, "predictor_order": p, "corrector_order": c, "tau_func": no_noise}, order)
        for kind in ("data_prediction", "noise_prediction")
        for p, c, order in ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 3, 3), (3, 4, 4))
    ),
]


@pytest.mark.parametrize("kind, settings, order", ORDERS)
def test_order(kind, settings, order):
    """Observed: within 0.18, most within 0.02; errors from 4e-2 to 2e-8, where float64 has 1e-15.

    UniPC's corrector gains one order (arXiv:2302.04867, theorem 3.1), and SA-Solver's order is the lower one of its
    predictor's plus one and its corrector's predictions.
    """
    scheduler = getattr(schedulers, kind)(**{**BASE, **settings})
    assert order_of(scheduler, graded=kind != SINGLE) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("kind, orders", [("data_prediction", 3), ("data_prediction", 4), ("noise_prediction", 4)])
def test_more_than_the_order(kind, orders):
    """SA-Solver with a predictor as high as its corrector: later terms outweigh the first. Observed: 3.8, 5.2, 4.6."""
    both = {"predictor_order": orders, "corrector_order": orders}
    scheduler = make("SA, no noise", **HIGH, **both, algorithm_type=kind)
    assert order_of(scheduler, counts=(24, 192)) > orders - 0.2


STARTS = {"DPM++ 3, fixed": {**DPM, "euler_at_final": False}, "LMS": {}}


@pytest.mark.parametrize("name, most", [("DPM++ 3, fixed", 2.7), ("LMS", 3.2)])
def test_the_start_limits_a_high_order(name, most):
    """Without tiny first steps the very first one, of first order, counts. Observed: 2.1 against
    3.0, and 2.1 against 3.9.
    """
    scheduler = make(name, **STARTS[name])
    assert order_of(scheduler, (144, 288), graded=False) < most < order_of(scheduler, (144, 288))


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    "name", ["Euler", "Heun", "KDPM2", "LMS", "DPM++ 2", "DPM 2", "DPM++ 3, single", "UniPC 2", "SA, no noise"]
)
def test_predictions_of_each_type_lead_to_the_same_end(name, kind):
    """Observed: 1e-15; for LMS, whose levels are float32 in v_prediction, 9e-8."""
    usual, other = (error_of(make(name, prediction_type=one), 20, False) for one in ("epsilon", kind))
    assert other == pytest.approx(usual, abs=1e-6 if name == "LMS" else 1e-12)


@pytest.mark.parametrize("name", ["DDIM"])
def test_order_by_timesteps(name):
    """The error before the last step, to clean latents. Observed: 0.97."""
    errors = []
    for count in (100, 200):
        plan = make_plan(name, count)
        latents = exact(*level(plan, 0))
        for i in range(len(plan) - 1):
            sigma, alpha = level(plan, i)
            x = latents / alpha
            latents = plan.step(predict("epsilon", posterior_mean(x, sigma), x, sigma), i, latents, None).prev_sample
        errors.append((latents - exact(*level(plan, len(plan) - 1))).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)


# Distributions

PICTURES, ONE_MEAN, ONE_SPREAD = (20, 1, 25, 40), 0.4, 0.7


def drift(latents, alpha=1.0, spread=ONE_SPREAD):
    """Return by how much mean and deviation differ from those of the data, in terms of the latter."""
    x = latents / alpha
    return (x.mean().item() - ONE_MEAN) / spread, x.std().item() / spread - 1


def sampled(plan, network, seed=0):
    """Run a plan from noisy latents of true data."""
    clean, noise = normal(PICTURES, seed)
    latents = plan.add_noise(ONE_MEAN + ONE_SPREAD * clean, noise)
    return walk(plan, network, latents, torch.Generator().manual_seed(seed + 1))


def score(x, sigma, index):
    return predict("epsilon", posterior_mean(x, sigma, ONE_MEAN, ONE_SPREAD), x, sigma)


SDE = {"noisy": True, "use_karras_sigmas": True}
KARRAS = {"use_karras_sigmas": True}
TRUE_SDE = [
    ("Euler ancestral", 400, {}),
    ("KDPM2 ancestral", 100, KARRAS),
    ("DPM-Solver SDE", 25, KARRAS),
    ("DDPM", 500, {}),
    ("DDPM, large", 100, {}),
    ("DDIM, noisy", 500, {}),
    *(
        ("DPM++ 2, SDE", count, {**KARRAS, "solver_order": order, "solver_type": rule, "fix_order": order == 3})
        for order, rule, count in ((1, "midpoint", 300), (2, "midpoint", 100), (2, "heun", 100), (3, "midpoint", 100))
    ),
    *(
        ("DPM 2, SDE", 100, {**KARRAS, "solver_order": order, "solver_type": rule})
        for order, rule in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
    ),
    *(
        ("DPM++ 2, single, SDE", count, {**KARRAS, "solver_order": order, "solver_type": rule})
        for order, rule, count in ((1, "midpoint", 300), (2, "midpoint", 400), (2, "heun", 400), (3, "heun", 600))
    ),
    *(
        ("SA, noise", 100, {**KARRAS, "algorithm_type": kind, "predictor_order": p, "corrector_order": c})
        for kind in ("data_prediction", "noise_prediction")
        for p, c in ((2, 2), (3, 4))
    ),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, steps, settings", TRUE_SDE)
def test_stochastic_solvers_sample_the_data(name, steps, settings):
    """Mean and deviation of 20,000 numbers, whose standard errors are 0.7 % and 0.5 %.

    Methods of first order need many steps; so does the singlestep solver, whose calls each draw noise of their own, so
    that its deviation has an error of first order whatever `solver_order` is. Observed: at most 1.7 % for both.
    """
    plan = make(name, **settings).plan(steps, eta=SOLVERS[name]["eta"])
    for off in drift(sampled(plan, score)):
        assert abs(off) < 0.02


@pytest.mark.parametrize("churn", [10, 40])
def test_churn_samples_the_data(churn):
    """Euler's method with noise added before each step. Observed: 0.6 % and 1.5 %."""
    scheduler = make("Euler, Karras")
    scheduler.set_timesteps(600)
    clean, noise = normal(PICTURES, 0)
    generator, levels = torch.Generator().manual_seed(1), scheduler.sigmas.tolist()
    latents = ONE_MEAN + ONE_SPREAD * clean + levels[0] * noise
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, timestep)
        noise_pred = score(latents, levels[i], i)
        latents = scheduler.step(noise_pred, timestep, latents, s_churn=churn, generator=generator).prev_sample
    for off in drift(latents):
        assert abs(off) < 0.02


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_samples_the_data_with_a_true_trajectory_function(eta):
    """In 4 steps, where the network leads along the ordinary equation to any level. Observed: at most 0.5 %."""
    plan = make("TCD").plan(4, eta=eta)

    def network(x, sigma, index):
        after = [*plan.numbers, 0][index + 1]
        end = float(plan.alphas_cumprod[int((1 - eta) * after)])
        sigma_end = math.sqrt(1 / end - 1)
        arrived = ONE_MEAN + math.sqrt((ONE_SPREAD**2 + sigma_end**2) / (ONE_SPREAD**2 + sigma**2)) * (x - ONE_MEAN)
        return (x - arrived) / (sigma - sigma_end)  # the noise on the straight way there

    spread = math.sqrt(ONE_SPREAD**2 + first_sigma() ** 2)
    for off in drift(sampled(plan, network), alpha_of(first_sigma()), spread):
        assert abs(off) < 0.02


def test_lcm_samples_the_data_with_a_true_consistency_function():
    """In 4 steps. Observed: 0.4 %."""
    to_clean = lambda x, sigma, i: ONE_MEAN + ONE_SPREAD / math.sqrt(ONE_SPREAD**2 + sigma**2) * (x - ONE_MEAN)  # noqa: E731
    for off in drift(sampled(make_plan("LCM", 4, prediction_type="sample"), to_clean)):
        assert abs(off) < 0.02


UNIT_NOISE = [name for name in names(noisy=True) if name not in ("DDPM, large", "DPM 2, SDE", "SA", "TCD, noisy")]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", UNIT_NOISE)
def test_noise_keeps_unit_deviation_where_the_clean_latents_are_known(name):
    """Exact, in few steps, for methods that go by clean latents. Observed: at most 1.3 %, the largest of 8, whose
    standard errors are 0.5 %."""
    (clean, noise), deviations = normal(PICTURES, 3), []
    plan = make_plan(name, 8)
    network = lambda x, sigma, i: predict("epsilon", clean, x, sigma)  # noqa: E731
    watch = lambda x, sigma: deviations.append(((x - clean) / sigma).std().item())  # noqa: E731
    walk(plan, network, plan.add_noise(clean, noise), torch.Generator().manual_seed(4), watch)
    assert max(abs(one - 1) for one in deviations) < 0.02, deviations


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [name for name in UNIT_NOISE if name != "LCM"])
def test_first_steps_draw_from_the_posterior(name):
    """Given the clean latents, the next ones are normal as in arXiv:2006.11239, eq. 7. Observed: at most 0.8 %."""
    clean, noise = normal(PICTURES, 9)
    plan = make_plan(name, 4)
    start, calls = plan.add_noise(clean, noise), 2 if "KDPM2" in name or name == "DPM-Solver SDE" else 1
    (sigma, alpha), (sigma_next, alpha_next) = level(plan, 0), level(plan, calls)
    latents, state, generator = start, plan.init_state(), torch.Generator().manual_seed(10)
    for i in range(calls):
        now, factor = level(plan, i)
        noise_pred = predict("epsilon", clean, latents / factor, now)
        latents, _, state = plan.step(noise_pred, i, latents, state, generator)
    left = sigma_next**2 / sigma**2 * (start / alpha - clean)
    fresh = (latents / alpha_next - clean - left) / (sigma_next * math.sqrt(1 - sigma_next**2 / sigma**2))
    assert fresh.std().item() == pytest.approx(1, abs=0.02)
    assert abs((fresh * noise).mean().item()) < 0.02


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["Euler ancestral", "KDPM2 ancestral", "DPM-Solver SDE", "DPM++ 2, SDE", "SA, noise"])
def test_runs_over_own_levels_end_at_the_last_one(name):
    """Above zero, with unit deviation of what noise is left. Observed: at most 0.7 % of 0.5 % standard error."""
    clean, noise = normal(PICTURES, 7)
    plan = make(name).plan(sigmas=[8.0, 3.0, 1.0, 0.5])
    sigma, alpha = level(plan, 0)
    network = lambda x, sigma, i: predict("epsilon", clean, x, sigma)  # noqa: E731
    ended = walk(plan, network, alpha * (clean + sigma * noise), torch.Generator().manual_seed(8))
    left = (ended / (1.0 if alpha == 1 else alpha_of(0.5)) - clean) / 0.5
    assert left.std().item() == pytest.approx(1, abs=0.02)


# True noise


def expected_end(name, clean, noise):
    """Return the latents at which a run with true predictions ends, in closed form."""
    kind, sigma = SOLVERS[name]["end"], first_sigma()
    if kind == "zero":
        return clean
    return (alpha_of(sigma) if "Euler" not in name else 1.0) * (clean + sigma * noise)


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("name", [name for name, one in SOLVERS.items() if one["end"] in ("zero", "first")])
def test_true_predictions_end_at_the_truth(name, steps, strength):
    """Clean latents, or those at the noise level of the first training timestep. Observed: at most
    2e-6, of float32 tables."""
    clean, noise = normal((2, 4, 6, 10), 5)
    scheduler = make(name)
    plan = scheduler.plan(steps, strength, eta=SOLVERS[name]["eta"])
    noisy, kind, last = SOLVERS[name]["noisy"], SOLVERS[name]["end"], [noise]
    start = plan.add_noise(clean, noise)
    if len(plan) == 0:
        assert start is clean
        return

    def network(x, sigma, index):
        last[0] = predict("epsilon", clean, x, sigma)
        return last[0]

    if name != "PNDM" and (kind == "zero" or not noisy or name == "TCD, noisy"):  # PNDM's calls differ from its steps
        ended = walk(plan, network, start, torch.Generator().manual_seed(6))
        true = last[0] if name == "TCD, noisy" else noise
        torch.testing.assert_close(ended, expected_end(name, clean, true), rtol=0, atol=1e-5)
    if not noisy:
        ended = walk(plan, lambda x, sigma, i: noise, start)
        torch.testing.assert_close(ended, expected_end(name, clean, noise), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.3])
def test_lcm_ends_at_its_boundary_condition(strength):
    """c_skip and c_out: arXiv:2310.04378, eq. 9, with the data's deviation 0.5. Observed: 1.2e-7."""
    clean, noise = normal((2, 4, 6, 10), 5)
    plan, seen = make_plan("LCM", 5, strength), []
    start, generator = plan.add_noise(clean, noise), torch.Generator().manual_seed(6)
    network = lambda x, sigma, i: predict("epsilon", clean, x, sigma)  # noqa: E731
    ended = walk(plan, network, start, generator, lambda x, sigma: seen.append(x * alpha_of(sigma)))
    scaled = plan.numbers[-1] * 10.0
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
    torch.testing.assert_close(ended, c_out * clean + c_skip * seen[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("name", names(end="noise"))
def test_inverse_solvers_end_at_the_noise(name, steps):
    """Run backwards with the true noise. Observed: at most 2.2e-8."""
    clean, noise = normal((2, 4, 6, 10), 5)
    scheduler = make(name)
    plan = scheduler.plan(steps)
    ended = walk(plan, lambda x, sigma, i: noise, plan.add_noise(clean, noise))
    if name == "DDIM inverse":
        alpha = float(scheduler.alphas_cumprod[max(int(one) for one in plan.numbers)]) ** 0.5
        sigma = math.sqrt(1 / alpha**2 - 1)
    else:
        sigma = float(plan.sigmas[-1])
        assert sigma == pytest.approx(float((1 / scheduler.alphas_cumprod[999] - 1) ** 0.5), rel=1e-3)
        alpha = alpha_of(sigma)
    torch.testing.assert_close(ended, alpha * (clean + sigma * noise), rtol=0, atol=1e-5)
