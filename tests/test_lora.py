"""LoRA and its kin: the formulas, what is restored, and what is refused. Damaged files: test_fuzz_files.py."""

import itertools
import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from random_checkpoint import build_pipeline
from safetensors.torch import load_file, save_file

from depthdiff import StableDiffusionDepth2ImgPipeline
from depthdiff.adapters.formats import layer_names
from depthdiff.adapters.methods import fits, make_delta
from depthdiff.config import CheckpointError

LINEAR, CONV = (12, 10), (12, 10, 3, 3)


def randn(*shape, seed=[0]):  # noqa: B006 - a counter
    seed[0] += 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0]), dtype=torch.float64)


def by_hand(shape, value):
    """Fill a weight entry by entry: the formula of a paper, as it is written there."""
    out = torch.zeros(shape, dtype=torch.float64)
    for index in itertools.product(*map(range, shape)):
        out[index] = value(*index)
    return out


def lora_linear():
    up, down = randn(12, 3), randn(3, 10)
    return {"up": up, "down": down}, by_hand(LINEAR, lambda o, i: sum(up[o, r] * down[r, i] for r in range(3)))


def lora_conv():
    up, down = randn(12, 3, 1, 1), randn(3, 10, 3, 3)
    formula = lambda o, i, y, x: sum(up[o, r, 0, 0] * down[r, i, y, x] for r in range(3))  # noqa: E731
    return {"up": up, "down": down}, by_hand(CONV, formula)


def lora_tucker():
    """Three convolutions one after the other: 1x1, 3x3, 1x1; their product as one, found by feeding in impulses."""
    up, mid, down = randn(12, 3, 1, 1), randn(3, 3, 3, 3), randn(3, 10, 1, 1)
    whole = torch.zeros(CONV, dtype=torch.float64)
    for i, y, x in itertools.product(range(10), range(3), range(3)):
        impulse = torch.zeros(1, 10, 3, 3, dtype=torch.float64)
        impulse[0, i, y, x] = 1
        whole[:, i, y, x] = torch.conv2d(torch.conv2d(torch.conv2d(impulse, down), mid), up)[0, :, 0, 0]
    return {"up": up, "mid": mid, "down": down}, whole


def loha_linear():
    a1, b1, a2, b2 = randn(12, 3), randn(3, 10), randn(12, 3), randn(3, 10)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return parts, by_hand(LINEAR, lambda o, i: (a1[o] @ b1[:, i]) * (a2[o] @ b2[:, i]))


def loha_conv():
    a1, b1, a2, b2 = randn(12, 3), randn(3, 90), randn(12, 3), randn(3, 90)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    column = lambda i, y, x: i * 9 + y * 3 + x  # noqa: E731
    formula = lambda o, *at: (a1[o] @ b1[:, column(*at)]) * (a2[o] @ b2[:, column(*at)])  # noqa: E731
    return parts, by_hand(CONV, formula)


def loha_tucker():
    t1, a1, b1, t2, a2, b2 = (randn(*s) for s in ((3, 3, 3, 3), (3, 12), (3, 10)) * 2)
    parts = {"hada_t1": t1, "hada_w1_a": a1, "hada_w1_b": b1, "hada_t2": t2, "hada_w2_a": a2, "hada_w2_b": b2}

    def core(t, a, b, o, i, y, x):
        return sum(t[p, q, y, x] * a[p, o] * b[q, i] for p in range(3) for q in range(3))

    return parts, by_hand(CONV, lambda *at: core(t1, a1, b1, *at) * core(t2, a2, b2, *at))


