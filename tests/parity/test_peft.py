"""The installed peft on our networks: targets, adapters, scales and training, against the references."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.parity.geometries import SIDES, build, distance, draw, pair, plain, text_inputs, unet_inputs

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
TOLERANCE = 1e-5  # relative L2 in float32; observed: at most 2e-6
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LINEAR = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTION = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]
TARGETS = {"attention": ATTENTION, "linear": LINEAR, "convolutions": CONVOLUTION, "all": "all-linear"}
TARGETS["expression"] = r".*attn2\.to_[kv]"
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def lora(targets=ATTENTION, **kwargs):
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, **kwargs)


def wrapped(network: nn.Module) -> list[str]:
    """Return the paths of the layers that peft has wrapped."""
    return [plain(path) for path, module in network.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def adapted(name: str = "sd1", targets=ATTENTION, names: tuple[str, ...] = ("default",)) -> tuple[nn.Module, nn.Module]:
    """Return (ours, reference) with the same weights and adapters."""
    networks = pair("unet", name)
    for network in networks:
        for adapter in names:
            torch.manual_seed(len(adapter))
            network.add_adapter(lora(targets), adapter)
    networks[0].load_state_dict(networks[1].state_dict())
    return networks


def run(unet: nn.Module, name: str = "sd1", **kwargs):
    with torch.no_grad():
        return unet(**unet_inputs(name), **kwargs).sample


SEARCHES = [
    *(("sd1", targets, "add_adapter") for targets in TARGETS),
    *(("sd1", targets, how) for targets in ("linear", "all") for how in ("inject", "get_peft_model")),
    *(("sd2", targets, "add_adapter") for targets in ("attention", "all")),
]


@pytest.mark.parametrize("name, targets, how", SEARCHES)
def test_targets(name, targets, how):
    """The same layers are found, by all three doors."""
    found = []
    for side in SIDES:
        unet = build("unet", name, side)
        if how == "add_adapter":
            unet.add_adapter(lora(TARGETS[targets]))
        elif how == "inject":
            peft.inject_adapter_in_model(lora(TARGETS[targets]), unet)
        else:
            unet = peft.get_peft_model(unet, lora(TARGETS[targets]))
        found.append((wrapped(unet), sorted(map(plain, unet.state_dict()))))
    assert found[0] == found[1]
    if name == "sd2":
        assert len(found[0][0]) == {"attention": 128, "all": 216}[targets]


@pytest.mark.parametrize("how", ["inject", "get_peft_model"])
@pytest.mark.parametrize("kind, name, targets", [("text", "sd2", TEXT), ("vae", "sd", [*ATTENTION, "conv1", "conv2"])])
def test_targets_of_others(kind, name, targets, how):
    found = []
    for side in SIDES:
        network = build(kind, name, side)
        if how == "inject":
            network = peft.inject_adapter_in_model(lora(targets), network)
        else:
            network = peft.get_peft_model(network, lora(targets))
        found.append([path.replace("text_model.", "") for path in wrapped(network)])
        if kind == "text":
            assert network(text_inputs()).last_hidden_state.shape == (3, 17, 24)
    assert found[0] == found[1]


def test_other_tools():
    """What cloneofsimo's, LyCORIS' and kohya's tools look for: class names above and below."""
    blocks = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    searches = [
        (("CrossAttention", "Attention", "GEGLU"), ("Linear",), 144),
        (("Transformer2DModel",), ("Linear",), 192),
        (blocks, ("Linear", "Conv2d"), 279),
    ]
    for side in SIDES:
        unet = build("unet", "sd2", side)
        for owners, names, count in searches:
            assert below(unet, owners, names) == count
        attention = [m for name, m in unet.named_modules() if "attn2" in name and type(m).__name__ == "Attention"]
        assert (len(attention), {module.is_cross_attention for module in attention}) == (16, {True})
        assert below(build("text", "sd2", side), ("CLIPAttention", "CLIPMLP"), ("Linear",)) == 18


def below(network: nn.Module, owners: tuple[str, ...], names: tuple[str, ...]) -> int:
    """Count the modules with one of the names below modules with one of the owners' names."""
    above = [module for module in network.modules() if type(module).__name__ in owners]
    return len({id(module) for owner in above for module in owner.modules() if type(module).__name__ in names})


