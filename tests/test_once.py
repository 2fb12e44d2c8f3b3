"""What does not change is computed once: within a run the prompt's keys and the timesteps, between calls encodings."""

from contextlib import nullcontext

import pytest
import torch
from depthdiff.cache import Cache, fingerprint, state_of
from depthdiff.models.layers import TransformerBlock
from depthdiff.predictor import UNetInput
from torch import nn


def counted(monkeypatch, network, name):
    """Count the calls of a network's method."""
    calls, method = [], getattr(network, name)

    def count(*args, **kwargs):
        calls.append(args)
        return method(*args, **kwargs)

    monkeypatch.setattr(network, name, count)
    return calls


@pytest.fixture
def call(pipe, small_photo):
    """Make a picture as a tensor."""
    pipe.set_progress_bar_config(disable=True)

    def make(prompt="two tigers", image=small_photo, **options):
        options = {"num_inference_steps": 4, "strength": 1.0, "output_type": "pt", **options}
        return pipe(prompt, image, generator=torch.Generator().manual_seed(0), **options).images

    return make


def test_a_run_reads_the_prompt_and_the_timesteps_once(pipe, call, monkeypatch):
    reads, times = (counted(monkeypatch, pipe.unet, name) for name in ("read_context", "embed_time"))
    predicts = counted(monkeypatch, pipe.unet, "predict")
    call()
    assert (len(reads), len(times)) == (1, len(predicts)), "each timestep by itself, so that its bits are its own"
    assert len(predicts) >= 4


def test_the_unet_remembers_nothing_that_has_changed(pipe):
    """Another prompt, a prompt changed in place and changed weights: each is read anew, and right."""
    unet, generator = pipe.unet, torch.Generator().manual_seed(1)
    sample = torch.randn(2, 5, 8, 12, generator=generator)
    first, second = (torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator) for _ in range(2))
    timesteps = torch.tensor([501, 301]).unbind()

    def agree(context, timestep):
        torch.testing.assert_close(
            unet(sample, timestep, context).sample, unet(sample, timestep.clone(), context.clone()).sample
        )

    with torch.no_grad(), unet.remembering(timesteps):
        agree(first, timesteps[0])
        agree(second, timesteps[1])
        before = unet(sample, timesteps[0], first).sample
        first.mul_(-1)
        agree(first, timesteps[0])
        assert not torch.allclose(unet(sample, timesteps[0], first).sample, before)
        weight = next(weight for key, weight in unet.named_parameters() if "cross_attn.to_v" in key)
        before = unet(sample, timesteps[0], first).sample
        weight.mul_(3)
        agree(first, timesteps[0])
        assert not torch.equal(unet(sample, timesteps[0], first).sample, before)
        weight.div_(3)
    assert unet._memory is None


def test_a_callback_may_replace_the_prompt(pipe, call, monkeypatch):
    """From the next step on the other prompt counts: as where every step reads its prompt anew."""
    other = torch.cat(list(reversed(pipe.encode_prompt("a house", "cpu", 1, True, ""))))

    def replace(pipeline, index, timestep, tensors):
        return {"prompt_embeds": other}

    replacing = {"callback_on_step_end": replace, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    changed = call(**replacing)
    assert not torch.allclose(changed, call(), atol=1e-3)
    monkeypatch.setattr(pipe.unet, "remembering", lambda timesteps: nullcontext())
    torch.testing.assert_close(changed, call(**replacing))


def test_the_guidance_batch_is_written_in_place():
    latents, depth = torch.randn(3, 4, 6, 8), torch.randn(6, 1, 6, 8)
    filler = UNetInput(nn.Conv2d(5, 8, 3).weight)
    first = filler.filled(latents, depth)
    torch.testing.assert_close(first, torch.cat([torch.cat([latents, latents]), depth], 1))
    again = filler.filled(latents + 1, depth)
    assert again is first
    torch.testing.assert_close(again, torch.cat([torch.cat([latents + 1, latents + 1]), depth], 1))
    half = filler.filled(latents, depth[:3])
    torch.testing.assert_close(half, torch.cat([latents, depth[:3]], 1))
    filler.filled(latents, depth)
    depth.mul_(-1)
    torch.testing.assert_close(filler.filled(latents, depth), torch.cat([torch.cat([latents, latents]), depth], 1))


class Rows:
    """Notes how many rows layers read."""

    def __init__(self, *layers):
        self.seen = [set() for _ in layers]
        for layer, seen in zip(layers, self.seen, strict=True):
            layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(len(args[0])))