def kronecker(w1, w2, shape):
    rows, columns = w2.shape[:2]
    formula = lambda o, i, *k: w1[o // rows, i // columns] * w2[(o % rows, i % columns, *k)]  # noqa: E731
    return by_hand(shape, formula)


def lokr_whole():
    w1, w2 = randn(3, 2), randn(4, 5)
    return {"lokr_w1": w1, "lokr_w2": w2}, kronecker(w1, w2, LINEAR)


def lokr_low():
    a1, b1, a2, b2 = randn(3, 3), randn(3, 2), randn(4, 3), randn(3, 5)
    parts = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2_a": a2, "lokr_w2_b": b2}
    return parts, kronecker(a1 @ b1, a2 @ b2, LINEAR)


def lokr_conv():
    w1, a2, b2 = randn(3, 2), randn(4, 3), randn(3, 45)
    return {"lokr_w1": w1, "lokr_w2_a": a2, "lokr_w2_b": b2}, kronecker(w1, (a2 @ b2).view(4, 5, 3, 3), CONV)


def lokr_tucker():
    w1, t2, a2, b2 = randn(3, 2), randn(3, 3, 3, 3), randn(3, 4), randn(3, 5)
    w2 = by_hand(
        (4, 5, 3, 3),
        lambda o, i, y, x: sum(t2[p, q, y, x] * a2[p, o] * b2[q, i] for p in range(3) for q in range(3)),
    )
    return {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": a2, "lokr_w2_b": b2}, kronecker(w1, w2, CONV)


def full():
    diff = randn(*CONV)
    return {"diff": diff}, diff


FORMULAS = [lora_linear, lora_conv, lora_tucker, loha_linear, loha_conv, loha_tucker, lokr_whole, lokr_low, lokr_conv,
            lokr_tucker, full]  # fmt: skip
RANKLESS = (lokr_whole, full)


@pytest.mark.parametrize("formula", FORMULAS)
def test_formulas_in_float64(formula):
    parts, expected = formula()
    weight = randn(*expected.shape)
    delta = make_delta(parts, alpha=1.5)
    scale = 1.0 if formula in RANKLESS else 1.5 / 3
    torch.testing.assert_close(delta.of(weight), expected * scale, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("formula", [lora_linear, lora_conv, loha_linear, lokr_low])
@pytest.mark.parametrize("form", ["PEFT", "LyCORIS out", "LyCORIS in"])
def test_dora_in_float64(formula, form):
    """m (W + d) / |W + d|, the length over each channel out, or over each channel in. arXiv:2402.09353, eq. 5."""
    parts, change = formula()
    weight = randn(*change.shape)
    axis = 1 if form == "LyCORIS in" else 0
    magnitude = randn(change.shape[axis]).abs() + 0.5
    shape = {
        "PEFT": (-1,),
        "LyCORIS out": (-1, *[1] * (weight.ndim - 1)),
        "LyCORIS in": (1, -1, *[1] * (weight.ndim - 2)),
    }
    delta = make_delta({**parts, "dora_scale": magnitude.reshape(shape[form])}, alpha=3)
    changed = weight + change
    for n in range(change.shape[axis]):
        channel = changed.select(axis, n)
        channel *= magnitude[n] / channel.pow(2).sum().sqrt()
    torch.testing.assert_close(weight + delta.of(weight), changed, rtol=1e-12, atol=1e-12)


def test_rank_stabilized_scale():
    assert make_delta({"up": randn(12, 4), "down": randn(4, 10)}, 6, rank_stabilized=True).scale == 6 / 2
    assert make_delta({"up": randn(12, 4), "down": randn(4, 10)}, None).scale == 1


def kohya_file(pipe, method="lora", strength=0.05, seed=0):
    """Write a random adapter of every method over all attention layers, and convolutions, by the layouts' rules."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    networks = {"unet": (pipe.unet, "lora_unet_"), "text_encoder": (pipe.text_encoder, "lora_te_")}
    for network, prefix in networks.values():
        for key, weight in network.named_parameters():
            if not key.endswith((".to_q.weight", ".to_v.weight", ".q_proj.weight", ".v_proj.weight", ".conv1.weight")):
                continue
            stem = prefix + key.removesuffix(".weight").replace(".", "_")
            o, i, *kernel = weight.shape
            rand = lambda *shape: torch.randn(*shape, generator=generator) * strength  # noqa: E731
            if method == "lora":
                parts = {"lora_down.weight": rand(2, i, *kernel), "lora_up.weight": rand(o, 2, *[1] * len(kernel))}
            elif method == "loha":
                n = i * int(np.prod(kernel))
                parts = {
                    "hada_w1_a": rand(o, 2),
                    "hada_w1_b": rand(2, n),
                    "hada_w2_a": rand(o, 2),
                    "hada_w2_b": rand(2, n),
                }
            elif method == "lokr":
                parts = {"lokr_w1": rand(2, 2), "lokr_w2": rand(o // 2, i // 2, *kernel)}
            else:
                parts = {"diff": rand(*weight.shape), "diff_b": rand(o)}
                parts = (
                    parts
                    if key.replace(".weight", ".bias") in dict(network.named_parameters())
                    else {"diff": parts["diff"]}
                )
            if method in ("lora", "loha"):
                parts["alpha"] = torch.tensor(1.0)
            state |= {f"{stem}.{name}": part for name, part in parts.items()}
    return state


def snapshot(pipe):
    return {
        (name, key): value.clone()
        for name in ("unet", "text_encoder")
        for key, value in getattr(pipe, name).state_dict().items()
    }


def same(pipe, before):
    now = snapshot(pipe)
    return now.keys() == before.keys() and all(torch.equal(now[key], value) for key, value in before.items())


def picture(pipe, photo, **more):
    generator = torch.Generator().manual_seed(1)
    return pipe("two tigers", photo, num_inference_steps=2, generator=generator, output_type="np", **more).images


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_come_back_bit_for_bit(pipe, method, dtype):
    """After any sequence of switches, unload and unfuse leave what was there before."""
    pipe.to(dtype)
    before = snapshot(pipe)
    pipe.load_lora_weights(kohya_file(pipe, method), "a")
    pipe.load_lora_weights(kohya_file(pipe, "lora", seed=1), "b")
    assert not same(pipe, before)
    rng = random.Random(0)
    for _ in range(8):
        pipe.set_adapters(["a", "b"], [rng.uniform(-1, 1), rng.uniform(-1, 1)])
    pipe.fuse_lora(lora_scale=0.7)
    pipe.set_adapters("a", 0.3)
    pipe.disable_lora()
    assert not same(pipe, before)
    pipe.unfuse_lora()
    assert same(pipe, before)
    pipe.enable_lora()
    assert not same(pipe, before)
    pipe.fuse_lora(["unet"])
    pipe.unload_lora_weights()
    assert not same(pipe, before)
    pipe.unfuse_lora()
    assert same(pipe, before)


def test_merged_is_the_weight_plus_the_change(pipe):
    """W + 0.3 (alpha / r) up down, computed here, for one layer."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    before = pipe.unet.get_parameter(name).detach().clone()
    state = kohya_file(pipe)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    pipe.load_lora_weights(state, "a")
    pipe.set_adapters("a", 0.3)
    up, down = state[f"{stem}.lora_up.weight"].double(), state[f"{stem}.lora_down.weight"].double()
    torch.testing.assert_close(
        pipe.unet.get_parameter(name).detach().double(), before.double() + 0.3 * 0.5 * up @ down, rtol=1e-6, atol=1e-7
    )


def test_scale_of_one_call_lasts_one_call(pipe, small_photo):
    plain = picture(pipe, small_photo)
    pipe.load_lora_weights(kohya_file(pipe), "a")
    with_it = snapshot(pipe)
    one = picture(pipe, small_photo)
    assert np.array_equal(picture(pipe, small_photo, cross_attention_kwargs={"scale": 0}), plain)
    half = picture(pipe, small_photo, cross_attention_kwargs={"scale": 0.5})
    assert same(pipe, with_it)
    pipe.set_adapters("a", 0.5)
    assert np.array_equal(picture(pipe, small_photo), half)
    assert not np.array_equal(one, half)
    run = pipe.prepare("two tigers", small_photo, num_inference_steps=4, cross_attention_kwargs={"scale": 0.5})
    steps = pipe.denoise(run)
    next(steps)
    steps.close()  # a loop that is left early
    pipe.set_adapters("a", 1.0)
    assert same(pipe, with_it)
    assert not torch.equal(pipe.encode_prompt("a", lora_scale=0.0)[0], pipe.encode_prompt("a")[0])


def test_saving_writes_the_checkpoint_and_what_is_fused(pipe, tmp_path):
    before = snapshot(pipe)
    pipe.load_lora_weights(kohya_file(pipe), "a")
    merged = snapshot(pipe)
    pipe.save_pretrained(tmp_path / "plain")
    assert same(StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "plain"), before)
    assert same(pipe, merged)
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    assert same(StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "fused"), merged)


def test_casts_and_moves_between(pipe, small_photo):
    """A cast after loading gives what loading after the cast gives, up to one rounding."""
    twin = build_pipeline("tiny").to(torch.bfloat16)
    state = kohya_file(pipe)
    pipe.load_lora_weights(state)
    pipe.to(torch.bfloat16)
    twin.load_lora_weights(state)
    for mine, its in zip(pipe.unet.parameters(), twin.unet.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=2**-7, atol=1e-3)
    pipe.unload_lora_weights()
    twin.unload_lora_weights()
    assert same(pipe, snapshot(twin))


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "full", "dora"])
def test_save_and_load_again(pipe, tmp_path, method):
    state = kohya_file(pipe, "lora" if method == "dora" else method)
    if method == "dora":
        for key in [key for key in state if key.endswith("lora_up.weight")]:
            rows = state[key].shape[0]
            state[key.replace("lora_up.weight", "dora_scale")] = torch.rand(rows, *[1] * (state[key].ndim - 1)) + 0.5
    pipe.load_lora_weights(state, "a")
    merged = snapshot(pipe)
    pipe.save_lora_adapter("a", tmp_path)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    now = snapshot(pipe)
    for key, value in merged.items():
        torch.testing.assert_close(now[key], value, rtol=1e-6, atol=1e-7)
    assert (set(load_file(tmp_path / "pytorch_lora_weights.safetensors")) == set(state)) == (method != "lora")


