"""Compiled networks and recorded steps, as far as a CPU can tell: what is traced, what is compared, what falls back."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from depthdiff.capture import CudaGraphs, StepGraph
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from depthdiff import PNDMScheduler
from depthdiff.models.attention import KeysValues
from tests.adapters import pairs, spell


class Rerun:
    """Stands in for CUDA graphs: keeps the work with its fixed tensors, and does it again."""

    def __init__(self):
        self.records, self.replays, self.fail = 0, 0, None

    def reason_against(self, device):
        return None

    def record(self, work, device):
        if self.fail:
            raise RuntimeError(self.fail)
        self.records += 1
        output = work()

        def replay():
            self.replays += 1
            output.copy_(work())

        return replay, output


@pytest.fixture
def rerun(monkeypatch):
    backend = Rerun()
    monkeypatch.setattr(StepGraph, "backend", backend)
    return backend


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def paint(pipe, image, prompt="two tigers", **arguments):
    arguments = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), **arguments}
    return pipe(prompt, image, output_type="np", **arguments).images


def lora(pipe, tmp_path, seed=0):
    """Write a LoRA for half of the UNet's attention and load it."""
    rows = list(pairs(attention(pipe), 3, seed=seed))
    pipe.load_lora_weights(spell("lora_A", rows), f"lora_{seed}")


def attention(pipe):
    for name, module in pipe.unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            yield "unet", name.replace("self_attn", "attn1").replace("cross_attn", "attn2"), module.weight


def step_inputs(unet, batch=2):
    return (
        torch.randn(batch, 5, 11, 15),
        unet.embed_time(torch.tensor([7.0]), unet.dtype),
        unet.read_context(torch.randn(batch, 77, 40)),
    )


# Tracing


@pytest.mark.parametrize("form", ["sdpa", "efficient"])
@torch.no_grad()
def test_bodies_are_traced_whole(pipe, form):
    """One graph each, whatever the form of attention; sliced and math were seen to be as well."""
    pipe.set_attention(form)
    bodies = {
        "unet": (pipe.unet.predict, step_inputs(pipe.unet)),
        "encode": (pipe.vae._encode, (torch.randn(1, 3, 88, 120),)),
        "decode": (pipe.vae._decode, (torch.randn(1, 4, 11, 15),)),
        "text": (pipe.text_encoder, (torch.randint(0, 50, (2, 77)),)),
    }
    for name, (body, inputs) in bodies.items():
        explained = torch._dynamo.explain(body)(*inputs)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), name


def test_a_step_looks_at_no_number(pipe):
    """Shapes alone decide what runs, so a recording of it is right for other numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        unet = copy.deepcopy(pipe.unet)
        for parameter in unet.parameters():
            parameter.data = mode.from_tensor(parameter.data)
        sample, time, context = step_inputs(unet)
        assert unet.predict(sample, time, context).shape == (2, 4, 11, 15)


# Compiling


def test_compiled_pictures_are_the_same(pipe, small_photo, tmp_path):
    expected = paint(pipe, small_photo)
    pipe.compile(backend="eager")
    assert np.array_equal(paint(pipe, small_photo), expected)
    pipe.uncompile()
    assert not {"predict", "_encode", "_decode", "forward"} & {*vars(pipe.unet), *vars(pipe.vae)}
    assert "forward" not in vars(pipe.text_encoder)
    assert np.array_equal(paint(pipe, small_photo), expected)


def test_adapters_and_casts_after_compiling(pipe, small_photo, tmp_path):
    """Weights are the compiled function's arguments, not its constants."""
    pipe.compile(backend="eager")
    plain = paint(pipe, small_photo)
    lora(pipe, tmp_path)
    compiled, half = paint(pipe, small_photo), paint(pipe, small_photo, cross_attention_kwargs={"scale": 0.5})
    pipe.unload_lora_weights()
    assert np.array_equal(paint(pipe, small_photo), plain)
    pipe.to(torch.float64)
    double = paint(pipe, small_photo)
    pipe.uncompile()
    assert np.array_equal(paint(pipe, small_photo), double)
    pipe.to(torch.float32)
    lora(pipe, tmp_path)
    assert np.array_equal(compiled, paint(pipe, small_photo))
    assert np.array_equal(half, paint(pipe, small_photo, cross_attention_kwargs={"scale": 0.5}))
    assert np.abs(compiled - plain).max() > 1e-3


