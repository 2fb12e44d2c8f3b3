"""Whole trajectories of every solver against diffusers, over pairs of settings; driven as its pipeline drives them.

Where diffusers computes coefficients in float32 with more than 1e-5 of error (differences of nearby exponentials,
`np.log` of float32), it is given the same noise levels in float64, and everything runs in float64.
"""

import inspect
import itertools
import json
import math
import random
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import depthdiff
import depthdiff.inspect_checkpoint
import depthdiff.schedulers as solvers
from depthdiff.schedulers.names import find_scheduler
from tests.parity.both import load_both, paint
from tests.parity.test_schedulers import BASE, assert_same, drive, network, noise_and_clean, plain, walk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

RUNS = [(steps, strength) for steps in (1, 2, 5, 20, 50) for strength in (1.0, 0.8, 0.3)]
SPACINGS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
PREDICTIONS = [{"prediction_type": kind} for kind in ("epsilon", "v_prediction", "sample")]
NOISE_OR_V = PREDICTIONS[:2]
STEPPING = [{}, {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}]
BETAS = [BASE, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_start": 0.0001, "beta_end": 0.02}, {}]
TRAINED = [{}, {"trained_betas": [0.0001 + 0.00002 * i for i in range(1000)]}]
ZERO_SNR = [{}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}]
CLIPPING = [{}, {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9}]
ENDS = [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}]
LOWER = [{}, {"lower_order_final": False}]


def named(name, *values):
    return [{name: value} for value in values]


DPM = [
    {"algorithm_type": "dpmsolver++"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "dpmsolver++", "final_sigmas_type": "sigma_min"},
]
ORDERS = named("solver_order", 1, 2, 3)
TYPES = named("solver_type", "midpoint", "heun")
AXES = {
    "DDPMScheduler": [
        *(BETAS, PREDICTIONS, STEPPING, TRAINED, CLIPPING, named("clip_sample", True, False)),
        named("variance_type", "fixed_small", "fixed_small_log", "fixed_large"),
        [{}, {"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace"}],
    ],
    "EulerDiscreteScheduler": [
        *(BETAS, PREDICTIONS, SPACINGS, STEPPING, TRAINED, ZERO_SNR, ENDS),
        [
            {},
            {"interpolation_type": "log_linear"},
            {"timestep_type": "continuous"},
            {"sigma_min": 0.1, "sigma_max": 9.0},
        ],
    ],
    "EulerAncestralDiscreteScheduler": [BETAS, NOISE_OR_V, STEPPING, TRAINED, ZERO_SNR],
    "HeunDiscreteScheduler": [
        *(BETAS, PREDICTIONS, SPACINGS, STEPPING, TRAINED),
        [{}, {"clip_sample": True, "clip_sample_range": 1.5}, {"beta_schedule": "exp"}],
    ],
    "KDPM2DiscreteScheduler": [BETAS, NOISE_OR_V, SPACINGS, STEPPING, TRAINED],
    "KDPM2AncestralDiscreteScheduler": [BETAS, NOISE_OR_V, SPACINGS, STEPPING, TRAINED],
    "DPMSolverMultistepScheduler": [
        *(BETAS, PREDICTIONS, [*SPACINGS, {"use_lu_lambdas": True}], STEPPING, ZERO_SNR, CLIPPING, LOWER),
        *([*DPM, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}], ORDERS, TYPES),
        [{}, {"euler_at_final": True}, {"lambda_min_clipped": -3.0}],
    ],
    "DPMSolverSinglestepScheduler": [
        *(BETAS, PREDICTIONS, SPACINGS, CLIPPING[:1], named("lower_order_final", True, False), DPM, ORDERS, TYPES),
        [{}, {"lambda_min_clipped": -3.0}],
    ],
    "DPMSolverSDEScheduler": [BETAS, NOISE_OR_V, SPACINGS, STEPPING, named("noise_sampler_seed", 3, 4)],
    "DEISMultistepScheduler": [BETAS, PREDICTIONS, SPACINGS, STEPPING, CLIPPING, LOWER, ORDERS],
    "UniPCMultistepScheduler": [
        *(BETAS, PREDICTIONS, SPACINGS, STEPPING, ZERO_SNR, CLIPPING, ORDERS, named("solver_type", "bh1", "bh2")),
        *(named("predict_x0", True, False), ENDS, [{}, {"disable_corrector": [0, 1]}]),
    ],
    "LCMScheduler": [
        *(BETAS, PREDICTIONS, CLIPPING, named("clip_sample", False, True), named("timestep_scaling", 10.0, 5.0)),
        named("original_inference_steps", 50, 100),
    ],
    "TCDScheduler": [BETAS, PREDICTIONS, named("original_inference_steps", 50, 100)],
    "SASolverScheduler": [
        *(BETAS, PREDICTIONS, SPACINGS, STEPPING, CLIPPING, LOWER, named("predictor_order", 1, 2, 3)),
        *(named("corrector_order", 1, 2, 3, 4), named("algorithm_type", "data_prediction", "noise_prediction")),
    ],
    "DDIMInverseScheduler": [
        *(BETAS, PREDICTIONS, STEPPING[1:], named("clip_sample", True, False), named("set_alpha_to_one", True, False)),
    ],
    "DPMSolverMultistepInverseScheduler": [
        *(BETAS, PREDICTIONS, SPACINGS[:2], STEPPING, LOWER, named("algorithm_type", "dpmsolver++", "dpmsolver")),
        *(ORDERS, TYPES),
    ],
}
SPACING = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
EXACT = ("DPMSolverSinglestepScheduler", "DPMSolverMultistepInverseScheduler", "DEISMultistepScheduler",
         "UniPCMultistepScheduler", "SASolverScheduler")  # fmt: skip
