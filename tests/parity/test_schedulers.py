"""Whole trajectories and configs against the schedulers of diffusers, driven as its pipeline drives them."""

import inspect
import json

import diffusers
import pytest
import torch

import depthdiff.schedulers as solvers

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PUBLISHED = {**BASE, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
RUNS = [(steps, strength) for steps in (1, 2, 5, 20, 50) for strength in (1.0, 0.8, 0.3)]
CASES = {
    "DDIMScheduler": [
        {**BASE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {**BASE, "clip_sample": True, "clip_sample_range": 1.5, "timestep_spacing": "trailing"},
        {**BASE, "clip_sample": False, "timestep_spacing": "linspace", "prediction_type": "v_prediction"},
        {"clip_sample": False, "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"clip_sample": False, "thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
        {
            **BASE,
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        {"clip_sample": False, "trained_betas": [0.0001 + 0.00002 * i for i in range(1000)]},
    ],
    "PNDMScheduler": [
        {**BASE, "skip_prk_steps": True, "steps_offset": 1},
        {**BASE, "skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "trailing"},
        {**BASE, "skip_prk_steps": True, "prediction_type": "v_prediction", "timestep_spacing": "linspace"},
        {**BASE, "skip_prk_steps": False, "steps_offset": 1},
        {"skip_prk_steps": False, "prediction_type": "v_prediction"},
    ],
    "LMSDiscreteScheduler": [
        BASE,
        {**BASE, "use_karras_sigmas": True},
        {**BASE, "use_exponential_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1},
        {**BASE, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"prediction_type": "sample", "use_karras_sigmas": True},
    ],
}
ALL = [(name, settings) for name, cases in CASES.items() for settings in cases]
IDS = [f"{name[:4]}-{i}" for name, cases in CASES.items() for i in range(len(cases))]


def network(latents, timestep):
    """Stand in for the UNet: deterministic, non-linear, different for every timestep and place."""
    place = torch.linspace(-1, 1, latents[0].numel()).view(latents[0].shape).to(latents.dtype)
    return torch.tanh(latents * 0.7 + place) + torch.sin(latents + float(timestep) / 300)


def drive(scheduler, clean, noise, steps, strength, eta=0.0, generator=None):
    """Run a scheduler with diffusers' contract in the way of its depth-to-image pipeline."""
    scheduler.set_timesteps(steps)
    start = max(steps - min(int(steps * strength), steps), 0)
    timesteps = scheduler.timesteps[start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    latents = scheduler.add_noise(clean, noise, timesteps[:1].repeat(len(clean)))
    accepted = inspect.signature(scheduler.step).parameters
    extra = {key: value for key, value in {"eta": eta, "generator": generator}.items() if key in accepted}
    seen = [latents]
    for timestep in timesteps:
        predicted = network(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[0]
        seen.append(latents)
    return timesteps, seen


def walk(scheduler, clean, noise, steps, strength, eta=0.0, generator=None):
    """Run a scheduler of ours by its plan."""
    plan = scheduler.plan(steps, strength, eta=eta)
    latents, state = plan.add_noise(clean, noise), plan.init_state()
    seen = [latents]
    for i, timestep in enumerate(plan.timesteps):
        predicted = network(plan.scale_model_input(latents, i), timestep)
        result = plan.step(predicted, i, latents, state, generator)
        latents, state = result.prev_sample, result.state
        seen.append(latents)
    return plan.timesteps, seen


def both(name, settings):
    return getattr(solvers, name)(**settings), getattr(diffusers, name)(**settings)


def noise_and_clean(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, 6, 10, generator=generator).to(dtype) for _ in range(2)]


def assert_same(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours[0].to(theirs[0].dtype), theirs[0], rtol=0, atol=0)
    assert len(ours[1]) == len(theirs[1])
    for mine, reference in zip(ours[1], theirs[1], strict=True):
        scale = reference.double().norm()
        assert (mine.double() - reference.double()).norm() <= tolerance * scale
        assert mine.dtype == reference.dtype


@pytest.mark.parametrize(("name", "settings"), ALL, ids=IDS)
def test_trajectories_equal(name, settings):
    """Observed: 0 for DDIM, at most 2e-7 for PNDM and 2e-6 for LMS, whose weights diffusers integrates numerically."""
    clean, noise = noise_and_clean()
    for steps, strength in RUNS:
        mine, reference = both(name, settings)
        if not settings.get("skip_prk_steps", True) and steps < 4:
            continue  # the reference cannot start its Runge-Kutta steps
        plan = mine.plan(steps, strength)
        if len(plan) == 0:  # the reference fails where no step remains
            assert torch.equal(plan.add_noise(clean, noise), clean)
            with pytest.raises((RuntimeError, IndexError)):
                drive(reference, clean, noise, steps, strength)
            continue
        expected = drive(reference, clean, noise, steps, strength)
        assert_same(walk(mine, clean, noise, steps, strength), expected)
        assert_same(drive(mine, clean, noise, steps, strength), expected)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_added_on_the_way_is_the_same(eta, prediction_type):
    """Observed: 0."""
    clean, noise = noise_and_clean()
    mine, reference = both("DDIMScheduler", {**BASE, "clip_sample": True, "prediction_type": prediction_type})
    expected = drive(reference, clean, noise, 20, 0.8, eta, torch.Generator().manual_seed(5))
    assert_same(walk(mine, clean, noise, 20, 0.8, eta, torch.Generator().manual_seed(5)), expected)
    assert_same(drive(mine, clean, noise, 20, 0.8, eta, torch.Generator().manual_seed(5)), expected)
    two = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = drive(reference, clean, noise, 5, 0.8, eta, two)
    two = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    assert_same(walk(mine, clean, noise, 5, 0.8, eta, two), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(CASES))
def test_half_precision_stays_half_precision(name, dtype):
    """Observed: 0, but for LMS in float16 1e-4."""
    clean, noise = noise_and_clean(dtype)
    mine, reference = both(name, CASES[name][0])
    expected = drive(reference, clean, noise, 20, 0.8)
    assert_same(walk(mine, clean, noise, 20, 0.8), expected, tolerance=1e-3)


@pytest.mark.parametrize("use_clipped", [False, True])
def test_clipped_model_output_and_predicted_clean_latents(use_clipped):
    mine, reference = both("DDIMScheduler", BASE)
    clean, noise = noise_and_clean()
    outputs = []
    for scheduler in (mine, reference):
        scheduler.set_timesteps(10)
        timestep = scheduler.timesteps[2]
        outputs.append(scheduler.step(noise, timestep, clean, use_clipped_model_output=use_clipped))
    torch.testing.assert_close(outputs[0].prev_sample, outputs[1].prev_sample, rtol=0, atol=0)
    torch.testing.assert_close(outputs[0].pred_original_sample, outputs[1].pred_original_sample, rtol=0, atol=0)
    assert len(outputs[0].to_tuple()) == len(outputs[1].to_tuple()) == 2


def test_text_to_image_loop_from_pure_noise():
    """The start of a run without an image, where `init_noise_sigma` counts. Observed: at most 2e-6."""
    for name, settings in ALL:
        latents = []
        for scheduler in both(name, settings):
            scheduler.set_timesteps(10)
            x = noise_and_clean()[0] * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                x = scheduler.step(network(scheduler.scale_model_input(x, timestep), timestep), timestep, x).prev_sample
            latents.append(x)
        assert (latents[0] - latents[1]).norm() <= 1e-5 * latents[1].norm()


def test_inversion_loop_that_reads_the_tables():
    """A loop as research code writes it: DDIM run backwards by hand from `alphas_cumprod` and `timesteps`."""
    results = []
    for scheduler in both("DDIMScheduler", {**BASE, "clip_sample": False, "set_alpha_to_one": False}):
        scheduler.set_timesteps(10)
        x = noise_and_clean()[0]
        for timestep in reversed(scheduler.timesteps):
            before = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
            a = scheduler.alphas_cumprod[timestep]
            b = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
            predicted = network(x, timestep)
            clean = (x - (1 - b) ** 0.5 * predicted) / b**0.5
            x = a**0.5 * clean + (1 - a) ** 0.5 * predicted
        results.append(x)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_sample": False},
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"clip_sample": True, "clip_sample_range": 1.5},
        {"clip_sample": False, "timestep_spacing": "trailing"},
    ],
)
def test_inverted_plans_are_the_inverse_scheduler(settings, prediction_type):
    """Against DDIMInverseScheduler, whose timesteps rise. Observed: 0."""
    settings = {**BASE, "prediction_type": prediction_type, **settings}
    mine, reference = solvers.DDIMScheduler(**settings), diffusers.DDIMInverseScheduler(**settings)
    for steps in (5, 20, 50):
        plan = mine.plan(steps).inverted()
        reference.set_timesteps(steps)
        assert torch.equal(plan.timesteps, reference.timesteps)
        x = y = noise_and_clean()[0]
        for i, timestep in enumerate(reference.timesteps):
            x = plan.step(network(x, timestep), i, x, None).prev_sample
            y = reference.step(network(y, timestep), timestep, y, return_dict=False)[0]
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "settings"), ALL, ids=IDS)
def test_noise_of_every_step(name, settings):
    """`plan.add_noise` at each index, against `add_noise` of diffusers at its timestep. Observed: 0."""
    clean, noise = noise_and_clean()
    for strength in (1.0, 0.3):
        mine, reference = both(name, settings)
        plan = mine.plan(20, strength)
        reference.set_timesteps(20)
        mine.set_timesteps(20)
        first = len(reference.timesteps) - len(plan)
        for i in range(len(plan)):
            expected = reference.add_noise(clean, noise, reference.timesteps[first + i : first + i + 1].repeat(2))
            torch.testing.assert_close(plan.add_noise(clean, noise, i), expected, rtol=0, atol=0)
            by_contract = mine.add_noise(clean, noise, mine.timesteps[first + i : first + i + 1])
            torch.testing.assert_close(by_contract, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "settings"), ALL, ids=IDS)
def test_noise_and_velocity_for_training(name, settings):
    clean, noise = noise_and_clean()
    mine, reference = both(name, settings)
    for scheduler in (mine, reference):
        scheduler.set_timesteps(20)
    timesteps = reference.timesteps[[3, 7]]
    if name != "LMSDiscreteScheduler":
        torch.testing.assert_close(
            mine.add_noise(clean, noise, timesteps), reference.add_noise(clean, noise, timesteps), rtol=0, atol=0
        )
    if hasattr(reference, "get_velocity"):
        expected = reference.get_velocity(clean, noise, timesteps)
        torch.testing.assert_close(mine.get_velocity(clean, noise, timesteps), expected, rtol=0, atol=0)
    assert len(mine) == len(reference)
    assert mine.order == reference.order
    torch.testing.assert_close(mine.alphas_cumprod, reference.alphas_cumprod, rtol=0, atol=0)


def plain(config):
    return {key: tuple(v) if isinstance(v, list) else v for key, v in dict(config).items() if not key.startswith("_")}


@pytest.mark.parametrize(
    "chain",
    [
        ["DDIMScheduler", "PNDMScheduler"],
        ["LMSDiscreteScheduler", "PNDMScheduler"],
        ["LMSDiscreteScheduler", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler"],
    ],
)
@pytest.mark.parametrize("start", [PUBLISHED, {**PUBLISHED, "timestep_spacing": "trailing"}, {"unknown_key": 3}])
@pytest.mark.parametrize("overrides", [{}, {"timestep_spacing": "linspace"}])
def test_chains_of_configs(chain, start, overrides):
    """What a scheduler takes over from the config of another, and what it keeps for a third."""
    mine, reference = solvers.PNDMScheduler.from_config(start), diffusers.PNDMScheduler.from_config(start)
    for name in chain:
        mine = getattr(solvers, name).from_config(mine.config, **overrides)
        reference = getattr(diffusers, name).from_config(reference.config, **overrides)
        ours, theirs = plain(mine.config), plain(reference.config)
        assert "fix_start" not in ours
        assert ours == theirs, name
        again = getattr(solvers, name).from_config({**mine.config})
        assert plain(again.config) == plain(mine.config)
        mine.set_timesteps(20)
        reference.set_timesteps(20)
        torch.testing.assert_close(mine.timesteps.to(reference.timesteps.dtype), reference.timesteps)


@pytest.mark.parametrize(("name", "settings"), ALL, ids=IDS)
def test_saved_configs_are_read_by_both(name, settings, tmp_path):
    mine, reference = both(name, settings)
    mine.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    assert plain(getattr(diffusers, name).from_pretrained(tmp_path / "ours").config) == plain(reference.config)
    loaded = plain(getattr(solvers, name).from_pretrained(tmp_path / "theirs").config)
    assert loaded == plain(mine.config)
    written = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())
    assert written["_class_name"] == name
