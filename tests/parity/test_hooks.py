"""What hooks see: the order of calls, their arguments and values, in every module, against the references."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from tests.parity.geometries import call, distance, draw, pair, paths, text_inputs, unet_inputs

TOLERANCE = 1e-4  # relative L2; observed: at most 3e-6


def describe(value):
    """Return a value's form: what a replaced forward relies on, without the numbers."""
    if isinstance(value, Tensor):
        return (*value.shape, str(value.dtype))
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, torch.Size):
        return repr(value)
    if isinstance(value, tuple | list):
        return [type(value).__name__, *map(describe, value)]
    return repr(value)


def tensors(value) -> list[Tensor]:
    """Return the tensors of a value, in order."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = value.values()
    return [tensor for item in value for tensor in tensors(item)] if hasattr(value, "__iter__") else []


def record(network: nn.Module, run) -> list[tuple[str, str, object, list[Tensor]]]:
    """Run with hooks before and after every module: (when, path, form of the arguments or result, tensors)."""
    events, handles = [], []
    for path, module in paths(network).items():

        def before(module, args, kwargs, path=path):
            events.append(("before", path, [describe(args), describe(kwargs)], tensors(args) + tensors(kwargs)))

        def after(module, args, kwargs, output, path=path):
            events.append(("after", path, describe(output), tensors(output)))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    with torch.no_grad():
        run(network)
    for handle in handles:
        handle.remove()
    return events


def compare(ours: nn.Module, reference: nn.Module, run, values_only: bool = False) -> list:
    """Compare what hooks see in both networks; return our events."""
    mine, theirs = record(ours, run), record(reference, run)
    assert [event[:2] for event in mine] == [event[:2] for event in theirs]
    for event, expected in zip(mine, theirs, strict=True):
        if values_only and event[0] == "before":
            continue
        assert values_only or event[2] == expected[2], event[:2]
        pairs = list(zip(event[3], expected[3], strict=not values_only))
        for tensor, value in pairs:
            if tensor.is_floating_point():
                assert distance(tensor, value) < TOLERANCE, event[:2]
            else:
                assert torch.equal(tensor, value), event[:2]
    return mine


SIZES = [("sd2", 20, 12), ("short", 16, 8), ("short", 13, 7), ("sd1", 16, 8), ("sd1", 13, 7), ("uneven", 20, 12)]


@pytest.mark.parametrize("name, height, width", [*SIZES, ("plain middle", 20, 12), ("no middle", 13, 7)])
def test_unet(name, height, width):
    """Sizes that the levels halve, and sizes for which `upsample_size` is passed on."""
    inputs = unet_inputs(name, height=height, width=width)
    events = compare(*pair("unet", name), lambda unet: unet(**inputs))
    counts = Counter(path for when, path, *_ in events if when == "before")
    for path, module in paths(pair("unet", name)[0]).items():
        if not isinstance(module, nn.ModuleList):
            assert counts[path] == (3 if path.endswith("nonlinearity") else 1), path


@pytest.mark.parametrize(
    "extra",
    [
        {"encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])},
        {"timestep": 5},
        {"timestep": torch.tensor(5)},
        {"cross_attention_kwargs": {}},
        {"return_dict": False},
    ],
    ids=str,
)
def test_unet_arguments(extra):
    inputs = {**unet_inputs("short", height=14, width=10), **extra}
    compare(*pair("unet", "short"), lambda unet: unet(**inputs))


def test_unet_under_guidance():
    """Twice the rows of one latent: every module still sees all rows, in one call."""
    half = unet_inputs("short", height=14, width=10)
    inputs = {
        "sample": torch.cat([half["sample"]] * 2),
        "timestep": 7,
        "encoder_hidden_states": torch.cat([half["encoder_hidden_states"], draw(2, 7, 20, seed=9)]),
    }
    events = compare(*pair("unet", "short"), lambda unet: unet(**inputs))
    for when, path, _, found in events:
        assert all(len(tensor) == 4 for tensor in found), (when, path)


@pytest.mark.parametrize("kind, name", [("unet", "short"), ("unet", "sd1"), ("vae", "sd")])
def test_layout(kind, name):
    """What is contiguous in the reference is so here: others' code calls `view` on it, and dropout draws by place."""
    ours, reference = pair(kind, name)
    wrong, layouts = [], []
    for network in (ours, reference):
        layouts.append(found := {})
        for path, module in paths(network).items():

            def after(module, args, output, path=path, found=found):
                values = output if isinstance(output, tuple) else (output,)
                found[path] = [value.is_contiguous() for value in values if isinstance(value, Tensor)]

            module.register_forward_hook(after)
        with torch.no_grad():
            call(kind, name, network)
    for path, expected in layouts[1].items():
        if any(theirs and not mine for mine, theirs in zip(layouts[0][path], expected, strict=True)):
            wrong.append(path)
    assert not wrong


