"""torch.compile from outside: what is traced, what falls back, and that pictures stay the same."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from depthdiff import fast
from depthdiff.fast.calls import FastCall, find
from tests.adapters import pairs, spell


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def pipe(smallest):
    return smallest


@pytest.fixture
def graphs():
    """A back end of torch.compile that runs what it gets, and the list of that."""
    seen = []
    return seen, lambda graph, inputs: seen.append(graph) or graph


def paint(pipe, image, prompt="two tigers", **options):
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), **options}
    return pipe(prompt, image, output_type="np", **options).images


def lora(pipe):
    """Load a LoRA for part of the UNet's attention."""
    layers = [
        ("unet", name, module.weight) for name, module in pipe.unet.named_modules() if name.endswith(("to_q", "to_v"))
    ]
    pipe.load_lora_weights(spell("lora_A", list(pairs(layers, 3))), "lora")


def inputs_of(unet, rows=2):
    return torch.randn(rows, 5, 11, 15), torch.tensor(7), torch.randn(rows, 77, unet.config.cross_attention_dim)


@pytest.mark.parametrize("called", [False, True], ids=["forward", "call"])
@torch.no_grad()
def test_a_network_is_traced_whole_and_plainly(pipe, called):
    """One graph with the fast computations on: they are not seen, even where hooks have the module's call traced."""
    inputs = torch.randn(1, 5, 12, 16).repeat(2, 1, 1, 1), torch.tensor(7), torch.randn(2, 77, 40)
    if called:
        for module in (pipe.unet, pipe.unet.down_blocks[0].resnets[0].conv1):
            module.register_forward_hook(lambda *_: None)
    traced = torch._dynamo.explain(pipe.unet)(*inputs)
    assert (traced.graph_count, traced.graph_break_count) == (1, 0)
    assert not any("equal" in str(node.target) for node in traced.graphs[0].graph.nodes)


def test_compiled_pictures_are_the_same(pipe, tiny_photo, graphs):
    """Each network is compiled at its first call, and as before afterwards. Observed: at most 2e-6."""
    seen, backend = graphs
    expected = paint(pipe, tiny_photo)
    fast.compile(pipe, backend=backend)
    np.testing.assert_allclose(paint(pipe, tiny_photo), expected, rtol=0, atol=2e-5)
    assert len(seen) == 4
    np.testing.assert_allclose(paint(pipe, tiny_photo), expected, rtol=0, atol=2e-5)
    assert len(seen) == 4
    fast.uncompile(pipe)
    assert np.array_equal(paint(pipe, tiny_photo), expected)
    assert len(seen) == 4


def test_modules_stay_what_they_are(pipe, tmp_path):
    """State dicts, files and copies know nothing of it; the fast computations stay where they were."""
    before = [dict(vars(module)) for module in pipe.unet.modules()]
    keys = list(pipe.unet.state_dict())
    fast.compile(pipe, backend="eager"), fast.compile(pipe, backend="eager")
    assert list(pipe.unet.state_dict()) == keys
    pipe.save_pretrained(tmp_path / "saved")
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert isinstance(twin.unet._compiled_call_impl, FastCall)
    fast.disable(pipe)
    assert find(pipe.unet, FastCall) is None and pipe.unet._compiled_call_impl is not None
    fast.uncompile(pipe)
    assert "_compiled_call_impl" not in vars(pipe.unet)
    fast.compile(pipe, backend="eager")
    fast.enable(pipe)
    fast.uncompile(pipe)
    after = [dict(vars(module)) for module in pipe.unet.modules()]
    assert [set(one) for one in after] == [set(one) for one in before]
    assert all(isinstance(one.get("_compiled_call_impl"), (FastCall, type(None))) for one in after)


def test_adapters_and_casts_after_compiling(pipe, tiny_photo):
    """Weights are the compiled function's arguments, not its constants. Observed: at most 2e-6."""
    plain, close = paint(pipe, tiny_photo), {"rtol": 0, "atol": 2e-5}
    fast.compile(pipe.unet, backend="eager")
    lora(pipe)
    compiled, half = (paint(pipe, tiny_photo, cross_attention_kwargs={"scale": s}) for s in (1.0, 0.5))
    pipe.unload_lora_weights()
    np.testing.assert_allclose(paint(pipe, tiny_photo), plain, **close)
    pipe.to(torch.float64)
    double = paint(pipe, tiny_photo)
    fast.uncompile(pipe.unet)
    np.testing.assert_allclose(paint(pipe, tiny_photo), double, **close)
    pipe.to(torch.float32)
    lora(pipe)
    np.testing.assert_allclose(paint(pipe, tiny_photo), compiled, **close)
    np.testing.assert_allclose(paint(pipe, tiny_photo, cross_attention_kwargs={"scale": 0.5}), half, **close)
    assert np.abs(compiled - plain).max() > 1e-3