@torch.no_grad()
def test_compiled_through_autograd_tracing(pipe):
    """`aot_eager` decomposes and functionalizes as the default back end does, and runs without generated code."""
    inputs = step_inputs(pipe.unet)
    expected = pipe.unet.predict(*inputs)
    pipe.compile(backend="aot_eager")
    torch.testing.assert_close(pipe.unet.predict(*inputs), expected, rtol=1e-5, atol=1e-6)


def test_what_is_saved_and_copied_knows_nothing_of_it(pipe, tmp_path):
    keys = {name: list(network.state_dict()) for name, network in pipe.networks.items()}
    pipe.compile(backend="eager")
    pipe.capture()
    assert {name: list(network.state_dict()) for name, network in pipe.networks.items()} == keys
    pipe.save_pretrained(tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved")
    for name, network in again.networks.items():
        assert all(
            torch.equal(a, b) for a, b in zip(network.parameters(), pipe.networks[name].parameters(), strict=True)
        )
    for twin in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        assert "predict" not in vars(twin)
    twin = copy.deepcopy(pipe)
    assert "predict" not in vars(twin.unet)
    twin._at_work("unet")
    assert twin.unet.predict.network is twin.unet


def test_hooked_networks_run_uncompiled(pipe, small_photo, caplog):
    expected = paint(pipe, small_photo)
    pipe.compile(backend="eager")
    pipe.enable_sequential_cpu_offload(device="cpu")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(paint(pipe, small_photo), expected)
    assert caplog.text.count("UNet2DConditionModel runs uncompiled: it has hooks") == 1
    pipe.remove_all_hooks()
    assert np.array_equal(paint(pipe, small_photo), expected)


# Recording


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}])
def test_recorded_pictures_are_the_same(pipe, small_photo, rerun, arguments):
    """PNDM keeps what the UNet returned over several steps: the next replay may not write into it."""
    assert isinstance(pipe.scheduler, PNDMScheduler)
    expected = paint(pipe, small_photo, num_inference_steps=8, **arguments)
    pipe.capture()
    for _ in range(2):
        assert np.array_equal(paint(pipe, small_photo, num_inference_steps=8, **arguments), expected)
    assert (rerun.records, rerun.replays) == (1, 2 * pipe.num_timesteps)
    pipe.release_capture()
    assert "predict" not in vars(pipe.unet)
    assert np.array_equal(paint(pipe, small_photo, num_inference_steps=8, **arguments), expected)


def test_what_changes_within_a_recording(pipe, small_photo, rerun):
    """Prompts, pictures, seeds and the guidance scale, also between steps; weights that are written in place."""

    def more_guidance(pipeline, index, timestep, tensors):
        pipeline._guidance_scale = 3.0 + index

    def everything():
        yield paint(pipe, small_photo, "a cup", guidance_scale=3.0)
        yield paint(pipe, small_photo.transpose(0), generator=torch.Generator().manual_seed(5))
        yield paint(pipe, small_photo, callback_on_step_end=more_guidance)
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(2)
        yield paint(pipe, small_photo)
        with torch.no_grad():
            pipe.unet.conv_out.weight.div_(2)

    expected = list(everything())
    pipe.capture()
    for got, wanted in zip(everything(), expected, strict=True):
        assert np.array_equal(got, wanted)
    assert rerun.records == 1


def test_what_is_recorded_anew(pipe, small_photo, rerun, tmp_path):
    """Every kind of input; and everything again where weights, forms of attention or modules are others."""
    pipe.capture(size=2)
    graph = pipe.unet.predict

    def counts(**arguments):
        before = rerun.records
        got = paint(pipe, small_photo, **arguments)
        graph.blocked, allowed = (lambda: "not now"), graph.blocked
        assert np.array_equal(got, paint(pipe, small_photo, **arguments))
        graph.blocked = allowed
        return rerun.records - before

    assert [counts(), counts()] == [1, 0]
    assert [counts(guidance_scale=1.0), counts(), counts(guidance_scale=1.0)] == [1, 0, 0]
    assert [counts(num_images_per_prompt=2), len(graph.recordings)] == [1, 2]
    assert [counts(guidance_scale=1.0), counts()] == [0, 1]  # the latest used ones were kept
    lora(pipe, tmp_path)
    assert [counts(), counts(), len(graph.recordings)] == [1, 0, 1]
    assert [counts(cross_attention_kwargs={"scale": 0.5}), counts()] == [0, 0], "a copy of the UNet goes unrecorded"
    pipe.unload_lora_weights()
    assert counts() == 1
    pipe.set_attention("math")
    assert [counts(), counts()] == [1, 0]
    pipe.unet.to(torch.float64)
    assert [counts(), counts()] == [1, 0]
    pipe.unet.conv_out = copy.deepcopy(pipe.unet.conv_out)
    assert [counts(), counts()] == [1, 0]


