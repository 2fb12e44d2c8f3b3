"""State changes by success alone, and a call's own settings concern that call: failures, interrupts, loops, threads."""

import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from random_checkpoint import build_pipeline

import depthdiff
from tests.adapters import pairs, spell

PACKAGE = str(Path(depthdiff.__file__).parent)
TURNS = str(Path(PACKAGE) / "turns.py")
PROMPTS = ["two tigers", "<cat> on a table"]


def lora(pipe, seed=0, strength=0.3):
    """Make a random adapter of some layers of both networks."""
    layers = []
    for component, ends in (("unet", ("attn1.to_q", "attn2.to_v")), ("text_encoder", ("fc1",))):
        from depthdiff.checkpoint.ldm import TABLES

        network = getattr(pipe, component)
        table = TABLES[type(network).__name__]
        for key, weight in network.named_parameters():
            name = table.published(key).removesuffix(".weight")
            if name.endswith(ends):
                layers.append((component, name, weight))
    return spell("lora_A", pairs(layers, 2, seed, strength))


def state(pipe):
    """Return everything that adapters and words may change, to compare."""
    weights = {
        f"{name}.{key}": tensor.clone()
        for name, network in pipe.networks.items()
        for key, tensor in network.state_dict().items()
    }
    words = [pipe.tokenizer(text).input_ids for text in PROMPTS]
    tables = pipe.text_encoder.get_input_embeddings().num_embeddings, pipe.text_encoder.config.vocab_size
    adapters = pipe.get_list_adapters(), pipe.get_active_adapters(), sorted(pipe.fused_loras)
    return weights, (len(pipe.tokenizer), pipe.tokenizer.learnt_words, words, tables, adapters)


def same(one, two):
    return one[1] == two[1] and all(torch.equal(tensor, two[0][key]) for key, tensor in one[0].items())


def picture(pipe, photo, scale=1.0, seed=1, prompt=PROMPTS[0]):
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 2, "strength": 1.0, "output_type": "np", "generator": generator}
    return pipe(prompt, photo, cross_attention_kwargs={"scale": scale}, **options).images


def word(pipe):
    return {"<cat>": torch.ones(2, pipe.text_encoder.config.hidden_size)}


OPERATIONS = {
    "load": lambda pipe, photo, place: pipe.load_lora_weights(lora(pipe, 2), "third"),
    "replace": lambda pipe, photo, place: pipe.load_lora_weights(lora(pipe, 2), "first", hotswap=True),
    "set": lambda pipe, photo, place: pipe.set_adapters(["first", "second"], [0.5, -0.5]),
    "disable": lambda pipe, photo, place: pipe.disable_lora(),
    "fuse": lambda pipe, photo, place: pipe.fuse_lora(lora_scale=0.5),
    "unfuse": lambda pipe, photo, place: pipe.unfuse_lora(),
    "delete": lambda pipe, photo, place: pipe.delete_adapters("second"),
    "unload": lambda pipe, photo, place: pipe.unload_lora_weights(),
    "learn": lambda pipe, photo, place: pipe.load_textual_inversion(word(pipe)),
    "forget": lambda pipe, photo, place: pipe.unload_textual_inversion("<dog>"),
    "call with a scale": lambda pipe, photo, place: picture(pipe, photo, 0.5),
    "save": lambda pipe, photo, place: pipe.save_pretrained(place / "saved"),
}


class Interrupter:
    """Within, the package is left by an exception at its line number `last`, or counts its lines."""

    def __init__(self, last, error):
        self.last, self.error, self.lines = last, error, 0

    def trace(self, frame, event, arg):
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) or file == TURNS:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.last:
                raise self.error
        return self.trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


def prepared():
    pipe = build_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora(pipe), "first")
    pipe.fuse_lora(["text_encoder"], 0.5)
    pipe.load_lora_weights(lora(pipe, 1), "second")
    pipe.load_textual_inversion({"<dog>": torch.zeros(3, pipe.text_encoder.config.hidden_size)})
    return pipe