def test_input_layer_of_a_unet_without_depth(pipe, caplog):
    before = pipe.unet.conv_in.weight.detach().clone()
    o = len(before)
    state = {
        "lora_unet_conv_in.lora_down.weight": torch.rand(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.rand(o, 2, 1, 1),
    }
    pipe.load_lora_weights(state)
    assert "only the image channels are changed" in caplog.text
    change = pipe.unet.conv_in.weight.detach() - before
    assert (change[:, :4] != 0).all()
    assert (change[:, 4] == 0).all()


def test_kohya_names_are_unambiguous():
    """Dots turned to underscores: no two layers of the full geometry have one spelling."""
    from random_checkpoint import GEOMETRIES

    from depthdiff import CLIPTextModel, UNet2DConditionModel

    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(GEOMETRIES["full"]["unet"]),
            "text_encoder": CLIPTextModel.from_config(GEOMETRIES["full"]["text_encoder"]),
        }
    names = layer_names(networks)
    flat = [target for spelling, target in names.items() if spelling.startswith(("lora_unet_", "lora_te_"))]
    layers = {(name, key.removesuffix(".weight")) for name, n in networks.items() for key, _ in n.named_parameters()
              if key.endswith(".weight") and "_embedding.weight" not in key}  # fmt: skip
    assert len(names) > len(set(flat)) == len(layers)