@torch.no_grad()
def test_compiled_through_autograd_tracing(pipe):
    """`aot_eager` decomposes and functionalizes as the default back end does, and generates no code. Observed: 1e-6."""
    inputs = inputs_of(pipe.unet)
    expected = pipe.unet(*inputs).sample
    fast.compile(pipe.unet, backend="aot_eager")
    torch.testing.assert_close(pipe.unet(*inputs).sample, expected, rtol=1e-5, atol=1e-5)
    assert pipe.vae.decoder._compiled_call_impl is None or isinstance(pipe.vae.decoder._compiled_call_impl, FastCall)


def test_gradients_of_a_compiled_network(pipe):
    sample, timestep, context = inputs_of(pipe.unet)
    gradients = []
    for switch in (lambda: fast.compile(pipe.unet, backend="eager"), lambda: fast.uncompile(pipe.unet)):
        switch()
        sample = sample.detach().requires_grad_()
        pipe.unet(sample, timestep, context).sample.square().sum().backward()
        gradients.append(sample.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)  # observed: 2e-6


def test_hooked_networks_run_uncompiled(pipe, tiny_photo, caplog):
    """As they did before, and the log says so once for each network."""
    expected = paint(pipe, tiny_photo)
    fast.compile(pipe.unet, backend="eager")
    pipe.enable_sequential_cpu_offload(device="cpu")
    with caplog.at_level(logging.WARNING):
        paint(pipe, tiny_photo)
        np.testing.assert_allclose(paint(pipe, tiny_photo), expected, rtol=0, atol=2e-5)
    assert caplog.text.count("UNet2DConditionModel runs uncompiled: it has hooks, or another forward") == 1
    pipe.remove_all_hooks()
    np.testing.assert_allclose(paint(pipe, tiny_photo), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_another_forward_is_called(pipe, caplog):
    """One that is put in the place of a network's after it was compiled."""
    fast.compile(pipe.unet, backend="eager")
    pipe.unet.forward = lambda *inputs, **options: "mine"
    assert pipe.unet(*inputs_of(pipe.unet)) == "mine"
    assert "runs uncompiled" in caplog.text
    del pipe.unet.forward
    assert pipe.unet(*inputs_of(pipe.unet)).sample.shape == (2, 4, 11, 15)


@torch.no_grad()
def test_results_whose_memory_is_reused_are_copied(pipe, monkeypatch):
    """In the modes in which torch's compiler captures CUDA graphs itself, also within records."""
    ids, kept = torch.randint(0, 50, (1, 7)), []
    fast.compile(pipe.text_encoder, "reduce-overhead", backend="eager")
    call = pipe.text_encoder._compiled_call_impl
    compiled = call.compiled
    call.compiled = lambda *args, **kwargs: kept.append(compiled(*args, **kwargs)) or kept[-1]
    result = pipe.text_encoder(ids, output_hidden_states=True)
    for mine, theirs in ((result.last_hidden_state, kept[0].last_hidden_state), (result[2][1], kept[0][2][1])):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_networks_of_others_and_wrong_arguments(pipe, graphs):
    seen, backend = graphs
    pipe.vae.encoder.compile(backend=backend)
    own, pipe.text_encoder = pipe.vae.encoder._compiled_call_impl, Text(pipe.text_encoder)
    fast.compile(pipe, backend=backend)
    assert pipe.vae.encoder._compiled_call_impl is own
    pipe.text_encoder(torch.randint(0, 50, (1, 77)))
    assert len(seen) == 1
    for options, error in (({"mode": "fast"}, ValueError), ({"fullgraph": 1}, TypeError), ({"dynamic": 2}, TypeError)):
        with pytest.raises(error, match=next(iter(options))):
            fast.compile(pipe, **options)
    with pytest.raises(TypeError, match="target must be a pipeline"):
        fast.compile("pipe")


class Text(nn.Module):
    """Stands for another package's text encoder."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)
