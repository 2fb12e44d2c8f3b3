"""Hosts of a pipeline: inference mode, threads, executors, processes, pipelines that share networks, memory."""

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from random_checkpoint import build_pipeline

from depthdiff import (
    DDIMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
)
from tests.test_state import in_threads, lora

KINDS = (DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler)


def paint(pipe, photo, seed=0, scale=1.0, **how):
    """Return latents, painted in two steps."""
    how = {"num_inference_steps": 2, "strength": 1.0, "output_type": "latent", **how}
    generator = torch.Generator().manual_seed(seed)
    return pipe("two tigers", photo, generator=generator, cross_attention_kwargs={"scale": scale}, **how).images


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def little(photo):
    return photo.resize((64, 40))


# Inference mode


def train(pipe):
    """Take one step of gradient descent on UNet and text encoder."""
    ids = torch.tensor([[1, 2, 3]])
    for network in (pipe.unet, pipe.text_encoder):
        network.requires_grad_(True)
    with torch.inference_mode(False), torch.enable_grad():
        embeds = pipe.text_encoder(ids)[0]
        sample = torch.ones(1, pipe.unet.config.in_channels, 8, 8)
        pipe.unet(sample, torch.tensor(5), encoder_hidden_states=embeds, return_dict=False)[0].square().sum().backward()
    for network in (pipe.unet, pipe.text_encoder):
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        assert any(grad.abs().max() > 0 for grad in grads)
        torch.optim.SGD(network.parameters(), 1e-6).step()


LOADED = {
    "as files have it": {},
    "in memory of its own": {"low_cpu_mem_usage": False},
    "cast": {"torch_dtype": torch.float64},
}


@pytest.mark.parametrize("how", LOADED)
def test_loaded_and_called_in_inference_mode_then_outside_and_trained(tiny_folder, little, how):
    plain = silent(StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder, **LOADED[how]))
    expected = paint(plain, little)
    with torch.inference_mode():
        pipe = silent(StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder, **LOADED[how]))
        assert torch.equal(paint(pipe, little), expected)
    assert torch.equal(paint(pipe, little), expected)
    pipe.to(torch.float32)
    train(pipe)


def test_changed_in_inference_mode_then_called_outside_and_trained(tiny_folder, little):
    """Adapters, words, casting and moving; what comes back is the checkpoint's, bit for bit."""
    pipe = silent(StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder))
    twin = silent(StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder))
    before, tensors = paint(pipe, little), lora(pipe)
    twin.load_lora_weights(tensors)
    with torch.inference_mode():
        pipe.load_lora_weights(lora(pipe))
        assert torch.equal(paint(pipe, little, scale=0.5), paint(twin, little, scale=0.5))
        pipe.load_textual_inversion({"<cat>": torch.ones(2, pipe.text_encoder.config.hidden_size)})
    assert torch.equal(paint(pipe, little), paint(twin, little))
    train(pipe)
    pipe, others = silent(StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder)), lora(pipe)
    with torch.inference_mode():
        pipe.load_lora_weights(others)
        pipe.unload_lora_weights()
        pipe.to(torch.float64)
    pipe.to(torch.float32)
    assert torch.equal(paint(pipe, little), before)
    with torch.inference_mode():
        pipe.to(torch.bfloat16).to(torch.float32)
    train(pipe)


def test_networks_made_in_inference_mode_work_in_and_outside(little):
    with torch.inference_mode():
        pipe = silent(build_pipeline("tiny"))
        inside = paint(pipe, little)
    assert torch.equal(paint(pipe, little), inside)
    expected = silent(build_pipeline("tiny"))
    assert torch.equal(paint(expected, little), inside)
    for one in (pipe, expected):
        one.load_lora_weights(lora(one))
    assert torch.equal(paint(pipe, little), paint(expected, little))


