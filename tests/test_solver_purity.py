"""Solvers without hidden state: runs side by side, stopped, copied and resumed give what they give alone."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.gaussian import SOLVERS, make, make_plan, names

SHAPE = (2, 4, 6, 10)
STEPS = 6


def network(latents, index):
    """Predict something that depends on the latents and on the call."""
    return torch.tanh(latents * 0.7 + index / 10)


def start(shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def seeded(seed=2):
    return torch.Generator().manual_seed(seed)


def twin(generator):
    """Return a generator that draws what another one will draw."""
    return torch.Generator().set_state(generator.get_state())


def go(plan, latents, generator, state=None, begin=0, end=None):
    """Run some calls of a plan; return latents and state."""
    state = plan.init_state() if begin == 0 else state
    for i in range(begin, len(plan) if end is None else end):
        latents, _, state = plan.step(network(plan.scale_model_input(latents, i), i), i, latents, state, generator)
    return latents, state


def alone(name, plan=None):
    return go(plan or make_plan(name, STEPS), start(), seeded())[0]


def test_threads_give_what_each_run_gives_alone():
    """Eight threads drive the same plans of all solvers, each in an order of its own. Observed: 0."""
    plans = {name: make_plan(name, STEPS) for name in SOLVERS}
    expected = {name: alone(name, plan) for name, plan in plans.items()}

    def work(shift):
        order = [*list(SOLVERS)[shift * 5 :], *list(SOLVERS)[: shift * 5]]
        return {name: alone(name, plans[name]) for name in order}

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, range(8)):
            assert [name for name in SOLVERS if not torch.equal(found[name], expected[name])] == []


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_copy_in_the_middle_goes_on_alike(name, copied):
    """Plan and state after any number of calls. Observed: 0."""
    plan, expected = make_plan(name, STEPS), alone(name)
    for cut in (0, 1, 2, 3, 4):
        generator = seeded()
        latents, state = go(plan, start(), generator, end=cut)
        other, generator_too = copied((plan, state)), twin(generator)
        for one, kept, draws in [(*other, generator_too), (plan, state, generator)]:
            assert torch.equal(go(one, latents, draws, kept, cut)[0] if cut else alone(name, one), expected)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_stopped_run_goes_on_with_another_plan(name):
    """(latents, state, index) and the generator are all there is. Observed: 0."""
    for cut in (1, 2, 5):
        generator = seeded()
        latents, state = go(make_plan(name, STEPS), start(), generator, end=cut)
        assert torch.equal(go(make_plan(name, STEPS), latents, generator, state, cut)[0], alone(name))


@pytest.mark.parametrize("name", SOLVERS)
def test_runs_of_one_plan_do_not_meet(name):
    """Two runs, a call of each in turn. Observed: 0."""
    plan, states, generators = make_plan(name, STEPS), [None, None], [seeded(), seeded(5)]
    latents = [start(), -start()]
    expected = [go(plan, one, twin(draws))[0] for one, draws in zip(latents, generators, strict=True)]
    for i in range(len(plan)):
        for k in (0, 1):
            latents[k], states[k] = go(plan, latents[k], generators[k], states[k], i, i + 1)
    for found, one in zip(latents, expected, strict=True):
        assert torch.equal(found, one)


def tensors_in(state):
    """Return the tensors of a state, nested or not."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [one for part in state for one in tensors_in(part)] if isinstance(state, tuple) else []


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_leave_their_arguments_alone(name):
    plan, latents, generator = make_plan(name, STEPS), start(), seeded()
    state = plan.init_state()
    for i in range(len(plan)):
        noise_pred = network(latents, i)
        given = [latents, noise_pred, *tensors_in(state)]
        before = [(one._version, one.clone()) for one in given]
        fields = tuple(state) if state is not None else None
        result = plan.step(noise_pred, i, latents, state, generator)
        assert all(one._version == version for one, (version, _) in zip(given, before, strict=True))
        assert all(torch.equal(one, value) for one, (_, value) in zip(given, before, strict=True))
        assert fields is None or all(one is other for one, other in zip(fields, state, strict=True))
        latents, _, state = result


def stateful(scheduler, latents, generator, begin=0, end=None):
    """Run some calls of diffusers' contract."""
    takes_noise = "generator" in scheduler.step.__annotations__
    for i, timestep in list(enumerate(scheduler.timesteps))[begin:end]:
        noise_pred = network(scheduler.scale_model_input(latents, timestep), i)
        more = {"generator": generator} if takes_noise else {}
        latents = scheduler.step(noise_pred, timestep, latents, return_dict=False, **more)[0]
    return latents


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_scheduler_copied_in_the_middle_goes_on_alike(name, copied):
    """diffusers' contract, copied after three calls, inside a two-call step and a group of three. Observed: 0."""
    scheduler, generator = make(name), seeded()
    scheduler.set_timesteps(STEPS)
    latents = stateful(scheduler, start(), generator, end=3)
    other, other_generator = copied(scheduler), twin(generator)
    ended = stateful(scheduler, latents, generator, 3)
    assert torch.equal(stateful(other, latents, other_generator, 3), ended)
    scheduler.set_timesteps(STEPS)
    assert torch.equal(stateful(scheduler, start(), seeded()), ended)


@pytest.mark.parametrize("name", names(noisy=True))
def test_pictures_of_a_batch_are_those_of_their_generators(name):
    """Picture i of a batch with a list of generators is that picture alone. Observed: 0."""
    plan, latents = make_plan(name, STEPS), start()
    together = go(plan, latents, [seeded(10), seeded(11)])[0]
    for i in (0, 1):
        assert torch.equal(go(plan, latents[i : i + 1], seeded(10 + i))[0], together[i : i + 1])
    assert not torch.equal(go(plan, latents, [seeded(10), seeded(12)])[0][1], together[1])
    scheduler = make(name, **({"noise_sampler_seed": None} if "SDE" in name and "Solver" in name else {}))
    scheduler.set_timesteps(STEPS)
    both = stateful(scheduler, latents, [seeded(10), seeded(11)])
    scheduler.set_timesteps(STEPS)
    assert torch.equal(stateful(scheduler, latents[1:], seeded(11)), both[1:])


@pytest.mark.parametrize("name", [name for name in names(noisy=False) if name != "SA, no noise"])
def test_solvers_without_noise_draw_none(name):
    """SA-Solver draws whatever tau is, as diffusers does."""
    generator = seeded()
    go(make_plan(name, STEPS), start(), generator)
    assert torch.equal(generator.get_state(), seeded().get_state())
