"""Embeddings of any length beside a prompt given as text: it is read at their length, as in diffusers."""

import numpy as np
import pytest
import torch

from tests.parity.both import load_both

TOLERANCE = 2e-3  # of full range; observed: at most 2e-6


@pytest.fixture(scope="module")
def pair(tiny_folder):
    return load_both(tiny_folder)


def embeds(pipe, length, batch=2):
    shape = batch, length, pipe.unet.config.cross_attention_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [2, 3, 20, 40, 76, 77])
@pytest.mark.parametrize("negative", [None, ["two dogs with a very long tail each"] * 2, ["a", "blurry"]])
def test_the_negative_prompt_is_read_at_the_length_of_the_embeddings(length, negative, pair, small_photo):
    options = {"negative_prompt": negative, "num_inference_steps": 2, "output_type": "np"}
    ours, theirs = (
        pipe(
            prompt_embeds=embeds(pipe, length),
            image=[small_photo] * 2,
            generator=torch.Generator().manual_seed(0),
            **options,
        ).images
        for pipe in pair
    )
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    ours, theirs = (pipe.encode_prompt(None, "cpu", 1, True, negative, embeds(pipe, length))[1] for pipe in pair)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # observed: 0


@pytest.mark.parametrize("length", [40, 77, 100, 154, 231, 300])
def test_beyond_the_text_encoder_the_empty_text_follows(length, pair, small_photo):
    """As compel fills up; diffusers refuses lengths above 77."""
    pipe = pair[0]
    _, negative = pipe.encode_prompt(None, "cpu", 1, True, "two dogs", embeds(pipe, length))
    [text], [empty] = (pipe.encode_prompt(words, "cpu", 1, False)[0] for words in ("two dogs", ""))
    expected = torch.cat([text, *[empty] * 4])[:length]
    if length >= 77:
        assert torch.equal(negative, expected.expand(2, -1, -1))
    positive, given = pipe.encode_prompt("two dogs", "cpu", 1, True, negative_prompt_embeds=embeds(pipe, length, 1))
    assert positive.shape == given.shape == (1, length, expected.shape[1])
    if length >= 77:
        assert torch.equal(positive[0], expected)
    picture = pipe(
        image=small_photo, prompt_embeds=embeds(pipe, length), num_inference_steps=2, output_type="np"
    ).images
    assert np.isfinite(picture).all() and picture.std() > 0


def test_a_text_needs_its_start_and_end(pair, small_photo):
    with pytest.raises(ValueError, match="`prompt_embeds` must have at least 2 tokens, start and end"):
        pair[0](image=small_photo, prompt_embeds=embeds(pair[0], 1))


def test_prompts_are_read_without_the_other_networks(pair):
    """By a pipeline that has tokenizer and text encoder alone, as scripts do that encode prompts beforehand."""
    results = []
    for pipe in pair:
        parts = dict.fromkeys(pipe.components) | {"tokenizer": pipe.tokenizer, "text_encoder": pipe.text_encoder}
        results.append(type(pipe)(**parts).encode_prompt("two dogs", "cpu", 2, True, "blurry"))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # observed: 0