def test_a_run_prepared_in_inference_mode_is_stepped_outside(pipe, little):
    expected = paint(pipe, little)
    with torch.inference_mode():
        run = pipe.prepare("two tigers", little, num_inference_steps=2, strength=1.0,
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
    for step in pipe.denoise(run):
        step.latents = step.latents + 0
    assert torch.equal(run.latents, expected)


# Threads, executors, processes


def mixed(count, seed=0):
    """Return settings of so many calls: scheduler, seed, scale, guidance."""
    rng = random.Random(seed)
    for number in range(count):
        how = {"guidance_scale": rng.choice([1.0, 3.0]), "num_inference_steps": rng.choice([1, 2, 3])}
        yield rng.choice(KINDS), {"seed": number, "scale": rng.choice([-1.0, 0.0, 0.5, 1.0]), **how}


@pytest.mark.parametrize("host", ["ThreadPoolExecutor", "asyncio.to_thread"])
def test_schedulers_and_scales_of_their_own_in_threads(pipe, little, host):
    """Pipelines that share networks: each call gives what it gives alone."""
    pipe.load_lora_weights(lora(pipe, strength=1.0))
    pipes = {kind: silent(type(pipe).from_pipe(pipe, scheduler=kind.from_config(pipe.scheduler.config)))
             for kind in KINDS}  # fmt: skip
    jobs = [partial(paint, pipes[kind], little, **how) for kind, how in mixed(24)]
    alone = [job() for job in jobs]

    async def to_threads():
        return await asyncio.gather(*(asyncio.to_thread(job) for job in jobs))

    if host == "asyncio.to_thread":
        together = asyncio.run(to_threads())
    else:
        with ThreadPoolExecutor(4) as pool:
            together = [future.result() for future in [pool.submit(job) for job in jobs]]
    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))
    assert len({one.sum().item() for one in alone}) > 20


def test_steps_of_one_run_are_taken_by_different_threads(pipe, little):
    """As an asynchronous program does that hands each step to an executor."""
    expected = paint(pipe, little, num_inference_steps=4)

    async def stepped():
        generator = torch.Generator().manual_seed(0)
        run = await asyncio.to_thread(pipe.prepare, "two tigers", little, num_inference_steps=4, strength=1.0,
                                      generator=generator)  # fmt: skip
        steps = pipe.denoise(run)
        while await asyncio.to_thread(next, steps, None):
            await asyncio.sleep(0)
        return run.latents

    async def both():
        return await asyncio.gather(stepped(), stepped())

    assert all(torch.equal(one, expected) for one in asyncio.run(both()))
    assert torch.is_grad_enabled()