def test_methods(pipe):
    with pytest.raises(ValueError, match="none is active"):
        pipe.fuse_lora()
    pipe.load_lora_weights(kohya_file(pipe))
    assert pipe.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0"]}
    with pytest.raises(ValueError, match="'default_0' is taken"):
        pipe.load_lora_weights(kohya_file(pipe), "default_0")
    pipe.load_lora_weights(kohya_file(pipe, seed=4), "default_0", hotswap=True)
    for call, message in {
        "set_adapters('defult_0')": "did you mean 'default_0'",
        "set_adapters(['default_0'], [1, 2])": "one for each of 1 names, got 2",
        "set_adapters('default_0', float('nan'))": "must be finite numbers",
        "set_adapters('default_0', {'vae': 1})": "may name unet, text_encoder, down, mid, up",
        "delete_adapters('x')": "no adapter is called 'x'",
        "set_adapters('default_0', {'unet': {'down': {'block_9': 1}}})": "may name block_0",
        "set_adapters('default_0', {'unet': {'up': {'block_1': [1, 2, 3, 4, 5]}}})": "transformers, got 5",
        "set_adapters('default_0', np.array([0.5]))": "must be finite numbers",
        "fuse_lora(['vae'])": "components must be among",
        "fuse_lora([])": "components must be among",
        "fuse_lora(lora_scale=float('nan'))": "lora_scale must be",
        "encode_prompt('a', lora_scale=float('nan'))": "lora_scale must be",
        "save_lora_adapter('x', '.')": "no adapter is called 'x'",
        "save_lora_weights('nowhere')": "no LoRA layers to save",
        "save_lora_weights('nowhere', {'a': None})": "must hold keys such as",
    }.items():
        with pytest.raises(ValueError, match=message):
            eval(f"pipe.{call}", {"pipe": pipe, "np": np})
    with pytest.raises(
        ValueError, match=r"unet .* would hold NaN or infinity with the adapters 'huge'; give them less"
    ):
        pipe.load_lora_weights({k: v * 1e30 for k, v in kohya_file(pipe).items() if "alpha" not in k}, "huge")
    with pytest.raises(ValueError, match="would hold NaN or infinity with the adapters 'large'"):
        large = {k: v if "alpha" in k else v * 1e4 for k, v in kohya_file(pipe).items()}  # finite in float32
        pipe.to(torch.float16).load_lora_weights(large, "large")
    assert pipe.num_fused_loras == 0
    pipe.to(torch.float32)
    assert "huge" not in pipe.get_list_adapters()["unet"]
    assert pipe.get_active_adapters() == ["default_0"]


