"""Attention processors: the standard ones, one's own, dicts, slices and what reaches them, as in the references."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from depthdiff.models import attention
from tests.parity.geometries import call, distance, pair, unet_inputs

TOLERANCE = 1e-5  # relative L2 in float32; observed: at most 2e-6
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def shared():
    """One pair, for patches that are undone."""
    return pair("unet", "short")


@pytest.fixture
def unets(shared):
    """A fresh pair."""
    return copy.deepcopy(shared)


def run(unet: nn.Module, **kwargs):
    with torch.no_grad():
        return unet(**{**unet_inputs("short", height=14, width=10), **kwargs}).sample


class Plain:
    """A processor as public code writes them, with a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.seen = factor, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, factor=1.0):
        self.seen.append((tuple(hidden_states.shape), encoder_hidden_states is None, attention_mask is None, factor))
        rows, context = len(hidden_states), hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], rows)
        query, key, value = (
            attn.head_to_batch_dim(layer(x))
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        weights = attn.get_attention_scores(query, key, mask)
        states = attn.batch_to_head_dim(torch.bmm(weights, value))
        return attn.to_out[1](attn.to_out[0](states)) * self.factor * factor / attn.rescale_output_factor


class Learnt(nn.Module):
    """A processor with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return Plain()(attn, hidden_states, encoder_hidden_states, attention_mask) * self.gain


def function(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
    return Plain(0.7)(attn, hidden_states, encoder_hidden_states, attention_mask)


PROCESSORS = {
    "AttnProcessor": lambda side: standard(side, "AttnProcessor"),
    "AttnProcessor2_0": lambda side: standard(side, "AttnProcessor2_0"),
    "SlicedAttnProcessor": lambda side: standard(side, "SlicedAttnProcessor", 1),
    "own class": lambda side: Plain(0.7),
    "own function": lambda side: function,
    "own module": lambda side: Learnt(),
    "partial": lambda side: functools.partial(Plain(0.7)),
}


def standard(side: int, name: str, *args):
    import diffusers.models.attention_processor as reference

    return getattr((attention, reference)[side], name)(*args)


@pytest.mark.parametrize("mask", [None, torch.tensor([[1] * 7, [1] * 4 + [0] * 3])], ids=["all", "masked"])
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("place", ["all", "one", "attribute"])
def test_processor(shared, name, place, mask):
    """On all layers, on one by `set_processor`, on one by assignment."""
    results = []
    for side, unet in enumerate(shared):
        before = dict(unet.attn_processors)
        processor = PROCESSORS[name](side)
        layer = unet.get_submodule(BLOCK).attn2
        if place == "all":
            unet.set_attn_processor(processor)
        elif place == "one":
            layer.set_processor(processor)
        else:
            layer.processor = processor
        assert layer.processor is layer.get_processor() is processor
        results.append(run(unet, encoder_attention_mask=mask))
        assert [key for key in unet.state_dict() if "gain" in key] == (
            []
            if name != "own module"
            else [key + ".gain" for key in before if place == "all" or key.startswith(f"{BLOCK}.attn2")]
        )
        if isinstance(processor, nn.Module) and place == "attribute":
            layer.set_processor(before[f"{BLOCK}.attn2.processor"])
        unet.set_attn_processor(before)
        assert not [key for key in unet.state_dict() if "gain" in key]
    assert distance(*results) < TOLERANCE
    changed = distance(results[0], run(shared[0], encoder_attention_mask=mask))
    assert changed > 1e-4 if name.startswith(("own", "partial")) else changed < TOLERANCE


@pytest.mark.parametrize("kind, name", [("unet", "sd2"), ("unet", "uneven"), ("vae", "sd")])
def test_processor_names(kind, name):
    ours, reference = pair(kind, name)
    assert list(ours.attn_processors) == list(reference.attn_processors)
    kinds = [type(processor).__name__ for processor in ours.attn_processors.values()]
    assert kinds == ["AttnProcessor2_0"] * len(kinds)
    assert len({id(processor) for processor in ours.attn_processors.values()}) == len(kinds)
    for network in (ours, reference):
        network.set_default_attn_processor()
        assert {type(processor).__name__ for processor in network.attn_processors.values()} == {"AttnProcessor"}


@pytest.mark.parametrize("side", [0, 1], ids=["ours", "reference"])
def test_processor_dict(unets, side):
    """A dict gives each layer its own, is emptied, and is refused when a name is wrong or missing."""
    unet = unets[side]
    names = list(unet.attn_processors)
    given = {name: Plain(index) for index, name in enumerate(names)}
    kept = dict(given)
    unet.set_attn_processor(given)
    assert given == {}
    assert list(unet.attn_processors.items()) == list(kept.items())
    with pytest.raises(ValueError):
        unet.set_attn_processor(dict(list(kept.items())[:-1]))
    with pytest.raises(KeyError):
        unet.set_attn_processor({**dict(list(kept.items())[:-1]), "foo": Plain()})
    with pytest.raises(ValueError):
        unet.set_default_attn_processor()
    unet.set_attn_processor(standard(side, "AttnProcessor"))
    unet.set_default_attn_processor()


@pytest.mark.parametrize("size", ["auto", "max", 1, 2, None, [1] * 14, [2, 1] * 7], ids=str)
def test_slices(shared, size):
    sliced = []
    for unet in shared:
        unet.set_attention_slice(size)
        sliced.append([(type(p).__name__, getattr(p, "slice_size", 0)) for p in unet.attn_processors.values()])
    assert sliced[0] == sliced[1]
    results = [run(unet) for unet in shared]
    for unet in shared:
        unet.set_attention_slice(None)
    assert distance(*results) < TOLERANCE
    assert distance(results[0], run(shared[0])) < TOLERANCE


@pytest.mark.parametrize("size", [3, [3] * 14, [1] * 13], ids=str)
def test_refused_slices(shared, size):
    for unet in shared:
        with pytest.raises(ValueError):
            unet.set_attention_slice(size)


def test_switches_keep_processors(unets):
    """Switches leave a processor that somebody has set, also a subclass of ours; the reference replaces it."""
    unet = unets[0]
    layer = unet.get_submodule(BLOCK).attn2
    for own in (Plain(0.7), type("Logging", (attention.AttnProcessor2_0,), {})()):
        layer.set_processor(own)
        for switch in (
            lambda: unet.set_attention_slice("max"),
            lambda: unet.set_attention_slice(None),
            lambda: unet.set_attention("math"),
            lambda: layer.set_use_memory_efficient_attention_xformers(True),
        ):
            switch()
            assert layer.processor is own
        with pytest.raises(ValueError, match=f"discard a {type(own).__name__}"):
            unet.set_default_attn_processor()


@pytest.mark.parametrize("kwargs", [None, {}, {"factor": 0.5}, {"factor": 0.5, "foo": 1}, {"scale": 0.5}], ids=str)
def test_cross_attention_kwargs(unets, kwargs):
    """They reach the processor of every layer that names them; the caller's dict is left alone."""
    seen, results, given = [], [], copy.copy(kwargs)
    for unet in unets:
        processor = Plain()
        unet.set_attn_processor(processor)
        results.append(run(unet, cross_attention_kwargs=given))
        seen.append(processor.seen)
    assert given == kwargs
    assert distance(*results) < TOLERANCE
    assert seen[0] == seen[1]
    assert len(seen[0]) == 14
    assert {factor for *_, factor in seen[0]} == {(kwargs or {}).get("factor", 1.0)}


@pytest.mark.parametrize("method", ["__call__", "forward"])
def test_kwargs_reach_processors_that_are_modules(method, unets):
    """Whichever method they compute in: some define `__call__`, past the hooks of modules."""
    results = []
    for unet in unets if method == "__call__" else unets[:1]:  # today's reference passes none to a module's `forward`
        kind = type("Own", (nn.Module,), {method: lambda self, *args, **kwargs: None})

        def compute(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, factor=1.0):
            return Plain()(attn, hidden_states, encoder_hidden_states, attention_mask, factor=factor)

        setattr(kind, method, compute)
        unet.set_attn_processor(kind())
        results.append(run(unet, cross_attention_kwargs={"factor": 0.5}))
        assert distance(results[-1], run(unet)) > 10 * TOLERANCE
    assert distance(results[0], results[-1]) < TOLERANCE


def test_all_kwargs_reach_open_processors(unets):
    """A processor with `**kwargs` gets all of them; the reference of today gives it none."""
    seen = []

    def processor(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        seen.append(kwargs)
        return function(attn, hidden_states, encoder_hidden_states, attention_mask)

    unets[0].set_attn_processor(processor)
    run(unets[0], cross_attention_kwargs={"foo": 1})
    assert seen == [{"foo": 1}] * 14


def test_processor_of_the_autoencoder():
    """The autoencoder's attention calls its processor with the picture's form and `temb=None`."""
    results = []
    for side, vae in enumerate(pair("vae", "sd")):
        seen = []

        def processor(
            attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=0, side=side, seen=seen
        ):
            seen.append((tuple(hidden_states.shape), temb))
            return standard(side, "AttnProcessor")(attn, hidden_states) * 0.5

        for layer in (vae.encoder.mid_block.attentions[0], vae.decoder.mid_block.attentions[0]):
            layer.set_processor(type("Own", (), {"__call__": staticmethod(processor)})())
        results.append((call("vae", "sd", vae), seen))
    assert results[0][1] == results[1][1] == [((2, 32, 6, 4), None)] * 2
    for key, value in results[0][0].items():
        assert distance(value, results[1][0][key]) < TOLERANCE


def test_heads_by_hand(unets):
    """Code that reads `attn.heads` and replaces `attn.forward`."""

    results = [run(unets[0])]
    for unet in unets:
        for name, layer in unet.named_modules():
            if name.endswith("attn2"):
                layer.forward = functools.partial(Plain(0.8), layer)
        results.append(run(unet))
    assert distance(results[1], results[2]) < TOLERANCE
    assert distance(results[0], results[1]) > 1e-4