TOLERANCE = 1e-5
"""EXACT: those that are given their noise levels in float64."""


def pairwise(axes, seed=0):
    """Choose settings so that every pair of values of two axes occurs together: greedily, from shuffled candidates."""
    rng = random.Random(seed)
    pairs = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(axes)), 2)
        for a in range(len(axes[i]))
        for b in range(len(axes[j]))
    }
    rows = []
    while pairs:
        first = min(pairs)
        candidates = []
        for _ in range(30):
            row = [rng.randrange(len(axis)) for axis in axes]
            for i, a in first:
                row[i] = a
            new = {pair for pair in itertools.combinations(enumerate(row), 2) if pair in pairs}
            candidates.append((len(new), row, new))
        _, row, new = max(candidates, key=lambda one: one[0])
        pairs -= new
        rows.append({key: value for i, a in enumerate(row) for key, value in axes[i][a].items()})
    return rows


CASES = [(name, i, row) for name, axes in AXES.items() for i, row in enumerate(pairwise(axes) + pairwise(axes, 1))]
SOME = [case for case in CASES if case[1] % 6 == 0]
IDS = [f"{name.removesuffix('Scheduler')}-{i}" for name, i, _ in CASES]


def by_noise(row):
    return row.get("predict_x0") is False or row.get("algorithm_type") in (
        "dpmsolver",
        "sde-dpmsolver",
        "noise_prediction",
    )


def excuse(name, row):
    """Say what diffusers computes wrongly with such settings; see docs/schedulers.md. None where it does not."""
    if row.get("solver_order") == 3 and str(row.get("algorithm_type")).startswith("sde"):
        return "a wrong sign of the third order, or a crash"
    if row.get("thresholding") and by_noise(row) and "Multistep" not in name.replace("UniPCMultistep", ""):
        return "thresholding is ignored, or crashes"
    if name.endswith("InverseScheduler") and row.get("use_karras_sigmas"):
        return "equal timesteps are dropped, and their levels are not"
    return None