@pytest.mark.parametrize("name", OPERATIONS)
def test_interrupted_at_any_line_nothing_has_changed(name, small_photo, tmp_path):
    """By Ctrl-C, a lack of memory or any error; and what did not fail has changed everything that it should."""
    operation = OPERATIONS[name]
    counter = Interrupter(0, None)
    pipe = prepared()
    before = state(pipe)
    with counter:
        operation(pipe, small_photo, tmp_path)
    assert same(state(pipe), before) == (name in ("call with a scale", "save"))
    rng, pipe = random.Random(0), prepared()
    ends = range(max(1, counter.lines - 40), counter.lines + 1, 3)  # where the exchange is
    for last in (*ends, *(rng.randrange(1, counter.lines + 1) for _ in range(12))):
        error = rng.choice([KeyboardInterrupt(), MemoryError("no memory"), RuntimeError("out of memory")])
        try:
            with Interrupter(last, error):
                operation(pipe, small_photo, tmp_path)
        except (type(error), depthdiff.CheckpointError):
            pass
        if not same(state(pipe), before):
            done = prepared()
            operation(done, small_photo, tmp_path)
            assert same(state(pipe), state(done)), f"neither before nor after: line {last} of {counter.lines}"
            pipe = prepared()


def test_a_failed_operation_does_not_change_the_next_picture(small_photo):
    """The kinds of failure that there are, each followed by a picture."""
    pipe = prepared()
    expected = picture(pipe, small_photo)
    for call, error in (
        (lambda: pipe.load_lora_weights({k: v * 1e30 for k, v in lora(pipe).items()}), ValueError),
        (lambda: pipe.load_lora_weights({**lora(pipe), "nonsense": torch.ones(1)}), depthdiff.CheckpointError),
        (lambda: pipe.set_adapters(["first", "none"]), ValueError),
        (lambda: pipe.set_adapters("first", 1e300), ValueError),
        (lambda: pipe.fuse_lora(adapter_names=["first", "none"]), ValueError),
        (lambda: pipe.delete_adapters(["first", "none"]), ValueError),
        (lambda: pipe.load_textual_inversion({"<dog>": torch.ones(1)}), depthdiff.CheckpointError),
        (lambda: pipe.unload_textual_inversion(["<dog>", "none"]), ValueError),
        (lambda: picture(pipe, small_photo, scale=float("nan")), ValueError),
        (lambda: picture(pipe, small_photo, scale=1e6, prompt=""), (ValueError, FloatingPointError)),
    ):
        before = state(pipe)
        with suppress(error):
            call()
        assert same(state(pipe), before)
        assert np.array_equal(picture(pipe, small_photo), expected)


def test_runs_that_interleave_and_loops_that_are_left(small_photo):
    """Two runs with scales of their own, stepped in turns, end where each ends alone; a `break` leaves nothing."""
    pipe = build_pipeline("tiny")
    pipe.load_lora_weights(lora(pipe), "a")
    plain = picture(pipe, small_photo)

    def run(scale):
        generator = torch.Generator().manual_seed(3)
        return pipe.prepare(
            PROMPTS[0], small_photo, num_inference_steps=4, generator=generator, cross_attention_kwargs={"scale": scale}
        )

    alone = []
    for scale in (0.5, 0.0, 1.0):
        prepared_run = run(scale)
        for _ in pipe.denoise(prepared_run):
            pass
        alone.append(prepared_run.latents)
    assert not torch.equal(alone[0], alone[1])
    runs = [run(scale) for scale in (0.5, 0.0, 1.0)]
    for steps in zip(*map(pipe.denoise, runs), strict=True):
        assert len(steps) == 3
        assert np.array_equal(picture(pipe, small_photo), plain)
    assert all(torch.equal(one.latents, expected) for one, expected in zip(runs, alone, strict=True))
    held = pipe.denoise(run(0.5))
    next(held)
    assert np.array_equal(picture(pipe, small_photo), plain), "while a run with another scale is under way"
    for _ in pipe.denoise(run(0.5)):
        break
    assert np.array_equal(picture(pipe, small_photo), plain)


