"""diffusers' stateful contract, name by name: attributes, signatures, outputs, assigned attributes, files."""

import copy
import inspect
import json
import pickle

import diffusers
import numpy as np
import pytest
import torch

import depthdiff.schedulers as ours

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES = {
    "DDIM": ("DDIMScheduler", {**BASE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "PNDM": ("PNDMScheduler", {**BASE, "skip_prk_steps": True, "steps_offset": 1}),
    "PNDM, Runge-Kutta": ("PNDMScheduler", BASE),
    "LMS": ("LMSDiscreteScheduler", BASE),
    "LMS, Karras": ("LMSDiscreteScheduler", {**BASE, "use_karras_sigmas": True}),
}
NAMES = ["DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler"]
ABSENT = {
    *("push_to_hub", "_upload_folder"),  # nothing is uploaded
    *("_auto_class", "register_for_auto_class"),  # no code is loaded from the Hub
    *("extract_init_dict", "_get_init_keys", "_dict_from_json_file", "_deprecated_kwargs"),  # diffusers' own loading
    "_convert_to_beta",  # use_beta_sigmas is refused
}
"""Names of diffusers' classes that ours do without."""


def pair(case):
    name, settings = CASES[case]
    return getattr(ours, name)(**settings), getattr(diffusers, name)(**settings)


def draw(seed=0, dtype=torch.float32):
    return torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(mine, reference, name=""):
    """Compare values of attributes, of lists and arrays too. Observed: 0, or 4e-6 of 15 for sums in another order."""
    assert type(mine) is type(reference), name
    if isinstance(reference, torch.Tensor):
        assert mine.dtype == reference.dtype, name
        torch.testing.assert_close(mine, reference, rtol=2e-6, atol=2e-6, msg=lambda text: f"{name}: {text}")
    elif isinstance(reference, np.ndarray):
        assert np.array_equal(mine, reference), name
    elif isinstance(reference, list) and reference and isinstance(reference[0], torch.Tensor):
        assert len(mine) == len(reference), name
        for one, other in zip(mine, reference, strict=True):
            assert_same(one, other, name)
    else:
        assert mine == reference, name


def take(scheduler, timestep, sample, seed=1):
    scheduler.scale_model_input(sample, timestep)
    return scheduler.step(draw(seed), timestep, sample)


@pytest.mark.parametrize("case", CASES)
def test_attributes_are_those_of_diffusers(case):
    """Every attribute that diffusers' object has, fresh, after `set_timesteps`, and after each of the first steps."""
    mine, reference = pair(case)

    def compare():
        for name in vars(reference).keys() - {"_internal_dict"}:
            assert_same(getattr(mine, name), getattr(reference, name), name)
        for name in ("order", "config_name", "has_compatibles", "_compatibles", "init_noise_sigma"):
            assert_same(getattr(mine, name), getattr(reference, name), name)
        for name in ("step_index", "begin_index", "final_alpha_cumprod", "set_begin_index", "get_velocity", "sigmas"):
            assert hasattr(mine, name) == hasattr(reference, name), name
            if hasattr(reference, name) and not callable(getattr(reference, name)):
                assert_same(getattr(mine, name), getattr(reference, name), name)

    compare()
    for scheduler in (mine, reference):
        scheduler.set_timesteps(7)
    compare()
    sample = draw()
    for i in range(len(reference.timesteps)):
        outputs = [take(s, s.timesteps[i], sample, i) for s in (mine, reference)]
        compare()
        for name in outputs[1]:
            assert_same(outputs[0][name], outputs[1][name], name)
        sample = outputs[1].prev_sample


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_class_exists(name):
    mine, reference = getattr(ours, name), getattr(diffusers, name)
    missing = {one for one in dir(reference) if not one.startswith("__") and not hasattr(mine, one)}
    assert missing <= ABSENT
    assert list(mine.ignore_for_config) == ([] if name == "DDIMScheduler" else ["fix_start"])


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_diffusers(name):
    """Names, order and defaults of the arguments; what ours take on top comes last."""
    mine, reference = getattr(ours, name), getattr(diffusers, name)

    def arguments(method):
        return [(one.name, one.default, one.kind) for one in inspect.signature(method).parameters.values()]

    for method in (
        "step",
        "step_prk",
        "step_plms",
        "add_noise",
        "get_velocity",
        "scale_model_input",
        "set_begin_index",
    ):
        if hasattr(reference, method):
            assert arguments(getattr(mine, method)) == arguments(getattr(reference, method)), method
    for method in (
        "_get_variance",
        "_threshold_sample",
        "_get_prev_sample",
        "index_for_timestep",
        "get_lms_coefficient",
    ):
        if hasattr(reference, method):
            assert arguments(getattr(mine, method)) == arguments(getattr(reference, method)), method
    constructor = arguments(mine.__init__)
    assert [one for one in constructor if one[0] != "fix_start"] == arguments(reference.__init__)
    assert constructor[len(arguments(reference.__init__)) :] == [
        one for one in constructor if one[0] == "fix_start" and one[2] is inspect.Parameter.KEYWORD_ONLY
    ]
    assert list(inspect.signature(mine.set_timesteps).parameters) == [
        "self",
        "num_inference_steps",
        "device",
        "timesteps",
    ]
    assert ("eta" in inspect.signature(mine.step).parameters) == (name == "DDIMScheduler")
    assert ("generator" in inspect.signature(mine.step).parameters) == (name == "DDIMScheduler")


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_dicts_of_the_published_classes(case):
    outputs, tuples = [], []
    for scheduler in pair(case):
        scheduler.set_timesteps(6)
        first, second = scheduler.timesteps[:2]
        outputs.append(take(scheduler, first, draw()))
        tuples.append(scheduler.step(draw(1), second, draw(), return_dict=False))
    mine, reference = outputs
    assert type(mine).__name__ == type(reference).__name__
    assert isinstance(mine, dict)
    assert (list(mine), len(mine)) == (list(reference), len(reference))
    assert len(mine.to_tuple()) == len(reference.to_tuple())
    assert mine[0] is mine.prev_sample is mine["prev_sample"]
    assert isinstance(tuples[0], tuple)
    assert len(tuples[0]) == len(tuples[1])
    for one, other in zip(*tuples, strict=True):
        assert_same(one, other)


def halve(scheduler):
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod / 2


def halve_and_start(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod / 2
    scheduler.set_timesteps(10)


def halve_in_place(scheduler):
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod *= 0.5


def count_by_hand(scheduler):
    scheduler.num_inference_steps = 20


def recount(scheduler):
    scheduler.set_timesteps(10)
    scheduler.num_inference_steps = 20


def end(value):
    def assign(scheduler):
        scheduler.set_timesteps(10)
        scheduler.final_alpha_cumprod = value

    return assign


def predict_v(scheduler):
    scheduler.set_timesteps(10)
    scheduler.register_to_config(prediction_type="v_prediction")


def shift_timesteps(scheduler):
    scheduler.set_timesteps(10)
    scheduler.timesteps = scheduler.timesteps + 7


def scale_sigmas(scheduler):
    scheduler.set_timesteps(10)
    scheduler.sigmas = scheduler.sigmas * 0.5


def count_calls(scheduler):
    scheduler.set_timesteps(10)
    scheduler.counter, scheduler.ets = 20, [draw(8), draw(9)]


def remember(scheduler):
    scheduler.set_timesteps(10)
    scheduler.derivatives = [draw(8)]
    scheduler.set_begin_index(2)


ASSIGNED = [
    *(("DDIM", assign) for assign in (halve, halve_in_place, count_by_hand, recount, predict_v, shift_timesteps)),
    *(("DDIM", end(value)) for value in (torch.tensor(1.0), torch.tensor(0.9999, dtype=torch.float64))),
    *(("PNDM", assign) for assign in (halve, recount, end(torch.tensor(0.5)), predict_v, shift_timesteps, count_calls)),
    *(("PNDM, Runge-Kutta", assign) for assign in (halve, recount, end(torch.tensor(0.5)), predict_v)),
    *(("LMS", assign) for assign in (halve_and_start, predict_v, scale_sigmas, remember, shift_timesteps)),
]


@pytest.mark.parametrize("case", range(len(ASSIGNED)))
def test_assigned_attributes_count_at_the_next_step(case):
    """Observed: 0 for DDIM, 4e-6 of 15 for the others. Without the assignment the steps differ."""
    name, assign = ASSIGNED[case]
    results = []
    for scheduler in pair(name):
        assign(scheduler)
        timesteps = scheduler.timesteps if scheduler.num_inference_steps == 10 else torch.tensor([500, 450, 0])
        steps = [timesteps[2]] if assign is remember else [*timesteps[:2], *timesteps[-1:]]
        sample, seen = draw(), []
        for i, timestep in enumerate(steps):
            sample = take(scheduler, timestep, sample, i + 1).prev_sample
            seen.append(sample)
        results.append(torch.stack(seen))
    torch.testing.assert_close(*results, rtol=2e-6, atol=2e-6)
    plain = pair(name)[0]
    plain.set_timesteps(10)
    sample, seen = draw(), []
    for i, timestep in enumerate(steps):
        sample = take(plain, timestep, sample, i + 1).prev_sample if assign is not shift_timesteps else sample
        seen.append(sample)
    assert (results[0] - torch.stack(seen)).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["DDIM", "PNDM"])
def test_steps_in_any_order(case):
    results = []
    for scheduler in pair(case):
        scheduler.set_timesteps(10)
        sample = draw()
        for i, timestep in enumerate([701, 101, 951, 33, 1]):
            sample = take(scheduler, timestep, sample, i).prev_sample
        results.append(sample)
    torch.testing.assert_close(*results, rtol=2e-6, atol=2e-6)


def test_lms_steps_without_a_start():
    """A fresh LMS scheduler is in a run of all training timesteps, as diffusers' is."""
    mine, reference = pair("LMS")
    one, other = (take(scheduler, 998.0, draw()).prev_sample for scheduler in (mine, reference))
    assert_same(one, other)
    assert mine.step_index == reference.step_index == 2
    noisy = pair("LMS")[0].add_noise(draw(), draw(1), torch.tensor(998.0))  # 0-d, which diffusers refuses
    torch.testing.assert_close(noisy, draw() + mine.sigmas[1] * draw(1), rtol=0, atol=0)


def test_variance_noise_takes_the_place_of_a_generator():
    for mine, reference in [pair("DDIM")]:
        for scheduler in (mine, reference):
            scheduler.set_timesteps(10)
        arguments = (draw(), 501, draw(1), 0.7)
        one, other = (s.step(*arguments, variance_noise=draw(2)).prev_sample for s in (mine, reference))
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        drawn = mine.step(*arguments, generator=torch.Generator().manual_seed(2)).prev_sample
        torch.testing.assert_close(one, drawn, rtol=0, atol=0)
        for scheduler in (mine, reference):
            with pytest.raises(ValueError, match="generator"):
                scheduler.step(*arguments, variance_noise=draw(2), generator=torch.Generator())


def test_inner_methods_of_ddim():
    name, settings = "DDIMScheduler", {**BASE, "thresholding": True, "sample_max_value": 1.5}
    mine, reference = getattr(ours, name)(**settings), getattr(diffusers, name)(**settings)
    for arguments in [(500, 450), (torch.tensor(999), torch.tensor(899)), (20, -30)]:
        assert_same(mine._get_variance(*arguments), reference._get_variance(*arguments))
    for dtype in (torch.float32, torch.float16):
        x = draw(dtype=dtype) * 3
        assert_same(mine._threshold_sample(x), reference._threshold_sample(x))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inner_methods_of_pndm(prediction_type):
    mine, reference = (m.PNDMScheduler(**BASE, prediction_type=prediction_type) for m in (ours, diffusers))
    for ends in [(500, 450), (torch.tensor(500), torch.tensor(450)), (20, -30)]:
        assert_same(mine._get_prev_sample(draw(), *ends, draw(1)), reference._get_prev_sample(draw(), *ends, draw(1)))
    for scheduler in (mine, reference):
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match=r"12|prk"):
            scheduler.step_plms(draw(), 900, draw())
    for i in range(12):
        timestep = reference.timesteps[i]
        one, other = (s.step_prk(draw(i), timestep, draw(), return_dict=False) for s in (mine, reference))
        assert_same(one[0], other[0])
    one, other = (s.step_plms(draw(20), reference.timesteps[12], draw()) for s in (mine, reference))
    assert_same(one.prev_sample, other.prev_sample)
    with pytest.raises(ValueError, match="step_prk must be called for 12 timesteps"):
        mine.step_prk(draw(), 500, draw())


@pytest.mark.parametrize("settings", [BASE, {**BASE, "use_karras_sigmas": True}])
def test_inner_methods_of_lms(settings):
    mine, reference = (m.LMSDiscreteScheduler(**settings) for m in (ours, diffusers))
    for scheduler in (mine, reference):
        scheduler.set_timesteps(9)
    for order, t, current in [(1, 0, 0), (2, 3, 1), (4, 5, 3), (4, 8, 0), (5, 6, 4)]:
        one, other = (s.get_lms_coefficient(order, t, current) for s in (mine, reference))
        assert one == pytest.approx(other, abs=1e-6)
    log_sigmas = np.log(((1 - reference.alphas_cumprod) / reference.alphas_cumprod).sqrt().numpy())
    sigmas = reference.sigmas[:-1].numpy()
    np.testing.assert_allclose(mine._convert_to_karras(sigmas), reference._convert_to_karras(sigmas), rtol=1e-12)
    ends = sigmas, 5
    np.testing.assert_allclose(mine._convert_to_exponential(*ends), reference._convert_to_exponential(*ends), rtol=1e-6)
    one, other = (np.array([s._sigma_to_t(x, log_sigmas) for x in sigmas]) for s in (mine, reference))
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-4)
    for i in (0, 3, 8):
        assert mine.index_for_timestep(mine.timesteps[i]) == reference.index_for_timestep(reference.timesteps[i]) == i
    twice = torch.tensor([5.0, 4.0, 4.0])
    assert mine.index_for_timestep(4.0, twice) == reference.index_for_timestep(4.0, twice) == 2
    for scheduler in (mine, reference):
        with pytest.raises(IndexError):
            scheduler.step(draw(), 123.0, draw())
        with pytest.raises(IndexError):
            scheduler.scale_model_input(draw(), 123.0)
        with pytest.raises(TypeError):
            scheduler.scale_model_input(draw())
        with pytest.warns(UserWarning, match="scale_model_input"):
            scheduler.step(draw(), scheduler.timesteps[0], draw())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_of_lms(order):
    """Observed: 2e-6."""
    results = []
    for scheduler in pair("LMS"):
        scheduler.set_timesteps(9)
        sample = draw()
        for i, timestep in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(draw(i), timestep, sample, order).prev_sample
        results.append(sample)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_begin_index_of_lms():
    """Noise for the step at which a loop begins, or is, whatever timesteps are given."""
    for scheduler in pair("LMS"):
        scheduler.set_timesteps(9)
        scheduler.set_begin_index(4)
        assert (scheduler.begin_index, scheduler.step_index) == (4, None)
        any_timestep = scheduler.timesteps[:1].repeat(2)
        noisy = scheduler.add_noise(draw(), draw(1), any_timestep)
        torch.testing.assert_close(noisy, draw() + scheduler.sigmas[4] * draw(1), rtol=0, atol=0)
        take(scheduler, scheduler.timesteps[4], noisy)
        assert (scheduler.begin_index, scheduler.step_index) == (4, 5)
        noisy = scheduler.add_noise(draw(), draw(1), any_timestep)
        torch.testing.assert_close(noisy, draw() + scheduler.sigmas[5] * draw(1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "steps"), [("DDIM", 20.0), ("PNDM", 20.0), ("LMS", torch.tensor(20)), ("LMS", 1500), ("LMS, Karras", 1500)]
)
def test_numbers_of_steps_that_diffusers_takes(case, steps):
    mine, reference = pair(case)
    for scheduler in (mine, reference):
        scheduler.set_timesteps(steps)
    assert_same(mine.timesteps, reference.timesteps, "timesteps")
    assert mine.num_inference_steps == reference.num_inference_steps


