"""Prompts of any length against transformers and diffusers, and compel with our tokenizer and text encoder."""

import pytest
import torch
from transformers import CLIPTokenizer

from tests.parity.both import load_both

TOLERANCE = 1e-5  # of embeddings of unit variance; observed: 0


@pytest.fixture(scope="module")
def pair(tiny_folder):
    return load_both(tiny_folder)


@pytest.fixture(scope="module")
def reference(pair, tiny_folder):
    """Tokens and weights -> embeddings, by transformers."""
    tokenizer, encoder = CLIPTokenizer.from_pretrained(tiny_folder, subfolder="tokenizer"), pair[1].text_encoder

    @torch.no_grad()
    def read(chunks, clip_skip=None):
        """`chunks` are lists of (text, weight), each within 75 tokens."""
        embeds = []
        for chunk in chunks:
            ids, weights = [tokenizer.bos_token_id], [1.0]
            for text, weight in chunk:
                own = tokenizer(text, add_special_tokens=False).input_ids
                ids, weights = ids + own, weights + [weight] * len(own)
            ids.append(tokenizer.eos_token_id)
            ids += [tokenizer.pad_token_id] * (77 - len(ids))
            weights = torch.tensor(weights + [1.0] * (77 - len(weights)))
            found = encoder(torch.tensor([ids]), output_hidden_states=True)
            plain = found[0]
            if clip_skip is not None:
                norm = getattr(encoder, "text_model", encoder).final_layer_norm
                plain = norm(found.hidden_states[-1 - clip_skip])
            weighted = plain * weights[None, :, None]
            embeds.append(weighted * (plain.mean() / weighted.mean()))
        return torch.cat(embeds, dim=1)

    return read


def mine(pair, prompt, negative="", **options):
    return pair[0].encode_prompt(prompt, "cpu", 1, True, negative, prompt_syntax="a1111", **options)


@pytest.mark.parametrize("text", ["", "two tigers", "a: b, c", "! " * 75, "Ünïcödé — 猫"])
@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("times", [1, 2])
def test_without_brackets_it_is_what_diffusers_reads(text, clip_skip, times, pair):
    """To the last bit, on both sides; for `clip_skip` diffusers needs transformers 4's encoder, or ours."""
    reference = pair[1]
    if clip_skip is not None:
        reference = type(reference)(**{**reference.components, "text_encoder": pair[0].text_encoder})
    options = {"num_images_per_prompt": times, "clip_skip": clip_skip}
    given = {"device": "cpu", "do_classifier_free_guidance": True}
    for prompt, negative in ((text, "bad"), ("two dogs", text), ([text, "x"], [text, "y"])):
        theirs = reference.encode_prompt(prompt, **given, **options, negative_prompt=negative)
        for syntax in (None, "a1111"):
            options |= {"negative_prompt": negative, "prompt_syntax": syntax}
            ours = pair[0].encode_prompt(prompt, **given, **options)
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        options = {"num_images_per_prompt": times, "clip_skip": clip_skip}


BANG = "! "
PROMPTS = {
    "a (red:1.3) ball, [old] ((big))": [
        [("a ", 1), ("red", 1.3), (" ball, ", 1), ("old", 1 / 1.1), (" ", 1), ("big", 1.21)]
    ],
    "(a cat:0.2) BREAK a (dog:-0.5)": [[("a cat", 0.2)], [("a ", 1), ("dog", -0.5)]],
    "BREAK x": [[], [("x", 1)]],
    BANG * 76: [[(BANG * 75, 1)], [("!", 1)]],
    BANG * 150: [[(BANG * 75, 1)]] * 2,
    f"({BANG * 151}:1.5)": [[(BANG * 75, 1.5)], [(BANG * 75, 1.5)], [("!", 1.5)]],
    BANG * 300: [[(BANG * 75, 1)]] * 4,
    f"{BANG * 60}, ({BANG * 16}:1.2)": [[(f"{BANG * 60},", 1)], [(BANG * 16, 1.2)]],
    f"{BANG * 54}, {BANG * 22}": [[(f"{BANG * 54}, {BANG * 20}", 1)], [(BANG * 2, 1)]],
}


@pytest.mark.parametrize("text", PROMPTS, ids=lambda text: text[:20])
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_weights_and_chunks(text, clip_skip, pair, reference):
    chunks = PROMPTS[text]
    ours, negative = mine(pair, text, "bad", clip_skip=clip_skip)
    torch.testing.assert_close(ours, reference(chunks, clip_skip), rtol=0, atol=TOLERANCE)
    filled = [[("bad", 1)], *[[]] * (len(chunks) - 1)]
    torch.testing.assert_close(negative, reference(filled), rtol=0, atol=TOLERANCE)
    ours, negative = mine(pair, "good", text, clip_skip=clip_skip)
    torch.testing.assert_close(negative, reference(chunks), rtol=0, atol=TOLERANCE)


def test_a_batch_of_different_lengths(pair, reference):
    texts = list(PROMPTS)
    longest = max(map(len, PROMPTS.values()))
    ours, negative = mine(pair, texts, texts[::-1])
    for text, row, other in zip(texts, ours, negative.flip(0), strict=True):
        expected = reference([*PROMPTS[text], *[[]] * (longest - len(PROMPTS[text]))])[0]
        torch.testing.assert_close(row, expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(other, expected, rtol=0, atol=TOLERANCE)


def test_with_transformers_tokenizer_and_encoder(pair, reference):
    """Those of others, as components of our pipeline."""
    mixed = type(pair[0])(
        **{**pair[0].components, "tokenizer": pair[1].tokenizer, "text_encoder": pair[1].text_encoder}
    )
    for text, chunks in PROMPTS.items():
        [found], _ = mine([mixed], text)
        torch.testing.assert_close(found, reference(chunks)[0], rtol=0, atol=TOLERANCE)


COMPEL = {
    "plain": "two tigers at night",
    "weights": "a (red)1.6 ball++ and a -- (dog)0.3",
    "blend": '("a red cat", "an old ship at sea").blend(0.7, 0.4)',
    "and": '("a red cat", "an old ship").and()',
    "swap": "a cat.swap(dog) in a field",
    "long": "a red cat playing with a ball, " * 12,
    "long and weighted": "a (red cat)1.4 playing with a ball, " * 8 + "(the end)0.5",
}


@pytest.mark.parametrize("text", COMPEL.values(), ids=COMPEL)
@pytest.mark.parametrize("truncate", [True, False])
def test_compel(text, truncate, pair):
    """Embeddings made with our tokenizer and text encoder are those made with transformers', and fit the pipeline."""
    compel = pytest.importorskip("compel")
    found = []
    for pipe in pair:
        made = compel.Compel(
            tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=truncate, device="cpu"
        )
        with torch.no_grad():
            embeds = [made.build_conditioning_tensor(one) for one in (text, "bad")]
            if embeds[0].shape != embeds[1].shape:
                embeds = made.pad_conditioning_tensors_to_same_length(embeds)
            found.append(embeds)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)  # observed: 0
    assert (found[0][0].shape[1] > 77) == ("and()" in text or (not truncate and len(text) > 100))
    given = {"prompt_embeds": found[0][0], "negative_prompt_embeds": found[0][1]}
    positive, negative = pair[0].encode_prompt(None, "cpu", 1, True, **given)
    assert torch.equal(positive, found[0][0]) and torch.equal(negative, found[0][1])
