"""The UNet as a CUDA graph, as far as a CPU can tell: what is compared before a replay, and what falls back.

`Rerun` stands for the device: it does the work again in place of replaying it. `test_gpu.py` has the real thing.
"""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from depthdiff import PNDMScheduler, fast
from depthdiff.fast import cuda_graphs
from depthdiff.fast.calls import find
from depthdiff.fast.cuda_graphs import CUDAGraphRunner
from depthdiff.models.attention import AttnProcessor2_0


class Rerun:
    """Stands for CUDA graphs: keeps the work with its fixed tensors, and does it again."""

    def __init__(self):
        self.records, self.replays, self.fail = 0, 0, None

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
    device = Rerun()
    monkeypatch.setattr(cuda_graphs, "record", device.record)
    monkeypatch.setattr(cuda_graphs, "DEVICES", ("cpu",))
    return device


@pytest.fixture
def pipe(smallest):
    fast.disable(smallest)
    return smallest


def paint(pipe, image, prompt="two tigers", **options):
    options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), **options}
    return pipe(prompt, image, output_type="np", **options).images


def inputs_of(unet, rows=2):
    return torch.randn(rows, 5, 11, 15), torch.tensor(7), torch.randn(rows, 77, unet.config.cross_attention_dim)


def runner_of(unet):
    return find(unet, CUDAGraphRunner)