def paint_in_child(pickled, photo, seed, scale):
    torch.set_num_threads(1)
    return paint(pickle.loads(pickled), photo, seed, scale).numpy()


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_pipeline_goes_to_processes(pipe, little, method):
    """Pickled, with its adapters; forked after a call with one thread."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipe.load_lora_weights(lora(pipe))
        expected = [paint(pipe, little, seed, scale).numpy() for seed, scale in ((0, 1.0), (1, 0.5), (2, 0.0))]
        pickled = pickle.dumps(pipe)
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
            jobs = [pool.submit(paint_in_child, pickled, little, *one) for one in ((0, 1.0), (1, 0.5), (2, 0.0))]
            made = [job.result(timeout=120) for job in jobs]
        assert all(np.array_equal(one, two) for one, two in zip(made, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


# Pipelines that share networks


def test_pipelines_that_share_networks_have_the_same_adapters(pipe, little):
    """Whichever loads, switches or unloads them, as in diffusers, whose adapters are layers of the networks."""
    twin = silent(build_pipeline("tiny"))
    plain, other = paint(pipe, little), silent(type(pipe).from_pipe(pipe))
    tensors = lora(pipe, strength=1.0)
    for one in (other, twin):
        one.load_lora_weights(tensors, "a")
    assert pipe.get_list_adapters() == other.get_list_adapters() == twin.get_list_adapters()
    for scale in (0.0, 0.5, 1.0):
        expected = paint(twin, little, scale=scale)
        assert torch.equal(paint(pipe, little, scale=scale), expected)
        assert torch.equal(paint(other, little, scale=scale), expected)
    pipe.set_adapters("a", 0.25)
    twin.set_adapters("a", 0.25)
    assert torch.equal(paint(other, little), paint(twin, little))
    third = silent(type(pipe).from_pipe(other))
    third.unload_lora_weights()
    assert not pipe.get_list_adapters()
    assert torch.equal(paint(pipe, little), plain)


def of_unet(adapter):
    return {key: tensor for key, tensor in adapter.items() if key.startswith("unet")}


def test_a_pipeline_that_gets_another_unet_leaves_the_others_their_adapters(pipe, little):
    pipe.load_lora_weights(of_unet(lora(pipe, strength=1.0)), "a")
    loaded, other = paint(pipe, little), silent(type(pipe).from_pipe(pipe))
    other.unet = UNet2DConditionModel.from_config(pipe.unet.config)
    other.load_lora_weights(of_unet(lora(pipe, 1)), "b")
    assert list(pipe._adapters.loras) == ["a"] and list(other._adapters.loras) == ["a", "b"]
    assert torch.equal(paint(pipe, little), loaded)
    pipe.delete_adapters("a")
    pipe.load_lora_weights(of_unet(lora(pipe, strength=1.0)), "a")
    assert torch.equal(paint(pipe, little), loaded)


@pytest.mark.parametrize("change", ["unload_lora_weights", "disable_lora", "load_lora_weights"])
def test_a_network_that_both_have_keeps_the_adapters_of_the_other(change, pipe, little):
    """A pipeline with a UNet of its own cannot take them out of the text encoder, nor add to it."""
    pipe.load_lora_weights(lora(pipe, strength=1.0), "a")
    loaded, other = paint(pipe, little), silent(type(pipe).from_pipe(pipe))
    other.unet = UNet2DConditionModel.from_config(pipe.unet.config)
    with pytest.raises(ValueError, match="text_encoder and its adapters are shared with another pipeline, unet is not"):
        getattr(other, change)(*([lora(pipe, 1), "b"] if change == "load_lora_weights" else []))
    assert torch.equal(paint(pipe, little), loaded)
    assert pipe.get_active_adapters() == ["a"]
    other.text_encoder = copy.deepcopy(pipe.text_encoder)
    other.load_lora_weights(lora(pipe, 1), "b")
    assert torch.equal(paint(pipe, little), loaded)


def test_offloading_is_on_for_both(pipe, little):
    expected = paint(pipe, little)
    pipe.enable_model_cpu_offload(device="cpu")
    other = silent(type(pipe).from_pipe(pipe))
    assert other.execution_device == pipe.execution_device
    assert torch.equal(paint(other, little), expected)
    with pytest.raises(ValueError, match="clashes with CPU offloading"):
        other.to("cuda")


def test_a_change_by_one_of_them_waits_for_the_calls_of_the_others(pipe, little):
    other, tensors = silent(type(pipe).from_pipe(pipe)), lora(pipe)
    steps = pipe.denoise(pipe.prepare("two tigers", little, num_inference_steps=2))
    next(steps)
    with pytest.raises(RuntimeError, match="another thread steps through a run"):
        in_threads([lambda: other.load_lora_weights(tensors)], 1)
    steps.close()
    in_threads([lambda: other.load_lora_weights(tensors)], 1)


# Memory


def resident():
    """Return the resident memory of this process in MiB, where Linux tells it."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if pages.exists() else 0.0


@pytest.mark.parametrize("count", [100, 1000])
def test_memory_is_flat(pipe, little, count):
    """Calls of all kinds, refused ones and runs that are given up among them, after a warm-up of 30."""
    pipe.load_lora_weights(lora(pipe, strength=1.0))
    pipes = {kind: silent(type(pipe).from_pipe(pipe, scheduler=kind.from_config(pipe.scheduler.config)))
             for kind in KINDS}  # fmt: skip
    rng = random.Random(0)

    def call(number, kind, how):
        photo = little.resize((8 * rng.randrange(4, 9), 8 * rng.randrange(4, 9)))
        match number % 10:
            case 3:
                run = pipes[kind].prepare("a toy", photo, num_inference_steps=3)
                next(iter(pipes[kind].denoise(run)))
            case 5:
                with pytest.raises(ValueError, match="strength"):
                    pipes[kind]("a toy", photo, strength=2)
            case 7:
                type(pipe).from_pipe(pipe, scheduler=kind.from_config(pipe.scheduler.config))(
                    "a toy", photo, None, 0.5, 2
                )
            case _:
                paint(pipes[kind], photo, **how)

    def live():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for number, (kind, how) in enumerate(mixed(30)):
        call(number, kind, how)
    tensors, before = live(), resident()
    for number, (kind, how) in enumerate(mixed(count, 1)):
        call(number, kind, how)
    assert live() == tensors
    assert resident() - before < 16  # observed: 0.6 after 100 calls, 0.2 after 1000