@pytest.mark.parametrize("name, targets", [("short", "attention"), ("sd1", "linear"), ("sd1", "convolutions")])
def test_results(name, targets):
    ours, reference = adapted(name, TARGETS[targets])
    changed = run(ours, name)
    assert distance(changed, run(reference, name)) < TOLERANCE
    ours.disable_adapters()
    assert distance(changed, run(ours, name)) > 1e-3
    assert distance(run(ours, name), run(pair("unet", name)[1], name)) < TOLERANCE


@pytest.mark.parametrize("scale", [None, 1.0, 0.5, 0, 2.5], ids=str)
def test_scale(scale):
    """`cross_attention_kwargs={"scale": s}` scales for the call, and is restored."""
    ours, reference = adapted()
    before, given = run(ours), {"scale": scale}
    kwargs = {"cross_attention_kwargs": given if scale is not None else None}
    mine, theirs = run(ours, **kwargs), run(reference, **kwargs)
    assert distance(mine, theirs) < TOLERANCE
    assert given == {"scale": scale}
    assert torch.equal(run(ours), before)
    if scale == 0:
        ours.disable_adapters()
        assert distance(run(ours), mine) < TOLERANCE


STEPS = {
    "set one": lambda unet: unet.set_adapter("b"),
    "set both": lambda unet: unet.set_adapter(["default", "b"]),
    "disable": lambda unet: unet.disable_adapters(),
    "enable": lambda unet: (unet.disable_adapters(), unet.enable_adapters()),
    "disable_lora": lambda unet: unet.disable_lora(),
    "enable_lora": lambda unet: (unet.disable_lora(), unet.enable_lora()),
    "weights": lambda unet: unet.set_adapters(["default", "b"], [0.5, 0.2]),
    "one weight": lambda unet: unet.set_adapters("default", 0.3),
    "no weights": lambda unet: unet.set_adapters(["b"]),
    "delete": lambda unet: (unet.set_adapter("default"), unet.delete_adapters("b")),
    "fuse": lambda unet: (unet.set_adapter("b"), unet.fuse_lora(lora_scale=0.7)),
    "fuse and unfuse": lambda unet: (unet.fuse_lora(), unet.unfuse_lora()),
    "unload": lambda unet: unet.unload_lora(),
}


@pytest.mark.parametrize("step", STEPS)
def test_adapters(step):
    """One step on two adapters: results, names and wrapped layers are the reference's."""
    states = []
    for unet in adapted(names=("default", "b")):
        STEPS[step](unet)
        active = unet.active_adapters() if unet._hf_peft_config_loaded else None
        configs = list(getattr(unet, "peft_config", None) or [])
        states.append((run(unet), active, configs, wrapped(unet), bool(unet._hf_peft_config_loaded)))
    assert distance(states[0][0], states[1][0]) < TOLERANCE
    assert states[0][1:] == states[1][1:]


@pytest.mark.parametrize("side", SIDES)
def test_life_of_an_adapter(side):
    """Refusals, the names that are active, and a second start after unloading."""
    unet = build("unet", "sd1", side)
    assert not unet._hf_peft_config_loaded
    for refused in (
        lambda: unet.set_adapter("a"),
        lambda: unet.active_adapters(),
        lambda: unet.disable_adapters(),
        lambda: unet.enable_adapters(),
    ):
        with pytest.raises(ValueError):
            refused()
    assert unet.add_adapter(lora()) is None
    assert unet._hf_peft_config_loaded
    assert not type(unet)._hf_peft_config_loaded
    assert list(unet.peft_config) == unet.active_adapters() == ["default"]
    with pytest.raises(ValueError, match="default"):
        unet.add_adapter(lora())
    with pytest.raises(ValueError, match="nobody"):
        unet.set_adapter("nobody")
    unet.unload_lora()
    assert not unet._hf_peft_config_loaded
    assert not wrapped(unet)
    assert not hasattr(unet, "peft_config")
    unet.add_adapter(lora(), adapter_name="again")
    assert unet.active_adapters() == ["again"]