def comparable(name, row, plan, steps):
    """Return whether the reference's float32 can follow.

    Ancestral levels are differences of squares there, and middles means of logarithms; predicted noise is taken from
    latents that it nearly is.
    """
    if steps == 1 and any(row.get(key) for key in SPACING):
        return False  # the reference ends where it begins if it ends at sigma_min
    limits = {"KDPM2AncestralDiscreteScheduler": 10.0, "DPMSolverSDEScheduler": 30.0, "KDPM2DiscreteScheduler": 100.0}
    most = limits.get(name, 100.0 if by_noise(row) else math.inf)
    levels = [level for level in plan.sigmas.tolist() if level > 0] if hasattr(plan, "sigmas") else []
    if levels and levels[0] > 1000 and name in limits:
        return False
    return all(before / after < most for before, after in itertools.pairwise(levels))


def invert(scheduler, clean, steps):
    scheduler.set_timesteps(steps)
    latents, seen = clean, [clean]
    for timestep in scheduler.timesteps:
        latents = scheduler.step(network(latents, timestep), timestep, latents, return_dict=False)[0]
        seen.append(latents)
    return scheduler.timesteps, seen


def in_float64(name, row):
    """Make the reference go over its noise levels in float64."""
    reference = getattr(diffusers, name)(**row)
    plain = reference.set_timesteps

    def set_timesteps(*args, **kwargs):
        plain(*args, **kwargs)
        reference.sigmas = reference.sigmas.double()

    reference.set_timesteps = set_timesteps
    return reference


def check(name, row, runs):
    exact = name in EXACT
    clean, noise = noise_and_clean(torch.float64 if exact else torch.float32)
    for steps, strength in runs:
        mine = getattr(solvers, name)(**row)
        plan = mine.plan(steps, strength)
        if len(plan) == 0 or not comparable(name, row, plan, steps):
            continue
        reference = in_float64(name, row) if exact else getattr(diffusers, name)(**row)
        if name == "DDIMInverseScheduler":
            expected = invert(reference, clean, steps)
            if all(latents.isfinite().all() for latents in expected[1]):  # at ᾱ = 1 clean latents have no noise
                assert_same(invert(mine, clean, steps), expected, TOLERANCE)
            continue
        generators = [[torch.Generator().manual_seed(seed) for seed in (5, 6)] for _ in range(3)]
        expected = drive(reference, clean, noise, steps, strength, 0.0, generators[0])
        runs_of_mine = [walk(mine, clean, noise, steps, strength, 0.0, generators[1])]
        runs_of_mine += [drive(mine, clean, noise, steps, strength, 0.0, generators[2])]
        for timesteps, seen in runs_of_mine:
            torch.testing.assert_close(timesteps.double(), expected[0].double(), rtol=1e-5, atol=1e-3)
            if all(latents.isfinite().all() for latents in expected[1]):
                assert_same((expected[0], seen), expected, TOLERANCE)
            assert all(latents.isfinite().all() for latents in seen)


@pytest.mark.parametrize(
    ("name", "i", "row"), SOME, ids=[one for one, case in zip(IDS, CASES, strict=True) if case in SOME]
)
def test_some_trajectories(name, i, row):
    test_all_trajectories(name, i, row)


@pytest.mark.parametrize(("name", "i", "row"), CASES, ids=IDS)
def test_all_trajectories(name, i, row):
    if why := excuse(name, row):
        pytest.skip(f"diffusers: {why}")
    check(name, row, [RUNS[(i + 4 * k) % len(RUNS)] for k in range(3)])


@pytest.fixture(scope="module")
def pair(tiny_folder):
    return load_both(tiny_folder)


