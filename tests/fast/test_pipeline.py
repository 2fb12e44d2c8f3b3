"""Promises of a whole call, with the fast computations on: nothing is remembered, and what a step sees is right."""

import pytest
import torch

from depthdiff import fast


@pytest.fixture
def call(pipe, small_photo):
    """Make a picture as a tensor."""

    def make(prompt="two tigers", image=small_photo, **options):
        options = {"num_inference_steps": 4, "strength": 1.0, "output_type": "pt", **options}
        return pipe(prompt, image, generator=torch.Generator().manual_seed(0), **options).images

    return make


def test_a_callback_may_replace_the_prompt(pipe, call):
    """From the next step on the other prompt counts, as without the fast computations. Observed: 4e-6."""
    other = torch.cat(list(reversed(pipe.encode_prompt("a house", "cpu", 1, True, ""))))
    replacing = {
        "callback_on_step_end": lambda *_: {"prompt_embeds": other},
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    changed = call(**replacing)
    assert not torch.allclose(changed, call(), atol=1e-3)
    fast.disable(pipe)
    torch.testing.assert_close(changed, call(**replacing), rtol=0, atol=2e-5)


def test_a_callback_that_looks_changes_nothing(call):
    """Where guidance pauses, too."""
    looking = {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["depth_mask"]}
    for options in ({}, {"guidance_interval": (0.3, 0.8)}):
        torch.testing.assert_close(call(**looking, **options), call(**options), rtol=0, atol=1e-5)  # observed: 0


def test_in_inference_mode(call):
    """Observed: 0."""
    expected = call()
    with torch.inference_mode():
        torch.testing.assert_close(call(), expected, rtol=0, atol=1e-5)
        assert call(deep_cache=2, guidance_interval=(0.2, 0.8)).isfinite().all()


def test_each_call_reads_what_is_there(pipe, call, small_photo):
    """Another prompt, image or weight counts at once; and without it the first picture comes again."""
    first = call()
    assert not torch.equal(call("a house"), first)
    assert not torch.equal(call(image=small_photo.transpose(0)), first)
    weight = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(-2)
    assert not torch.equal(call(), first)
    with torch.no_grad():
        weight.div_(-2)
    torch.testing.assert_close(call(), first, rtol=0, atol=1e-6)  # observed: 0


@pytest.mark.parametrize("network", ["text_encoder", "vae", "depth_estimator", "unet"])
def test_a_network_with_another_forward_is_called(pipe, call, network):
    """Such as one that scripts put in its place; with guidance the UNet's gets both halves. Observed: 0."""
    part, calls = getattr(pipe, network), []
    part = part.decoder if network == "vae" else part
    expected, forward = call(), part.forward
    part.forward = lambda *args, **options: calls.append(args) or forward(*args, **options)
    torch.testing.assert_close(call(), expected, rtol=0, atol=2e-5)
    assert calls
    if network == "unet":
        assert {tuple(args[0].shape[:2]) for args in calls} == {(2, 5)}
        assert all(torch.equal(*args[0].chunk(2)) for args in calls)