def test_config_is_needed():
    """Only a PeftConfig is taken."""
    with pytest.raises(ValueError):
        build("unet", "sd1", "ours").add_adapter("lora")


def test_wrapped_layers():
    """Base weights rest, adapter weights learn; layers and their state keep peft's names."""
    unet = adapted()[0]
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert type(layer) is peft.tuners.lora.Linear
    assert not isinstance(layer, nn.Linear)
    assert all(weight.requires_grad == ("lora_" in name) for name, weight in unet.named_parameters())
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for key in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"):
        assert f"{path}.{key}" in unet.state_dict()
    mine, theirs = (peft.get_peft_model_state_dict(network) for network in adapted())
    assert list(mine) == list(theirs)
    assert f"{path}.lora_A.weight" in mine


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("how", ["add_adapter", "get_peft_model"])
def test_training(how, checkpointed):
    """A training step gives gradients to adapter weights alone, and the same weights as in the reference."""
    states = []
    for unet in adapted() if how == "add_adapter" else pair("unet", "sd1"):
        if checkpointed:
            unet.enable_gradient_checkpointing()
        if how == "get_peft_model":
            torch.manual_seed(0)
            unet = peft.get_peft_model(unet, lora())
        unet.train()
        weights = [weight for weight in unet.parameters() if weight.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=0.1)
        for step in range(2):
            loss = (unet(**unet_inputs("sd1")).sample - draw(2, 4, 20, 12, seed=step)).square().mean()
            loss.backward()
            learning = {name for name, weight in unet.named_parameters() if weight.grad is not None}
            assert learning == {name for name, _ in unet.named_parameters() if "lora_" in name}
            optimizer.step()
            optimizer.zero_grad()
        states.append({key: value for key, value in unet.state_dict().items() if "lora_" in key})
    assert list(states[0]) == list(states[1])
    for key in states[0]:
        assert distance(states[0][key], states[1][key]) < TOLERANCE, key


def test_files(tmp_path):
    """The written file has the reference's names and values, and each side loads the other's."""
    networks = adapted(targets=LINEAR)
    files = []
    for side, unet in zip(SIDES, networks, strict=True):
        unet.save_lora_adapter(tmp_path / side)
        files.append(load_file(tmp_path / side / "pytorch_lora_weights.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    for side in SIDES:
        for unet in pair("unet", "sd1"):
            unet.load_lora_adapter(tmp_path / side, prefix=None, weight_name="pytorch_lora_weights.safetensors")
            assert len(wrapped(unet)) == 48
            assert distance(run(unet), run(networks[0])) < TOLERANCE


SIGNATURES = "add_adapter set_adapter active_adapters disable_adapters enable_adapters delete_adapters set_adapters "
SIGNATURES += "enable_lora disable_lora fuse_lora unfuse_lora unload_lora"


@pytest.mark.parametrize("name", SIGNATURES.split())
def test_signatures(name):
    """The published arguments come first, in order, with their defaults."""
    ours, reference = (inspect.signature(getattr(build("unet", "sd1", side), name)).parameters for side in SIDES)
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in reference.values()]


def test_text_adapters():
    """The text encoder takes adapters by itself, and its results follow them."""
    networks = pair("text", "sd2")
    results = []
    for network in networks:
        torch.manual_seed(0)
        network.add_adapter(lora(TEXT))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            results.append(network(text_inputs()).last_hidden_state)
    assert [plain(path) for path in wrapped(networks[0])] == wrapped(networks[1])
    assert distance(*results) < TOLERANCE


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_unfusing_takes_out_what_was_fused(scale):
    ours = adapted()[0]
    before, plain = {key: weight.clone() for key, weight in ours.state_dict().items()}, run(ours)
    scaled = run(ours, cross_attention_kwargs={"scale": scale})
    ours.fuse_lora(lora_scale=scale)
    assert distance(run(ours), scaled) < TOLERANCE
    assert distance(run(ours), run(ours, cross_attention_kwargs={"scale": scale})) < TOLERANCE
    ours.unfuse_lora()
    for key, weight in ours.state_dict().items():
        assert (weight - before[key]).abs().max() < 1e-6  # observed: 6e-8
    assert distance(run(ours), plain) < TOLERANCE  # and the adapter counts as before
