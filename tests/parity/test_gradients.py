"""Gradients of every weight, with and without checkpointing, against the references."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from torch import nn

from tests.parity.geometries import call, distance, draw, pair, plain, unet_inputs

TOLERANCE = 1e-5  # relative L2 of each weight's gradient; observed: at most 5.2e-6 (UNet), 0 (others)
FLOOR = 1e-3  # gradients below this share of the largest are compared on its scale: a bias of keys has none but noise
MAIN = [("unet", "short"), ("unet", "sd1"), ("vae", "sd"), ("text", "sd2")]
UNET_FLAGS = "CrossAttnDownBlock2D DownBlock2D UNetMidBlock2DCrossAttn UpBlock2D CrossAttnUpBlock2D Transformer2DModel"
FLAGS = {
    "unet": set(UNET_FLAGS.split()),
    "vae": {"Encoder", "Decoder", "UNetMidBlock2D"},
    "text": {"CLIPEncoder", "CLIPEncoderLayer"},
}


@pytest.fixture(scope="module")
def pairs():
    return {case: pair(*case) for case in [("unet", "sd2"), *MAIN]}


def switch(kind: str, network: nn.Module, on: bool) -> None:
    """Switch checkpointing by the published names."""
    words = ("enable", "disable")[not on]
    getattr(network, f"gradient_checkpointing_{words}" if kind == "text" else f"{words}_gradient_checkpointing")()


@contextlib.contextmanager
def checkpointing(kind: str, *networks: nn.Module, on: bool = True):
    for network in networks:
        switch(kind, network, on)
    yield
    for network in networks:
        switch(kind, network, False)


def gradients(case, network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradient of a fixed sum of the results, by weight."""
    results = call(*case, network)
    loss = sum((result * draw(*result.shape, seed=3)).sum() for result in results.values())
    weights = {plain(key): weight for key, weight in network.named_parameters()}
    return dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))


