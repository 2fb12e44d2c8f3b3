"""Random calls, most of them wrong: a result or a clear error, and a pipeline as before; nothing hangs or is NaN."""

import collections
import functools
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoint import build_pipeline

from depthdiff.convert import to_single_file
from tests.fuzz.cases import call_case, method_case, scheduler_case
from tests.fuzz.judge import judge

LONG = {"calls": 10_000, "methods": 1_300, "schedulers": 1_000}
SHARE = {"calls": 250, "methods": 120, "schedulers": 200}
LIMIT_S = 10.0


def fresh():
    """Build the tiny pipeline, with a LoRA loaded, and without a progress bar."""
    pipe = build_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def state(pipe):
    """Copy all of a pipeline that a refused call must leave alone."""
    weights = {
        f"{part}.{name}": tensor.clone()
        for part, network in pipe.networks.items()
        for name, tensor in network.state_dict().items()
    }
    return weights, facts(pipe)


def facts(pipe):
    forms = {type(processor).__name__ for processor in pipe.unet.attn_processors.values()}
    return (
        dict(pipe.scheduler.config),
        pipe.get_list_adapters(),
        pipe.get_active_adapters(),
        pipe.tokenizer.learnt_words,
        len(pipe.tokenizer),
        {name: (network.dtype, network.device, network.training) for name, network in pipe.networks.items()},
        [type(part).__name__ for part in pipe.components.values()],
        pipe.execution_device,
        dict(pipe._progress_bar_config),
        forms,
    )


def same(pipe, before, whole):
    """Return whether a pipeline is what it was, its weights too if `whole`."""
    weights, rest = before
    if facts(pipe) != rest:
        return False
    if not whole:
        return True
    now = {f"{part}.{name}": x for part, net in pipe.networks.items() for name, x in net.state_dict().items()}
    return now.keys() == weights.keys() and all(torch.equal(x, weights[name]) for name, x in now.items())


def tensors(result):
    """List the numbers in what a call returned."""
    if isinstance(result, (torch.Tensor, np.ndarray)):
        return [torch.as_tensor(np.asarray(result)) if isinstance(result, np.ndarray) else result]
    if isinstance(result, Image.Image):
        return [torch.from_numpy(np.array(result))]
    if hasattr(result, "images"):
        return tensors(result.images)
    return [one for item in result for one in tensors(item)] if isinstance(result, (list, tuple)) else []


def finite(result):
    return all(bool(x.isfinite().all()) for x in tensors(result) if x.is_floating_point())


class Count:
    """Counts outcomes, and keeps what is wrong."""

    def __init__(self, kind):
        self.kind, self.outcomes, self.wrong = kind, collections.Counter(), collections.defaultdict(list)

    def add(self, name, work):
        """Do the work; return whether it came to a result."""
        start, done = time.perf_counter(), False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = work()
        except Exception as error:
            fault = judge(error)
            self.outcomes["clear" if fault is None else "unclear"] += 1
        else:
            done, fault = True, None if finite(result) else "a result that is not finite"
            self.outcomes["result" if fault is None else "not finite"] += 1
        if time.perf_counter() - start > LIMIT_S:
            fault = f"{time.perf_counter() - start:.0f} s"
        if fault is not None:
            self.wrong[fault].append(name)
        return done

    def report(self):
        lines = [f"{self.kind}: {sum(self.outcomes.values())} cases, {dict(self.outcomes)}"]
        for fault, names in sorted(self.wrong.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(names):4d} {fault}; {'; '.join(names[:3])}")
        return "\n".join(lines)


def long(kind):
    return [pytest.param(SHARE[kind], id="share"), pytest.param(LONG[kind], id="whole", marks=pytest.mark.fuzz)]


@pytest.mark.parametrize("cases", long("calls"))
def test_random_calls_end_in_a_result_or_a_clear_error(cases):
    pipe, count = fresh(), Count("calls")
    before = state(pipe)
    for number in range(cases):
        name, call = call_case(number)
        count.add(name, functools.partial(call, pipe))
        if not same(pipe, before, number % 25 == 24):
            count.wrong["the pipeline is another"].append(name)
            pipe = fresh()
    print(count.report())
    assert not count.wrong, count.report()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pipeline, and the same in a single file beside it."""
    place = tmp_path_factory.mktemp("fuzz")
    build_pipeline("tiny").save_pretrained(place / "tiny")
    to_single_file(place / "tiny", place / "tiny.safetensors")
    return place / "tiny"


@pytest.mark.parametrize("cases", long("methods"))
def test_random_uses_of_other_methods_end_in_a_result_or_a_clear_error(cases, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipe, count = fresh(), Count("methods")
    before = state(pipe)
    for number in range(cases):
        name, call = method_case(number)
        done = count.add(name, functools.partial(call, pipe, folder))
        if not same(pipe, before, True):
            if not done and "fuse" not in name and "adapters" not in name and "step" not in name:
                count.wrong["the pipeline is another"].append(name)
            pipe = fresh()
            before = state(pipe)
    print(count.report())
    assert not count.wrong, count.report()


@pytest.mark.parametrize("cases", long("schedulers"))
def test_random_settings_and_steps_end_in_a_result_or_a_clear_error(cases):
    count = Count("schedulers")
    for number in range(cases):
        count.add(*scheduler_case(number))
    print(count.report())
    assert not count.wrong, count.report()
