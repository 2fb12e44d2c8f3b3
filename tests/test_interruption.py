"""Stopping a run from outside."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch

STEPS = 8


def paint(pipe, photo, callback=None, **options):
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": STEPS, "strength": 1.0, "output_type": "np", "generator": generator, **options}
    return pipe("a cup", photo, callback_on_step_end=callback, **call).images


@pytest.mark.parametrize("way", ["method", "attribute"])
def test_a_callback_stops_its_call(way, pipe, small_photo):
    """The picture is that of the latents so far, and the next call is whole."""
    seen = []

    def stop(pipe, index, timestep, tensors):
        seen.append(tensors["latents"].clone())
        if index == 2:
            if way == "method":
                pipe.interrupt()
            else:
                pipe._interrupt = True

    found = paint(pipe, small_photo, stop)
    assert len(seen) == 3 and pipe._interrupt
    assert np.array_equal(found, pipe.decode(seen[-1], "np"))
    whole = paint(pipe, small_photo)
    assert not pipe._interrupt and not np.array_equal(found, whole)


def test_another_thread_stops_it(pipe, small_photo):
    reached, stopped, seen = threading.Event(), threading.Event(), []

    def wait(pipe, index, timestep, tensors):
        seen.append(index)
        if index == 1:
            reached.set()
            assert stopped.wait(30)

    work = threading.Thread(target=paint, args=(pipe, small_photo, wait))
    work.start()
    assert reached.wait(60)
    pipe.interrupt()
    stopped.set()
    work.join(60)
    assert seen == [0, 1]


def test_a_callback_stops_no_other_thread(pipe, small_photo):
    """The attribute, as diffusers' callbacks set it, is for the call whose callback assigns it."""
    counts, gate = {}, threading.Barrier(2, timeout=60)

    def work(name):
        def callback(pipe, index, timestep, tensors):
            counts[name] = index + 1
            if index == 1:
                gate.wait()
                if name == "first":
                    pipe._interrupt = True
                gate.wait()

        paint(pipe, small_photo, callback)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert counts == {"first": 2, "second": STEPS + 1}  # PNDM calls twice for its first step


def test_a_call_within_a_callback_is_stopped_alone(pipe, small_photo):
    inner, outer = [], []

    def stop(pipe, index, timestep, tensors):
        inner.append(index)
        pipe._interrupt = True

    def nest(pipe, index, timestep, tensors):
        outer.append(index)
        if index == 0:
            paint(pipe, small_photo, stop)

    flags = []
    paint(pipe, small_photo, lambda *args: (nest(*args), flags.append(pipe._interrupt))[0])
    assert inner == [0] and len(outer) == STEPS + 1
    assert not any(flags), "the outer call is not interrupted"


def test_a_loop_of_one_s_own_ends(pipe, small_photo):
    """And begins anew from where it is."""
    run = pipe.prepare("a cup", small_photo, num_inference_steps=STEPS, generator=torch.Generator())
    taken = 0
    for step in pipe.denoise(run):
        taken += 1
        if step.index == 1:
            pipe.interrupt()
    assert taken == 2
    assert len(list(pipe.denoise(run))) == len(run)


def test_no_second_pass_after_it(pipe, small_photo):
    found = paint(pipe, small_photo, lambda pipe, *rest: pipe.interrupt(), hires=2)
    assert found.shape == (1, 88, 120, 3)


def test_nothing_under_way(pipe, small_photo):
    """What comes before a call does not stop it."""
    before = paint(pipe, small_photo)
    pipe.interrupt()
    pipe._interrupt = True
    assert np.array_equal(paint(pipe, small_photo), before)


def test_copies(pipe):
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        other.interrupt()
        assert not other._interrupt