def test_what_comes_before_the_prompt_is_computed_once_for_both_halves(pipe, call):
    """And gives what both halves of their own give. Observed: at most 1e-6."""
    whole = call(guidance_scale=5.0)
    block = next(module for module in pipe.unet.modules() if isinstance(module, TransformerBlock))
    rows = Rows(pipe.unet.conv_in, block.self_attn.to_q, block.cross_attn.to_q, pipe.unet.conv_out)
    assert torch.equal(call(guidance_scale=5.0), whole)
    assert rows.seen == [{1}, {1}, {2}, {2}]
    own = Rows(pipe.unet)
    torch.testing.assert_close(call(guidance_scale=5.0), whole, rtol=0, atol=1e-5)
    assert own.seen == [{2}], "a hooked UNet gets what one of diffusers gets"
    assert rows.seen == [{1, 2}, {1, 2}, {2}, {2}]


def test_prompts_have_to_be_a_multiple_of_the_latents(pipe):
    sample, context = torch.randn(2, 5, 8, 12), torch.randn(3, 7, pipe.unet.config.cross_attention_dim)
    with pytest.raises(ValueError, match="encoder_hidden_states must have as many rows as sample or a multiple, got 3"):
        pipe.unet(sample, 500, context)


def test_a_callback_that_sees_the_depth_changes_nothing(pipe, call):
    """Where guidance pauses, too. Observed: at most 1e-6."""
    looking = {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["depth_mask"]}
    for options in ({}, {"guidance_interval": (0.3, 0.8)}):
        torch.testing.assert_close(call(**looking, **options), call(**options), rtol=0, atol=1e-5)


@pytest.mark.parametrize("hook", [False, True])
def test_in_inference_mode(pipe, call, hook):
    """Where torch does not count what is written."""
    expected = call()
    pipe.cache.clear()
    if hook:
        pipe.unet.register_forward_pre_hook(lambda *_: None)
    with torch.inference_mode():
        torch.testing.assert_close(call(guidance_interval=(0.0, 1.0)), expected, rtol=0, atol=1e-5)
        assert call(deep_cache=2, guidance_interval=(0.2, 0.8)).isfinite().all()


def test_a_unet_with_another_forward_gets_both_halves(pipe, call, monkeypatch):
    """Such as those that scripts put in its place, which split what they get in two. Observed: at most 1e-6."""
    expected, forward, seen = call(), pipe.unet.forward, set()

    def other(sample, timestep, context, **options):
        assert torch.equal(*sample.chunk(2))
        seen.add(tuple(sample.shape[:2]))
        return forward(sample, timestep, context, **options)

    monkeypatch.setattr(pipe.unet, "forward", other)
    torch.testing.assert_close(call(), expected, rtol=0, atol=1e-5)
    assert seen == {(2, 5)}


@pytest.mark.parametrize("network", ["text_encoder", "vae", "depth_estimator"])
def test_a_second_call_encodes_nothing_and_is_the_same(pipe, call, monkeypatch, network):
    first = call()
    calls = counted(monkeypatch, getattr(pipe, network), "encode" if network == "vae" else "forward")
    assert torch.equal(call(), first)
    assert not calls
    pipe.cache.clear()
    assert torch.equal(call(), first)
    assert calls


def test_another_prompt_image_or_weight_is_encoded(pipe, call, small_photo):
    first = call()
    assert not torch.equal(call("a house"), first)
    assert not torch.equal(call(image=small_photo.transpose(0)), first)
    weight = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(-2)
    changed = call()
    assert not torch.equal(changed, first)
    with torch.no_grad():
        weight.div_(-2)
    torch.testing.assert_close(call(), first)


def test_what_replaces_weights_is_seen(pipe):
    """A cast and back rounds the weights, though they may come to lie where they were."""
    before = state_of(pipe.text_encoder, "key")
    assert state_of(pipe.text_encoder, "key") == before
    pipe.text_encoder.to(torch.bfloat16).to(torch.float32)
    assert state_of(pipe.text_encoder, "key") != before
    before = state_of(pipe.vae)
    pipe.vae.set_attention("math")
    assert state_of(pipe.vae) != before
    pipe.vae.register_forward_hook(lambda *args: None)
    assert state_of(pipe.vae) is None


def test_what_the_caller_gets_is_the_caller_s(pipe, small_photo):
    first = pipe.estimate_depth(small_photo)
    kept = first.clone()
    first.zero_()
    second = pipe.estimate_depth(small_photo)
    assert torch.equal(second, kept)
    second.zero_()
    assert torch.equal(pipe.estimate_depth(small_photo), kept)


def test_the_cache_keeps_the_latest_used():
    cache, made = Cache(size=2), []

    def make(key):
        return cache.get((key,), lambda: made.append(key) or torch.tensor(ord(key)))

    for key in "abacab":
        assert make(key).item() == ord(key)
    assert made == list("abcb")
    assert "2 of 2 results" in repr(cache)
    cache.size = 0
    make("a")
    assert made[-1] == "a"
    assert fingerprint(torch.zeros(2, 3)) != fingerprint(torch.zeros(3, 2))
    assert fingerprint(torch.zeros(2)) != fingerprint(torch.zeros(1, dtype=torch.float64))