def test_fused_adapters_do_not_hide_others_of_their_name(pipe):
    """load, fuse, unload, load: the second is `default_0` again, and counts. Fusing twice is fusing once."""
    first, second = kohya_file(pipe), kohya_file(pipe, seed=9)
    pipe.load_lora_weights(first)
    pipe.fuse_lora()
    fused = snapshot(pipe)
    pipe.fuse_lora("unet", 0.5)
    assert same(pipe, fused)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(second)
    both = snapshot(pipe)
    assert not same(pipe, fused)
    twin = build_pipeline("tiny")
    twin.load_lora_weights(first, "a")
    twin.load_lora_weights(second, "b")
    twin.set_adapters(["a", "b"])
    assert same(twin, both)


def test_names_and_deletions(pipe):
    for _ in range(2):
        pipe.load_lora_weights(kohya_file(pipe))
    pipe.delete_adapters(["default_0", "default_0"])
    pipe.load_lora_weights(kohya_file(pipe))
    assert sorted(pipe.get_list_adapters()["unet"]) == ["default_0", "default_1"]


def test_a_replaced_network_keeps_its_weights(pipe):
    """Neither gets the other's: the old one its own back, the new one its own until it is changed."""
    other, old = build_pipeline("tiny").unet, pipe.unet
    before = {name: p.clone() for name, p in old.named_parameters()}
    for parameter in other.parameters():
        parameter.data += 1
    new = {name: p.clone() for name, p in other.named_parameters()}
    pipe.load_lora_weights(kohya_file(pipe))
    pipe.unet = other
    pipe.unload_lora_weights()
    assert all(torch.equal(p, new[name]) for name, p in other.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in old.named_parameters())