@torch.no_grad()
def test_the_unet_looks_at_no_number(pipe):
    """Shapes alone decide what runs, so a graph of it is right for other numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        unet = copy.deepcopy(pipe.unet)
        for parameter in unet.parameters():
            parameter.data = mode.from_tensor(parameter.data)
        assert unet(*inputs_of(unet)).sample.shape == (2, 4, 11, 15)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}])
def test_captured_pictures_are_the_same(pipe, tiny_photo, rerun, options):
    """PNDM keeps what the UNet returned over several steps: the next replay may not write into it."""
    assert isinstance(pipe.scheduler, PNDMScheduler)
    expected = paint(pipe, tiny_photo, num_inference_steps=8, **options)
    fast.capture(pipe)
    for _ in range(2):
        assert np.array_equal(paint(pipe, tiny_photo, num_inference_steps=8, **options), expected)
    assert (rerun.records, rerun.replays) == (1, 2 * pipe.num_timesteps)
    fast.release(pipe)
    assert "_compiled_call_impl" not in vars(pipe.unet)
    assert np.array_equal(paint(pipe, tiny_photo, num_inference_steps=8, **options), expected)


def test_what_may_change_within_a_graph(pipe, tiny_photo, rerun):
    """Prompts, pictures, seeds and the guidance scale, also between steps; weights that are written in place."""

    def more_guidance(pipeline, index, timestep, tensors):
        pipeline._guidance_scale = 3.0 + index
        return {}

    def everything():
        yield paint(pipe, tiny_photo, "a cup", guidance_scale=3.0)
        yield paint(pipe, tiny_photo, generator=torch.Generator().manual_seed(5))
        yield paint(pipe, tiny_photo, callback_on_step_end=more_guidance)
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(2)
        yield paint(pipe, tiny_photo)
        with torch.no_grad():
            pipe.unet.conv_out.weight.div_(2)

    expected = list(everything())
    fast.capture(pipe)
    for got, wanted in zip(everything(), expected, strict=True):
        assert np.array_equal(got, wanted)
    assert rerun.records == 1


@torch.no_grad()
def test_kinds_of_input_have_a_graph_each(pipe, rerun):
    """The latest used ones are kept. A timestep may be a number."""
    unet = pipe.unet
    fast.capture(unet, max_graphs=2)

    def counts(rows, timestep=None):
        sample, number, context = inputs_of(unet, rows)
        before, timestep = rerun.records, number if timestep is None else timestep
        got = unet(sample, timestep, encoder_hidden_states=context, cross_attention_kwargs=None, return_dict=False)[0]
        assert torch.equal(got, unet._call_impl(sample, timestep, context, return_dict=False)[0])
        return rerun.records - before

    assert [counts(2), counts(2, 9), counts(1), counts(2), counts(1)] == [1, 0, 1, 0, 0]
    assert [counts(4), len(runner_of(unet).graphs), counts(1), counts(2)] == [1, 2, 0, 1]


def replace_layer(unet):
    unet.conv_out = copy.deepcopy(unet.conv_out)


def change_setting(unet):
    unet.conv_norm_out.eps = 0.1


def swap_processor(unet):
    unet.set_attention("math")


def adapt(unet):
    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


@pytest.mark.parametrize("change", [replace_layer, change_setting, swap_processor, adapt, lambda unet: unet.double()])
@torch.no_grad()
def test_what_a_graph_takes_for_granted_is_captured_again(change, pipe, rerun):
    unet, inputs = pipe.unet, inputs_of(pipe.unet)

    def check():
        sample, timestep, context = (x.to(unet.dtype) if x.is_floating_point() else x for x in inputs)
        got = unet(sample, timestep, context, return_dict=False)[0]
        assert torch.equal(got, unet._call_impl(sample, timestep, context, return_dict=False)[0])
        return rerun.records

    fast.capture(unet)
    assert [check(), check()] == [1, 1]
    change(unet)
    assert [check(), check()] == [2, 2]
    if change is adapt:
        unet.set_adapters("default", 0.5)
        assert [check(), check()] == [3, 3]
        unet.disable_adapters()
        assert [check(), check()] == [4, 4]


@pytest.mark.parametrize(
    "switch",
    [lambda: torch.backends.cudnn.flags(enabled=True, benchmark=True), lambda: sdpa_kernel(SDPBackend.MATH)],
    ids=["benchmark", "kernel"],
)
@torch.no_grad()
def test_torchs_switches_are_captured_with_the_step(switch, pipe, rerun):
    """What chose a kernel at the time of the capture could not choose another one later."""
    fast.capture(pipe)
    inputs = inputs_of(pipe.unet)
    pipe.unet(*inputs, return_dict=False)
    with switch():
        pipe.unet(*inputs, return_dict=False)
    assert rerun.records == 2
    pipe.unet(*inputs, return_dict=False)
    assert rerun.records == 3


def test_compiled_and_captured(pipe, tiny_photo, rerun):
    """In any order; what is under a graph is captured again when it changes. Observed: at most 1e-6."""
    expected = paint(pipe, tiny_photo)
    fast.capture(pipe)
    fast.compile(pipe.unet, backend="eager")
    assert runner_of(pipe.unet) is pipe.unet._compiled_call_impl
    np.testing.assert_allclose(paint(pipe, tiny_photo), expected, rtol=0, atol=2e-5)
    assert rerun.records == 1
    fast.uncompile(pipe.unet)
    assert np.array_equal(paint(pipe, tiny_photo), expected)
    assert rerun.records == 2
    fast.compile(pipe.unet, "reduce-overhead", backend="eager")
    with torch.no_grad():
        pipe.unet(*inputs_of(pipe.unet), return_dict=False)
    assert runner_of(pipe.unet).reason == "torch.compile captures it itself in mode 'reduce-overhead'"


@torch.no_grad()
def test_captured_in_inference_mode(pipe, rerun):
    inputs = inputs_of(pipe.unet)
    expected = pipe.unet(*inputs, return_dict=False)[0]
    fast.capture(pipe)
    with torch.inference_mode():
        assert torch.equal(pipe.unet(*(x.clone() for x in inputs), return_dict=False)[0], expected)
    assert torch.equal(pipe.unet(*inputs, return_dict=False)[0], expected)
    assert rerun.records == 1


def test_copies_and_other_unets_have_none(pipe, rerun):
    fast.capture(pipe)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert runner_of(twin.unet) is None
    unet, pipe.unet = pipe.unet, copy.deepcopy(pipe.unet)
    assert runner_of(unet) and runner_of(pipe.unet) is None


class Own(AttnProcessor2_0):
    """A processor of the user's own."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda pipe: pipe.unet.conv_in.register_forward_hook(lambda *_: None), "it has hooks or another forward"),
        (
            lambda pipe: setattr(pipe.unet.conv_in, "forward", pipe.unet.conv_in.forward),
            "it has hooks or another forward",
        ),
        (lambda pipe: pipe.unet.set_attn_processor(Own()), "it has attention processors of another kind"),
        (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), "offloading moves its weights"),
        (lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"), "it has hooks"),
        (lambda pipe: setattr(cuda_graphs.record.__self__, "fail", "out of\nmemory"), "capturing fails: out of memory"),
        (lambda pipe: setattr(cuda_graphs, "DEVICES", ("cuda",)), "it is on cpu, and only CUDA devices have graphs"),
    ],
    ids=["hook", "forward", "processor", "offload", "sequential", "failure", "cpu"],
)
def test_fall_back_is_said_once(pipe, tiny_photo, rerun, change, reason, caplog):
    expected = paint(pipe, tiny_photo)
    fast.capture(pipe)
    change(pipe)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_allclose(paint(pipe, tiny_photo), expected, rtol=0, atol=1e-6)
    assert caplog.text.count("the unet runs without a CUDA graph") == 1
    assert reason in caplog.text
    assert runner_of(pipe.unet).reason.startswith(reason)
    assert rerun.replays == 0


def test_gradients_autocast_and_more_arguments_fall_back(pipe, rerun):
    fast.capture(pipe)
    unet, inputs = pipe.unet, inputs_of(pipe.unet)
    runner = runner_of(unet)
    assert unet(*inputs, return_dict=False)[0].requires_grad
    assert runner.reason == "gradients are on"
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            unet(*inputs, return_dict=False)
        assert runner.reason == "autocast is on"
        for options in ({"return_dict": True}, {"return_dict": False, "encoder_attention_mask": torch.ones(2, 77)}):
            unet(*inputs, **options)
            assert runner.reason == "arguments are given that no graph takes"
        with pytest.raises(TypeError, match="unexpected"):
            unet(*inputs, unexpected=1)
        unet(*inputs, return_dict=False)
    assert (runner.reason, rerun.replays) == (None, 1)


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_number_of_graphs_that_is_none(pipe, count, error):
    with pytest.raises(error, match="max_graphs"):
        fast.capture(pipe, count)
    with pytest.raises(TypeError, match="pipe must be a pipeline with a UNet, or the UNet itself, got int"):
        fast.capture(3)