@pytest.mark.parametrize("case", ["DDIM", "PNDM", "LMS"])
def test_configs_of_the_contract(case, tmp_path, caplog):
    mine, reference = pair(case)
    own = {"_use_default_values", "_diffusers_version", "_name_or_path"}

    def plain(config):
        return {key: value for key, value in dict(config).items() if key not in own}

    assert plain(mine.config) == plain(reference.config)
    assert isinstance(mine.config, dict)
    assert set(mine.config["_use_default_values"]) == set(reference.config["_use_default_values"])
    assert json.loads(mine.to_json_string()).keys() == json.loads(reference.to_json_string()).keys()
    with pytest.warns(FutureWarning, match="beta_start"):
        assert mine.beta_start == reference.config.beta_start
    assert type(mine)(_foo=1).config["_foo"] == type(reference)(_foo=1).config["_foo"] == 1

    foreign = {**reference.config, "foo": 5}
    for kind in (type(mine), type(reference)):
        made, unused = kind.from_config(foreign, bar=2, return_unused_kwargs=True)
        assert (made.config.foo, unused["bar"]) == (5, 2)
        assert "bar" not in made.config
        made.save_config(tmp_path / kind.__module__)
        loaded = kind.from_pretrained(tmp_path / kind.__module__, prediction_type="v_prediction", torch_dtype=1)
        assert (loaded.config.foo, loaded.config.prediction_type) == (5, "v_prediction")
        assert loaded.config._class_name == kind.__name__
        _, unused = kind.from_pretrained(tmp_path / kind.__module__, return_unused_kwargs=True, baz=2)
        assert unused["baz"] == 2
        made.save_pretrained(tmp_path / "folder" / "scheduler")
        assert kind.from_pretrained(tmp_path / "folder", subfolder="scheduler").config.foo == 5
        with pytest.warns(FutureWarning, match="get_config_dict"):
            assert kind.get_config_dict(tmp_path / "folder" / "scheduler")["foo"] == 5
    assert plain(loaded.config) == plain(type(mine).from_config(loaded.config).config)
    text = (tmp_path / ours.__name__).parent / type(mine).__module__ / "scheduler_config.json"
    written = text.read_text()
    assert list(json.loads(written)) == sorted(json.loads(written))
    assert "fix_start" not in written


def test_compatibles_are_the_classes_that_exist_here():
    assert set(ours.DDIMScheduler().compatibles) == set(ours.PNDMScheduler._get_compatibles())
    for name in ours.FILES:
        theirs = {kind.__name__ for kind in getattr(diffusers, name)().compatibles} - {"EDMEulerScheduler"}
        assert {kind.__name__ for kind in getattr(ours, name)().compatibles} == theirs & set(ours.FILES), name
    with pytest.raises(AttributeError, match="FlowMatch"):
        _ = ours.FlowMatch


@pytest.mark.parametrize("case", CASES)
def test_copies_go_on_alike(case):
    """A scheduler in the middle of a run, copied or pickled, takes the same next step."""
    scheduler = pair(case)[0]
    scheduler.set_timesteps(8)
    sample = draw()
    for i in range(3):
        sample = take(scheduler, scheduler.timesteps[i], sample, i).prev_sample
    copies = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), scheduler]
    results = [take(one, one.timesteps[3], sample, 3).prev_sample for one in copies]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])