def test_without_text_encoder(pipe):
    pipe.text_encoder = None
    state = {key: value for key, value in kohya_file(build_pipeline("tiny")).items() if "unet" in key}
    pipe.load_lora_weights(state)
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}


@pytest.mark.parametrize("alpha", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0).double()], ids=repr)
def test_alpha_in_every_form(pipe, alpha):
    """Scripts that cut a LoRA out of two checkpoints write it as a whole number."""
    state = kohya_file(pipe)
    state = {key: torch.tensor(3.0) if key.endswith("alpha") else value for key, value in state.items()}
    twin = build_pipeline("tiny")
    twin.load_lora_weights(state)
    pipe.load_lora_weights({key: alpha if key.endswith("alpha") else value for key, value in state.items()})
    assert same(pipe, snapshot(twin))


def test_weights_of_single_transformers(pipe):
    """Each is the weight of its own attention; what is not named counts 1, and `scale` multiplies all."""
    state = kohya_file(pipe)
    own = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    pipe.load_lora_weights(state)
    full = {name: p.detach() - own[name] for name, p in pipe.unet.named_parameters()}
    count = len(pipe.unet.up_blocks[1].attentions)
    numbers = [0.25 * (n + 1) for n in range(count)]
    pipe.set_adapters("default_0", {"unet": {"up": {"block_1": numbers}, "mid": 0.5}})
    for name, parameter in pipe.unet.named_parameters():
        share = 0.5 if name.startswith("mid") else 1.0
        if name.startswith("up_blocks.1.") and ".attentions." in name:
            share = numbers[int(name.split(".")[3])]
        if ".attentions." in name:
            torch.testing.assert_close(parameter.detach() - own[name], full[name] * share, rtol=0, atol=1e-6)


def test_a_direction_without_length():
    """DoRA of a weight with a row of zeros: the row stays, nothing is NaN."""
    parts = {"up": torch.zeros(4, 2), "down": torch.rand(2, 3), "dora_scale": torch.ones(4)}
    weight = torch.rand(4, 3)
    weight[1] = 0
    changed = weight + make_delta(parts, None).of(weight)
    assert changed.isfinite().all()
    assert (changed[1] == 0).all()


@pytest.mark.parametrize(
    "header",
    ['{"unet.alpha_pattern": 5}', '{"unet.r": -4, "unet.lora_alpha": 1}', '{"unet.r": 1' + "0" * 400 + "}", "[1]",
     "[" * 100_000, '{"unet.alpha_pattern": {"(": 1}}'],
    ids=range(6),
)  # fmt: skip
def test_headers_that_lie(pipe, tmp_path, header):
    pipe.load_lora_weights(kohya_file(pipe), "a")
    pipe.save_lora_adapter("a", tmp_path)
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": header})
    with pytest.raises(CheckpointError):
        pipe.load_lora_weights(tmp_path / "x.safetensors")


def test_options_of_diffusers(pipe, tmp_path):
    state = kohya_file(pipe)
    torch.save(state, tmp_path / "x.pt")
    pipe.load_lora_weights(state, low_cpu_mem_usage=True, use_safetensors=True, resume_download=None, proxies=None)
    with pytest.raises(CheckpointError, match="use_safetensors=True"):
        pipe.load_lora_weights(tmp_path / "x.pt", use_safetensors=True)


def without(state, *endings):
    return {key: value for key, value in state.items() if not key.endswith(endings)}


def wide(state, width):
    """The same adapter for another context."""
    return {k: torch.rand(v.shape[0], width) if "attn2_to_v.lora_down" in k else v for k, v in state.items()}