FORWARD = [name for name in solvers.FILES if "Inverse" not in name]


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", FORWARD)
def test_pictures_of_every_solver(pair, small_photo, name, strength):
    """Whole calls with two pictures and a list of generators. Observed: at most 2e-5 of full range."""
    pictures = []
    seed = {"noise_sampler_seed": (3, 4)} if name == "DPMSolverSDEScheduler" else {}
    for pipe, package in zip(pair, (solvers, diffusers), strict=True):
        config = {**pipe.scheduler.config, "solver_order": 2, **{key: list(value) for key, value in seed.items()}}
        pipe.scheduler = getattr(package, name).from_config(config)
        generator = [torch.Generator().manual_seed(one) for one in (7, 8)]
        pictures.append(
            pipe(["two tigers", "a cup"], small_photo, num_inference_steps=6, strength=strength, output_type="np",
                 generator=generator).images
        )  # fmt: skip
    difference = abs(pictures[0] - pictures[1]).max()
    assert difference <= 2e-3, difference


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "EulerDiscreteScheduler", "PNDMScheduler"]
)
def test_both_forms_of_callbacks(pair, small_photo, name):
    """The older form is called once a step, the newer one at every call of the UNet."""
    seen = []
    for pipe, package in zip(pair, (solvers, diffusers), strict=True):
        pipe.scheduler = getattr(package, name).from_config(pipe.scheduler.config)
        calls = []

        def old(index, timestep, latents, calls=calls):
            calls.append((index, round(float(timestep), 2)))

        def new(pipe, index, timestep, tensors, calls=calls):
            calls.append((index, round(float(timestep), 2), *tensors))
            return tensors

        for how in ({"callback": old, "callback_steps": 2}, {"callback_on_step_end": new}):
            paint(pipe, small_photo, num_inference_steps=5, **how)
        seen.append(calls)
    assert seen[0] == seen[1]