def compare(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> None:
    assert list(mine) == list(theirs)
    largest = max(gradient.norm() for gradient in theirs.values())
    for key, gradient in theirs.items():
        error = (mine[key] - gradient).norm() / max(gradient.norm(), FLOOR * largest)
        assert error <= tolerance, (key, error)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("on", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("case", MAIN, ids=" ".join)
def test_gradients(pairs, case, on, train):
    ours, reference = (network.train(train) for network in pairs[case])
    with checkpointing(case[0], ours, reference, on=on):
        compare(gradients(case, ours), gradients(case, reference))


@pytest.mark.parametrize("case", MAIN, ids=" ".join)
def test_checkpointing_changes_nothing(pairs, case):
    """Results and gradients are bit-equal with and without, in eval mode too."""
    ours = pairs[case][0].eval()
    plainly, results = gradients(case, ours), call(*case, ours)
    with checkpointing(case[0], ours):
        compare(gradients(case, ours), plainly, tolerance=0.0)
        again = call(*case, ours)
    assert all(torch.equal(results[key], again[key]) for key in results)


@pytest.mark.parametrize("case", MAIN[:3], ids=" ".join)
def test_inputs_gradients(pairs, case):
    """The gradient of the first argument, with checkpointing."""
    found = []
    for network in pairs[case]:
        for on in (False, True):
            sample = unet_inputs(case[1])["sample"] if case[0] == "unet" else draw(2, 3, 24, 16)
            sample.requires_grad_()
            with checkpointing(case[0], network, on=on):
                if case[0] == "unet":
                    result = network(**{**unet_inputs(case[1]), "sample": sample}).sample
                else:
                    result = network.decode(network.encode(sample).latent_dist.mode()).sample
                found.append(torch.autograd.grad(result.square().sum(), sample)[0])
    assert torch.equal(found[0], found[1])
    assert distance(found[0], found[2]) < TOLERANCE


@pytest.mark.parametrize("case", MAIN, ids=" ".join)
def test_flags(pairs, case):
    """The flag is on the published classes; the model's property says whether any of them has it."""
    ours, reference = pairs[case]

    def flags(network):
        modules = [(plain(path), module) for path, module in network.named_modules()]
        return {
            p: m.gradient_checkpointing for p, m in modules if isinstance(vars(m).get("gradient_checkpointing"), bool)
        }

    kinds = {type(module).__name__ for module in ours.modules() if hasattr(module, "gradient_checkpointing")}
    assert kinds == {kind for kind in FLAGS[case[0]] if kind in {type(module).__name__ for module in ours.modules()}}
    assert flags(ours) == flags(reference)
    assert isinstance(type(ours).is_gradient_checkpointing, property)
    assert ours.is_gradient_checkpointing is False
    assert getattr(ours, "supports_gradient_checkpointing" if case[0] == "text" else "_supports_gradient_checkpointing")
    for network in (ours, reference):
        switch(case[0], network, True)
    assert ours.is_gradient_checkpointing is True
    assert flags(ours) == flags(reference)
    assert all(flags(ours).values())
    for network in (ours, reference):
        switch(case[0], network, False)
    assert ours.is_gradient_checkpointing is False
    assert not any(flags(ours).values())
    next(module for module in ours.modules() if hasattr(module, "gradient_checkpointing")).gradient_checkpointing = True
    assert ours.is_gradient_checkpointing is True
    switch(case[0], ours, False)


def kept(case, network: nn.Module) -> int:
    """Return the bytes that a call keeps for the backward pass, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = call(*case, network)
    assert results
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("case", [("unet", "sd2"), *MAIN], ids=" ".join)
def test_memory(pairs, case):
    """Checkpointing keeps less than half of the bytes, the text encoder's in train mode as in transformers.

    Observed: 0.12 to 0.19 of them.
    """
    ours = pairs[case][0].train(case[0] == "text")
    plainly = kept(case, ours)
    with checkpointing(case[0], ours):
        checkpointed = kept(case, ours)
    assert checkpointed < 0.5 * plainly


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", [("unet", "sd2"), ("vae", "sd")], ids=" ".join)
def test_repeated_calls(pairs, case, train):
    """As many calls of each class as in the reference, before and after the backward pass: the same granularity."""
    counts = []
    for network in pairs[case]:
        network.train(train)
        count = Counter()
        kinds = ("ResnetBlock2D", "BasicTransformerBlock", "Attention", "Upsample2D", "Downsample2D")
        handles = [
            module.register_forward_pre_hook(lambda module, _, count=count: count.update([type(module).__name__]))
            for module in network.modules()
            if type(module).__name__ in kinds
        ]
        with checkpointing(case[0], network):
            gradients(case, network)
        for handle in handles:
            handle.remove()
        counts.append(count)
    assert counts[0] == counts[1]


def test_no_gradients(pairs):
    """Without gradients nothing is repeated or kept."""
    unet, calls = pairs["unet", "sd1"][0], []
    handle = unet.mid_block.register_forward_pre_hook(lambda *_: calls.append(1))
    with checkpointing("unet", unet), torch.no_grad():
        assert kept(("unet", "sd1"), unet) == 0
    handle.remove()
    assert calls == [1]


def test_dropout():
    """A repeated call draws the same dropout: gradients are bit-equal for one seed."""
    from depthdiff.models.unet import UNet2DConditionModel
    from tests.parity.geometries import SD1

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD1, dropout=0.2).train()
    found = []
    for on in (False, True):
        with checkpointing("unet", unet, on=on):
            torch.manual_seed(1)
            found.append(gradients(("unet", "sd1"), unet))
    compare(found[1], found[0], tolerance=0.0)
    unet.eval()
    assert (gradients(("unet", "sd1"), unet)["conv_in.weight"] - found[0]["conv_in.weight"]).norm() > 1e-3


def test_two_backward_passes(pairs):
    """Two calls with one prompt that needs a gradient, each with its own backward pass (textual inversion)."""
    found = []
    for unet in pairs["unet", "sd1"]:
        prompt = unet_inputs("sd1")["encoder_hidden_states"].requires_grad_()
        for step in (3, 700):
            unet(**{**unet_inputs("sd1"), "timestep": step, "encoder_hidden_states": prompt}).sample.sum().backward()
        found.append(prompt.grad)
        unet.zero_grad()
    assert distance(*found) < TOLERANCE


def test_training_steps():
    """Three steps of SGD, with checkpointing: the weights stay those of the reference."""
    networks = pair("unet", "sd1")
    losses = []
    for unet in networks:
        unet.train()
        unet.enable_gradient_checkpointing()
        optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)
        for step in range(3):
            inputs = {**unet_inputs("sd1"), "timestep": 100 * step}
            loss = (unet(**inputs).sample - draw(2, 4, 20, 12, seed=step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (key, mine), theirs in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert distance(mine.detach(), theirs.detach()) < TOLERANCE, key