@pytest.mark.parametrize(
    "switch",
    [
        lambda: torch.backends.cudnn.flags(enabled=True, benchmark=True),
        lambda: torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        lambda: sdpa_kernel(SDPBackend.MATH),
    ],
    ids=["benchmark", "tf32", "kernel"],
)
def test_torchs_switches_are_recorded_with_the_step(pipe, small_photo, rerun, switch):
    """What chooses a kernel at the time of the recording could not choose another one later."""
    pipe.capture()
    expected = paint(pipe, small_photo)
    with switch():
        paint(pipe, small_photo)
    assert rerun.records == 2
    assert np.array_equal(paint(pipe, small_photo), expected)
    assert rerun.records == 3


def test_a_network_in_the_place_of_another(pipe, small_photo, rerun):
    pipe.capture()
    paint(pipe, small_photo)
    pipe.unet = copy.deepcopy(pipe.unet)
    paint(pipe, small_photo)
    assert (rerun.records, pipe.unet.predict.network) == (2, pipe.unet)


def test_a_method_of_the_users_own_comes_back(pipe, rerun):
    own = pipe.unet.predict = lambda *inputs: type(pipe.unet).predict(pipe.unet, *inputs)
    pipe.capture()
    pipe.capture(size=1)
    assert pipe.unet.predict.body is own
    pipe.release_capture()
    assert pipe.unet.predict is own
    assert copy.deepcopy(pipe.unet).predict is own


def test_compiled_and_recorded(pipe, small_photo, rerun):
    expected = paint(pipe, small_photo)
    pipe.capture()
    pipe.compile(backend="eager")
    assert np.array_equal(paint(pipe, small_photo), expected)
    assert pipe.unet.predict.body.compiled
    assert rerun.records == 1
    pipe.uncompile()
    assert np.array_equal(paint(pipe, small_photo), expected)
    assert rerun.records == 2


@torch.no_grad()
def test_recorded_in_inference_mode(pipe, rerun):
    sample, time, context = step_inputs(pipe.unet)
    expected = pipe.unet.predict(sample, time, context)
    pipe.capture()
    with torch.inference_mode():
        inside = [KeysValues(*(x.clone() for x in pair)) for pair in context]
        assert torch.equal(pipe.unet.predict(sample.clone(), time.clone(), inside), expected)
    assert torch.equal(pipe.unet.predict(sample, time, context), expected)
    assert rerun.records == 1


def hook(pipe):
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "it has hooks"),
        (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), "offloading moves its weights"),
        (lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"), "it has hooks"),
        (lambda pipe: setattr(StepGraph.backend, "fail", "out of\nmemory"), "recording fails: out of memory"),
        (lambda pipe: setattr(StepGraph, "backend", CudaGraphs()), "it is on cpu, and only CUDA devices have graphs"),
    ],
    ids=["hook", "offload", "sequential", "failure", "cpu"],
)
def test_fall_back_is_said_once(pipe, small_photo, rerun, change, reason, caplog):
    expected = paint(pipe, small_photo)
    pipe.capture()
    change(pipe)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert np.array_equal(paint(pipe, small_photo), expected)
    assert caplog.text.count("the unet runs without a CUDA graph") == 1
    assert reason in caplog.text
    assert pipe.unet.predict.reason.startswith(reason)
    assert rerun.replays == 0


def test_the_compiler_may_record_instead(pipe):
    pipe.capture()
    assert pipe.unet.predict.blocked() is None
    pipe.compile("reduce-overhead", backend="eager")
    assert pipe.unet.predict.blocked() == "torch.compile records it itself in mode 'reduce-overhead'"


def test_gradients_autocast_and_more_arguments_fall_back(pipe, rerun):
    pipe.capture()
    graph, inputs = pipe.unet.predict, step_inputs(pipe.unet)
    assert graph(*inputs).requires_grad
    assert graph.reason == "gradients are on"
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            graph(*inputs)
        assert graph.reason == "autocast is on"
        with pytest.raises(TypeError, match="unexpected"):
            graph(*inputs, unexpected=1)
        assert graph.reason == "it has arguments that no recording knows"
        graph(*inputs)
    assert (graph.reason, rerun.replays) == (None, 1)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_size_that_is_none(pipe, size):
    with pytest.raises(ValueError, match="size must be a whole number from 1"):
        pipe.capture(size)