DRAWING = ("EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "DDPM", "DPMSolverSDE", "SASolver", "LCM")
QUIET = [name for name in FORWARD if name.removesuffix("Scheduler") not in DRAWING]
"""Those that draw no noise, whose numbers would depend on the dtype."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", QUIET)
def test_half_precision(name, dtype):
    """As close to float32 as the reference, which mostly computes in half precision, or 2e-3 (bfloat16: 2e-2)."""
    clean, noise = noise_and_clean(dtype)

    def run(package, dtype):
        return drive(getattr(package, name)(), clean.to(dtype), noise.to(dtype), 8, 0.8)[1]

    mine, reference, exact = run(solvers, dtype), run(diffusers, dtype), run(solvers, torch.float32)[-1]
    assert all(latents.dtype == dtype for latents in mine)
    distance, allowed = ((one[-1].float() - exact).norm() / exact.norm() for one in (mine, reference))
    assert distance <= max(1.2 * allowed, 2e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize("name", solvers.FILES)
def test_signatures_begin_as_published(name):
    """Constructor, step and others take the published arguments in their order; ours may have more at the end."""
    for method in ("__init__", "step", "set_timesteps", "add_noise", "scale_model_input"):
        reference = getattr(getattr(diffusers, name), method, None)
        if reference is None:
            continue
        theirs = [one for one in inspect.signature(reference).parameters if one not in ("args", "kwargs")]
        ours = list(inspect.signature(getattr(getattr(solvers, name), method)).parameters)
        if method == "scale_model_input":
            ours = ours[: len(theirs)]
        if method == "set_timesteps":  # UniPC's levels are those of flow matching; SA-Solver and others take more here
            theirs = [one for one in theirs if one != "sigmas" or name == "EulerDiscreteScheduler"]
            assert set(theirs) <= set(ours)
        else:
            assert ours[: len(theirs)] == theirs, method
    defaults = {
        key: value.default for key, value in inspect.signature(getattr(diffusers, name).__init__).parameters.items()
    }
    for key, value in inspect.signature(getattr(solvers, name).__init__).parameters.items():
        if key in defaults:
            assert value.default == defaults[key] or (value.default, defaults[key]) == ((), [])


@pytest.mark.parametrize("start", solvers.FILES)
def test_configs_between_any_two(start):
    """What each takes over from the config of another, and that runs go over the same timesteps and levels."""
    mine, reference = getattr(solvers, start)(), getattr(diffusers, start)()
    for name in solvers.FILES:
        ours = getattr(solvers, name).from_config(mine.config)
        theirs = getattr(diffusers, name).from_config(reference.config)
        for key, value in plain(ours.config).items():
            assert plain(theirs.config).get(key, value) == value, (name, key)
        ours.set_timesteps(10)
        theirs.set_timesteps(10)
        torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=1e-5, atol=1e-3)
        assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma))


@pytest.mark.parametrize("name", FORWARD)
def test_a_checkpoint_that_names_it(name, tiny_folder, tmp_path, pair, small_photo):
    """Saved by diffusers, loaded and saved by us, loaded by diffusers."""
    reference = pair[1]
    reference.scheduler = getattr(diffusers, name).from_config(reference.scheduler.config)
    shutil.copytree(tiny_folder, tmp_path / "theirs")
    reference.scheduler.save_pretrained(tmp_path / "theirs" / "scheduler")
    index = tmp_path / "theirs" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))
    pipe = depthdiff.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "theirs")
    assert type(pipe.scheduler).__name__ == name
    pipe.scheduler.save_pretrained(tmp_path / "ours")
    again = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    assert plain(again.config) == plain(reference.scheduler.config)
    assert depthdiff.inspect_checkpoint.inspect(tmp_path / "theirs").loads


@pytest.mark.parametrize(("name", "found"), [
    ("DPM++ 2M Karras", ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True})),
    ("dpmpp_2m_sde", ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})),
    ("Euler a", ("EulerAncestralDiscreteScheduler", {})), ("euler-ancestral", ("EulerAncestralDiscreteScheduler", {})),
    ("DPM++ SDE Exponential", ("DPMSolverSDEScheduler", {"use_exponential_sigmas": True})),
    ("LMS Karras", ("LMSDiscreteScheduler", {"use_karras_sigmas": True})),
    ("DPMSolverMultistepScheduler", ("DPMSolverMultistepScheduler", {})), ("UniPC", ("UniPCMultistepScheduler", {})),
    ("dpm_2_ancestral", ("KDPM2AncestralDiscreteScheduler", {})), ("PLMS", ("PNDMScheduler", {})),
])  # fmt: skip
def test_names(name, found):
    assert find_scheduler(name) == found


LCM_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def test_an_lcm_lora_in_four_steps(pair, small_photo, tmp_path, tiny_folder):
    """A random LoRA of the form of the published ones, LCM, four steps, low guidance. Observed: at most 1e-5."""
    ours, theirs = load_both(tiny_folder)
    generator, state = torch.Generator().manual_seed(0), {}
    for name, layer in theirs.unet.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(
            ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
        ):
            path = "lora_unet_" + name.replace(".", "_")
            state[f"{path}.lora_down.weight"] = torch.randn(4, layer.in_features, generator=generator) * 0.1
            state[f"{path}.lora_up.weight"] = torch.randn(layer.out_features, 4, generator=generator) * 0.1
            state[f"{path}.alpha"] = torch.tensor(4.0)
    save_file(state, tmp_path / "lcm_lora.safetensors")
    pictures, plain_pictures = [], []
    for pipe, package in ((ours, solvers), (theirs, diffusers)):
        pipe.scheduler = package.LCMScheduler.from_config(pipe.scheduler.config)
        plain_pictures.append(paint(pipe, small_photo, strength=1.0, guidance_scale=1.5))
        pipe.load_lora_weights(tmp_path / "lcm_lora.safetensors")
        pictures.append(paint(pipe, small_photo, strength=1.0, guidance_scale=1.5))
    assert abs(pictures[0] - pictures[1]).max() <= 2e-3
    assert abs(pictures[0] - plain_pictures[0]).max() > 1e-2