def in_threads(calls, workers=8):
    with ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("count", [48, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_threads_with_scales_of_their_own_beside_loading_and_unloading(small_photo, count):
    """Every picture is, to the bit, the one of its scale with or without the adapter; the weights come back."""
    pipe = build_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    before = state(pipe)
    scales, photo = (0.0, 0.5, 1.0, -0.7), small_photo.resize((64, 40))
    expected = {(None, s): picture(pipe, photo, s) for s in scales}
    adapters = {name: lora(pipe, seed) for seed, name in enumerate("ab")}
    for name, tensors in adapters.items():
        pipe.load_lora_weights(tensors, name)
        expected |= {(name, s): picture(pipe, photo, s) for s in scales}
        pipe.unload_lora_weights()
    assert same(state(pipe), before)
    seen, rng = set(), random.Random(0)

    def call(scale):
        made = picture(pipe, photo, scale)
        found = [name for name in (None, "a", "b") if np.array_equal(made, expected[name, scale])]
        assert found, f"no picture of scale {scale}"
        seen.update(found)

    def change(name):
        pipe.load_lora_weights(adapters[name], name, hotswap=True)

    jobs = [partial(call, rng.choice(scales)) for _ in range(count)]
    for place in range(5, count, 8):
        jobs[place] = rng.choice([lambda: change("a"), lambda: change("b"), pipe.unload_lora_weights, pipe.disable_lora,
                                  pipe.enable_lora])  # fmt: skip
    in_threads(jobs)
    pipe.unload_lora_weights()
    assert same(state(pipe), before)
    assert len(seen) > 1


def test_threads_without_adapters_get_the_same_bits(pipe, small_photo):
    """Prompts, seeds, steps and guidance differ from thread to thread; so do sizes."""
    photos = [small_photo, small_photo.resize((64, 40))]

    def make(i):
        generator = torch.Generator().manual_seed(i)
        options = {"num_inference_steps": 2 + i % 3, "guidance_scale": (1.0, 5.0)[i % 2], "strength": 1.0}
        return pipe(f"prompt {i % 5}", photos[i % 2], generator=generator, output_type="np", **options).images

    alone = [make(i) for i in range(12)]
    together = in_threads([lambda i=i: make(i % 12) for i in range(48)])
    for i, made in enumerate(together):
        assert np.array_equal(made, alone[i % 12]), i


def test_a_change_waits_for_calls_and_is_refused_while_a_run_is_stepped_elsewhere(pipe, small_photo):
    """By name, in place of waiting for ever; within one thread a callback may change adapters for the next step."""
    tensors = lora(pipe)
    steps = pipe.denoise(pipe.prepare(PROMPTS[0], small_photo, num_inference_steps=3))
    next(steps)
    with pytest.raises(RuntimeError, match=r"load_lora_weights changes weights that calls of other threads use.*steps"):
        in_threads([lambda: pipe.load_lora_weights(tensors)], 1)
    assert not pipe.get_list_adapters()
    steps.close()
    in_threads([lambda: pipe.load_lora_weights(tensors, "a")], 1)
    assert pipe.get_active_adapters() == ["a"]
    plain, index = picture(pipe, small_photo), []

    def switch(pipe, i, timestep, tensors):
        index.append(i)
        pipe.disable_lora()
        return {}

    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 2, "strength": 1.0, "output_type": "np", "generator": generator}
    changed = pipe(PROMPTS[0], small_photo, callback_on_step_end=switch, **options).images
    assert index
    assert not np.array_equal(changed, plain)


def test_a_callback_sees_and_sets_the_guidance_of_its_own_call(pipe, small_photo):
    """Whatever calls of other threads have."""
    barrier = threading.Barrier(2, timeout=60)

    def make(scale):
        def look(pipe, i, timestep, tensors):
            barrier.wait()
            seen.append((scale, pipe.guidance_scale, pipe.num_timesteps))
            barrier.wait()
            return {}

        seen = []
        options = {"num_inference_steps": 3, "strength": 1.0, "output_type": "np"}
        generator = torch.Generator().manual_seed(1)
        made = pipe(PROMPTS[0], small_photo, guidance_scale=scale, generator=generator, callback_on_step_end=look,
                    **options).images  # fmt: skip
        assert all(own == found for own, found, _ in seen)
        return made

    together = in_threads([lambda: make(3.0), lambda: make(7.0)], 2)
    barrier = threading.Barrier(1)
    for made, scale in zip(together, (3.0, 7.0), strict=True):
        assert np.array_equal(made, make(scale))


@pytest.mark.parametrize("how", ["model offloading", "sequential offloading", "layerwise casting"])
def test_calls_take_turns_where_layers_move_their_weights(small_photo, how):
    """Also one that begins while another denoises; a change waits for both. A twin tells what each gives alone."""
    pipes = [build_pipeline("tiny") for _ in range(2)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        if how == "layerwise casting":
            pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
        else:
            switch = "enable_model_cpu_offload" if how[0] == "m" else "enable_sequential_cpu_offload"
            getattr(pipe, switch)(device="cpu")
    pipe, photo = pipes[0], small_photo.resize((64, 40))
    alone = [picture(pipes[1], photo, seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        others = []

        def begin(pipe, i, timestep, tensors):
            others.append(pool.submit(picture, pipe, photo, 1.0, 1))
            return {}

        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "strength": 1.0, "output_type": "np", "generator": generator}
        made = pipe(PROMPTS[0], photo, callback_on_step_end=begin, **options).images
        assert np.array_equal(made, alone[0])
        assert len(others) >= 2
        assert all(np.array_equal(other.result(), alone[1]) for other in others)
    for seed, made in enumerate(in_threads([partial(picture, pipe, photo, 1.0, seed) for seed in range(6)], 3)):
        assert np.array_equal(made, alone[seed])
    if how != "layerwise casting":
        jobs = [
            partial(picture, pipe, photo),
            lambda: pipe.load_lora_weights(lora(pipe), "a"),
            partial(picture, pipe, photo),
        ]
        in_threads(jobs, 3)
        assert pipe.get_active_adapters() == ["a"]


def test_a_run_that_a_callback_keeps_is_refused_to_others_and_not_waited_for(pipe, small_photo):
    kept = []

    def keep(pipe, i, timestep, tensors):
        if not kept:
            kept.append(pipe.denoise(pipe.prepare(PROMPTS[0], small_photo, num_inference_steps=3)))
            next(kept[0])
        return {}

    options = {"num_inference_steps": 2, "strength": 1.0, "callback_on_step_end": keep}
    pipe(PROMPTS[0], small_photo, **options)
    with pytest.raises(RuntimeError, match="another thread steps through a run"):
        in_threads([lambda: pipe.load_lora_weights(lora(pipe))], 1)
    kept[0].close()
    in_threads([lambda: pipe.load_lora_weights(lora(pipe))], 1)


def test_a_call_within_a_callback_leaves_the_outer_one_as_it_is(pipe, small_photo):
    """Whose guidance it would otherwise have switched off."""
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 3, "strength": 1.0, "output_type": "np", "generator": generator}
    expected = pipe(PROMPTS[0], small_photo, guidance_scale=5.0, **options).images

    def call(pipe, i, timestep, tensors):
        pipe(PROMPTS[1], small_photo, guidance_scale=1.0, num_inference_steps=1, strength=1.0)
        assert (pipe.guidance_scale, pipe.num_timesteps) == (5.0, expected_steps)
        return {}

    expected_steps = pipe.num_timesteps
    generator.manual_seed(1)
    made = pipe(PROMPTS[0], small_photo, guidance_scale=5.0, callback_on_step_end=call, **options).images
    assert np.array_equal(made, expected)


def test_a_network_put_in_the_place_of_another_has_no_adapters(small_photo, tmp_path):
    """Whatever the scale of a call; and it is saved as it is."""
    pipe = build_pipeline("tiny")
    pipe.load_lora_weights(lora(pipe), "a")
    pipe.fuse_lora(["unet"])
    pipe.unet = build_pipeline("tiny", 100).unet
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    pipe.text_encoder = build_pipeline("tiny").text_encoder
    assert np.array_equal(picture(pipe, small_photo, 0.5), picture(pipe, small_photo))
    pipe.save_pretrained(tmp_path)
    saved = depthdiff.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet").state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in saved.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have(pipe, small_photo):
    """A run of another thread is under way when the process is forked."""
    tensors, begun, end = lora(pipe), threading.Event(), threading.Event()

    def hold():
        for _ in pipe.denoise(pipe.prepare(PROMPTS[0], small_photo, num_inference_steps=3)):
            begun.set()
            end.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(60)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        pipe.load_lora_weights(tensors)
        os._exit(0)
    end.set()
    holder.join()
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    if status[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status[0] and os.waitstatus_to_exitcode(status[1]) == 0