def test_hooks_change_nothing():
    """The result is bit-equal with hooks on every module."""
    for kind, name in (("unet", "short"), ("vae", "sd"), ("text", "sd2")):
        network = pair(kind, name)[0]
        with torch.no_grad():
            plain = call(kind, name, network)
            hooked = []
            record(network, lambda network, kind=kind, name=name, found=hooked: found.append(call(kind, name, network)))
        assert all(torch.equal(plain[key], hooked[0][key]) for key in plain)


def test_hooks_replace():
    """What a hook returns counts, before a module and after it, in both sides alike."""
    inputs = unet_inputs("short", height=14, width=10)
    places = ["down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "up_blocks.1"]
    places += ["time_embedding", "down_blocks.1.attentions.0", "up_blocks.2.attentions.1.transformer_blocks.0"]
    ours, reference = pair("unet", "short")
    with torch.no_grad():
        plain = ours(**inputs).sample
        for path in places:
            results = []
            for unet in (ours, reference):
                module = unet.get_submodule(path)
                handles = [
                    module.register_forward_pre_hook(lambda _, args, kw: (tuple(scaled(args)), kw), with_kwargs=True),
                    module.register_forward_hook(lambda _, args, out: scaled(out)),
                ]
                results.append(unet(**inputs).sample)
                for handle in handles:
                    handle.remove()
            assert distance(*results) < TOLERANCE, path
            assert distance(results[0], plain) > 1e-3, path
        assert torch.equal(ours(**inputs).sample, plain)


def scaled(value):
    if isinstance(value, tuple):
        return tuple(scaled(item) for item in value)
    return value * 0.5 if isinstance(value, Tensor) else value


VAE_CALLS = {
    "encode": lambda vae: vae.encode(draw(2, 3, 24, 16)),
    "encode, odd size": lambda vae: vae.encode(draw(2, 3, 27, 21)),
    "decode": lambda vae: vae.decode(draw(2, 4, 6, 4)),
    "decode, bare result": lambda vae: vae.decode(draw(2, 4, 5, 3), return_dict=False),
    "forward": lambda vae: vae(draw(1, 3, 16, 24)),
}


@pytest.mark.parametrize("case", VAE_CALLS)
@pytest.mark.parametrize("name", ["sd", "bare"])
def test_vae(name, case):
    compare(*pair("vae", name), VAE_CALLS[case])


@pytest.mark.parametrize("switch", ["enable_slicing", "enable_tiling"])
@pytest.mark.parametrize("case", ["encode", "decode"])
def test_vae_in_parts(switch, case):
    """Slices and tiles: one call of every module for each part."""
    networks = pair("vae", "sd")
    for vae in networks:
        getattr(vae, switch)()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 4
    compare(*networks, VAE_CALLS[case])


@pytest.mark.parametrize("name", ["sd2", "sd1"])
def test_text(name):
    """The modules' order and values; how the layers are called is transformers 4's form here, and has no reference."""
    events = compare(*pair("text", name), lambda text: text(text_inputs()), values_only=True)
    forms = {path: form for when, path, form, _ in events if when == "before"}
    ids = (3, 17, "torch.int64")
    assert forms["embeddings"][1]["input_ids"] == ids
    assert set(forms["embeddings"][1]) == {"input_ids", "position_ids"}
    assert forms["encoder"][1]["inputs_embeds"] == (3, 17, 24, "torch.float32")
    attention = forms["encoder.layers.0.self_attn"]
    assert attention[0] == ["tuple"]
    assert attention[1]["hidden_states"] == (3, 17, 24, "torch.float32")
    assert "attention_mask" in attention[1]
    assert forms["encoder.layers.1"][0][1] == (3, 17, 24, "torch.float32")


def test_text_attention_results():
    """`self_attn` returns the states and the weights or None."""
    text = pair("text", "sd2")[0]
    events = record(text, lambda text: text(text_inputs()))
    results = [form for when, path, form, _ in events if when == "after" and path.endswith("self_attn")]
    assert results == [["tuple", (3, 17, 24, "torch.float32"), "None"]] * 3


def test_text_root():
    """`text_model` is called once a call, inside the model."""
    text, found = pair("text", "sd2")[0], []
    text.register_forward_pre_hook(lambda *_: found.append("model"))
    text.text_model.register_forward_pre_hook(lambda *_: found.append("text_model"))
    text(text_inputs())
    assert found == ["model", "text_model"]