def lokr(state, method="lokr", **shapes):
    """One layer of another method, of these shapes."""
    layer = next(iter(state)).split(".")[0]
    return {f"{layer}.{method}_{part}": torch.rand(shape) for part, shape in shapes.items()}


REFUSED = {
    "nothing": (lambda s: {}, "must hold tensors by name"),
    "no tensors": (lambda s: {"a": 1}, "must be a tensor"),
    "unknown layers": (
        lambda s: {**s, "lora_unet_nowhere.lora_up.weight": torch.rand(2, 2)},
        "1 of .* keys belong to no layer",
    ),
    "unknown part": (lambda s: {**s, next(iter(s)).split(".")[0] + ".boft": torch.rand(2)}, "keys belong to no layer"),
    "mixed": (lambda s: {**s, "unet.conv_in.lora_A.weight": torch.rand(2, 2)}, "mixes .* split it"),
    "half": (lambda s: without(s, "lora_up.weight"), "no known method, or an incomplete one"),
    "alpha alone": (lambda s: without(s, "lora_up.weight", "lora_down.weight"), "alpha alone"),
    "shapes": (lambda s: {k: v[:, :-1] if "to_q.lora_down" in k else v for k, v in s.items()}, "do not fit"),
    "NaN": (lambda s: {k: v * float("nan") for k, v in s.items()}, "must hold finite numbers"),
    "rank 0": (
        lambda s: {k: v[:0] if "lora_down" in k else v[:, :0] if "lora_up" in k else v for k, v in s.items()},
        "no known method",
    ),
    "no axes": (lambda s: {k: torch.tensor(1.0) if "lora_down" in k else v for k, v in s.items()}, "no known method"),
    "sparse": (lambda s: {k: v.to_sparse() if "lora_down" in k else v for k, v in s.items()}, "finite numbers"),
    "meta": (lambda s: {k: v.to("meta") for k, v in s.items()}, "finite numbers"),
    "XL's blocks": (
        lambda s: {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.rand(2, 2048)},
        "made for Stable Diffusion XL",
    ),
    "integers": (lambda s: {k: v.int() for k, v in s.items()}, "must hold finite numbers"),
    "Stable Diffusion 1": (lambda s: wide(s, 768), "made for Stable Diffusion 1, whose context has 768 channels"),
    "Stable Diffusion XL": (lambda s: wide(s, 2048), "made for Stable Diffusion XL"),
    "its second encoder": (lambda s: {**s, "lora_te2_x.alpha": torch.tensor(1.0)}, "made for Stable Diffusion XL"),
    "Flux": (lambda s: {"transformer.x.lora_A.weight": torch.rand(2, 2)}, "made for a diffusion transformer"),
    "twice": (
        lambda s: {
            "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.rand(2, 2),
            "unet.mid_block.attentions.0.proj_in.lora.down.weight": torch.rand(2, 2),
        },
        "is given twice",
    ),
    "one axis": (lambda s: {k: v[:, 0] if "attn2_to_v.lora_down" in k else v for k, v in s.items()}, "do not fit"),
    "no axes, full": (lambda s: {f"{next(iter(s)).split('.')[0]}.diff": torch.tensor(1.0)}, "do not fit"),
    "no axes, LoKr": (
        lambda s: {f"{next(iter(s)).split('.')[0]}.lokr_w{n}": torch.tensor(1.0) for n in "12"},
        "do not fit",
    ),
    "no axes, LoKr with a core": (lambda s: lokr(s, w1=(2, 2), w2_a=(), w2_b=(2, 2), t2=(2, 2, 3, 3)), "do not fit"),
    "no axes, LoHa with cores": (
        lambda s: lokr(s, "hada", w1_a=(), w1_b=(2, 2), t1=(2, 2), w2_a=(2, 2), w2_b=(2, 2), t2=(2, 2)),
        "do not fit",
    ),
    "three axes, LoKr": (lambda s: lokr(s, w1=(1, 1), w2_a=(32, 1, 2), w2_b=(2, 32)), "do not fit"),
    "lengths of the other axis": (
        lambda s: {**s, "lora_unet_down_blocks_1_resnets_0_conv1.dora_scale": torch.ones(32)},
        "do not fit",
    ),
    "long alpha": (lambda s: {k: torch.rand(3) if "alpha" in k else v for k, v in s.items()}, "must be one number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_unchanged(pipe, case):
    change, message = REFUSED[case]
    before = snapshot(pipe)
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora_weights(change(kohya_file(pipe)))
    assert same(pipe, before)
    assert pipe.get_list_adapters() == {}


def test_files(pipe, tmp_path):
    state = kohya_file(pipe)
    save_file(state, tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path / "style.safetensors", "file")
    pipe.load_lora_weights(tmp_path, "the only file of a folder")
    torch.save(state, tmp_path / "style.pt")
    pipe.load_lora_weights(tmp_path / "style.pt", "pickle")
    with pytest.raises(CheckpointError, match=r"found style\.pt, style\.safetensors; name one as weight_name"):
        pipe.load_lora_weights(tmp_path, "two files")
    pipe.load_lora_weights(tmp_path, "named", weight_name="style.pt")
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        pipe.load_lora_weights(tmp_path / "readme.txt")
    with pytest.raises(CheckpointError, match="is neither a folder nor a Hub id"):
        pipe.load_lora_weights("./nowhere")


class Malicious:
    """Unpickled carelessly, this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("method", ["load_lora_weights", "load_textual_inversion"])
def test_pickles_run_nothing(pipe, tmp_path, method):
    torch.save({"a": torch.rand(2), "b": Malicious(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(
        CheckpointError, match=r"holds more than tensors: it would use io\.open\. Nothing of it was run"
    ):
        getattr(pipe, method)(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("formula", FORMULAS)
def test_shapes_without_numbers(formula):
    """`fits` says of every cut, swapped or grown part what computing with it says."""
    parts, expected = formula()
    shape = tuple(expected.shape)
    assert fits(make_delta(parts, None), shape) is True
    assert fits(make_delta(parts, None), (shape[1], shape[0], *shape[2:])) is False
    for name, part in parts.items():
        for changed in (part[:-1], part[:, :-1], part.transpose(0, 1), torch.cat([part, part]), part[None], part[0]):
            delta = make_delta({**parts, name: changed}, None)
            try:
                whole = delta.formula(expected)
                right = whole.shape[0] == shape[0] and whole.numel() == expected.numel()
            except (RuntimeError, IndexError, ValueError):
                right = False
            assert (fits(delta, shape) is True) <= right, (name, changed.shape)
            if changed.ndim == part.ndim:
                assert (fits(delta, shape) is True) == right, (name, changed.shape)


@pytest.mark.parametrize(
    ("dtype", "shape", "bits"), [("F4", [4], 4), ("F32", [1] * 70, 32)], ids=["sub-byte numbers", "70 axes"]
)
def test_tensors_that_torch_does_not_hold_are_refused_by_name(pipe, tmp_path, dtype, shape, bits):
    size = math.prod(shape) * bits // 8
    header = json.dumps({"unet.conv_in.lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}})
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(size))
    for load in (pipe.load_lora_weights, partial(pipe.unet.load_lora_adapter, prefix="unet")):
        with pytest.raises(CheckpointError, match=rf"conv_in.*is {dtype} of {len(shape)} axes"):
            load(path)


def test_a_trainer_may_write_captions_into_the_header(pipe, tmp_path):
    """kohya's trainers write how often each word stands in the captions: headers of several megabytes."""
    save_file(kohya_file(pipe), tmp_path / "a.safetensors", {"ss_tag_frequency": "tiger " * 500_000})
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    assert pipe.get_active_adapters() == ["default_0"]
