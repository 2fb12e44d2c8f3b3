"""Words learnt by textual inversion: found in prompts, refused where they clash, forgotten without a trace."""

import pytest
import torch
from safetensors.torch import save_file

from depthdiff import StableDiffusionDepth2ImgPipeline
from depthdiff.config import CheckpointError


@pytest.fixture
def width(pipe):
    return pipe.text_encoder.config.hidden_size


def vectors(width, count=1, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def read(pipe, text):
    """Return the ids of a text without start and end."""
    return pipe.tokenizer(text).input_ids[1:-1]


def test_a_word_is_its_vectors(pipe, width):
    """The encoder's table grows by them, the rest of it stays the same tensor's numbers, the prompt reads them."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    others = {id(p) for n, p in pipe.text_encoder.named_parameters() if "token_embedding" not in n}
    value = vectors(width, 3)
    pipe.load_textual_inversion({"<toy>": value})
    grown = pipe.text_encoder.get_input_embeddings().weight.detach()
    assert torch.equal(grown[: len(table)], table)
    assert torch.equal(grown[len(table) :], value)
    assert others <= {id(p) for p in pipe.text_encoder.parameters()}  # nothing else was copied
    first = len(table)
    assert read(pipe, "<toy>") == [first, first + 1, first + 2]
    plain = read(pipe, "a backpack")
    assert read(pipe, "a <toy> backpack") == [plain[0], first, first + 1, first + 2, *plain[1:]]
    assert read(pipe, "A <TOY> backpack") == read(pipe, "a <toy> backpack")
    assert read(pipe, "<toy><toy>") == 2 * read(pipe, "<toy>")
    pipe.unload_textual_inversion("<toy>")
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, table)
    assert pipe.text_encoder.config.vocab_size == len(table) == len(pipe.tokenizer)
    assert read(pipe, "a <toy> backpack") != [plain[0], first, first + 1, first + 2, *plain[1:]]


def test_many_vectors_are_cut_like_other_tokens(pipe, width):
    """The end of a text that is too long is not read, however it comes to be too long."""
    pipe.load_textual_inversion({"<long>": vectors(width, 100)})
    ids = pipe.tokenizer("<long> cat", padding="max_length", truncation=True, max_length=77).input_ids
    first = len(pipe.tokenizer) - 100
    assert ids == [pipe.tokenizer.bos_token_id, *range(first, first + 75), pipe.tokenizer.eos_token_id]
    assert pipe.encode_prompt("<long> cat")[0].shape[1] == 77


def test_words_that_contain_others(pipe, width):
    """The longest word wins; a word of letters is found only where it stands alone."""
    words = {"<cat>": 1, "<cat>-toy": 2, "style": 1, "style-2": 3, "charturnerv2": 2, "bad_prompt": 2}
    pipe.load_textual_inversion({word: vectors(width, n) for word, n in words.items()})
    ids = pipe.tokenizer.learnt_words
    assert {word: len(group) for word, group in ids.items()} == words
    for word in words:
        assert read(pipe, word) == ids[word]
        assert ids[word] == read(pipe, f"a photo, {word}, in a room")[3 : 3 + len(ids[word])] or word[0] == "<"
    assert read(pipe, "<cat>-toy <cat>") == ids["<cat>-toy"] + ids["<cat>"]
    assert ids["style"][0] not in read(pipe, "lifestyle and stylesheet")
    assert ids["charturnerv2"][0] not in read(pipe, "charturnerv23")
    assert read(pipe, "style.") == [*ids["style"], *read(pipe, ".")]
    assert read(pipe, "(style)") == [*read(pipe, "("), *ids["style"], *read(pipe, ")")]


def test_unloading_closes_up(pipe, width):
    """Words that stay keep their vectors under new ids."""
    values = {f"<w{n}>": vectors(width, n, n) for n in (1, 2, 3)}
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    pipe.load_textual_inversion(values)
    pipe.unload_textual_inversion("<w2>")
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    for word in ("<w1>", "<w3>"):
        assert torch.equal(table[read(pipe, word)], values[word])
    pipe.load_textual_inversion({"<w2>": values["<w2>"]})
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight.detach()[read(pipe, "<w2>")], values["<w2>"])
    pipe.unload_textual_inversion()
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, before)
    assert pipe.tokenizer.learnt_words == {}


def test_saved_with_its_words(pipe, width, tmp_path):
    value = vectors(width, 2)
    pipe.load_textual_inversion({"<toy>": value})
    pipe.save_pretrained(tmp_path / "with")
    again = StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "with")
    assert again.tokenizer.learnt_words == pipe.tokenizer.learnt_words
    assert torch.equal(again.encode_prompt("a <toy> backpack")[0], pipe.encode_prompt("a <toy> backpack")[0])


def test_sources(pipe, width, tmp_path):
    """Files, folders, dicts, tensors, lists of them; several words in one file; the file's name as the word."""
    save_file({"emb_params": vectors(width, 2)}, tmp_path / "ukiyoe-e.safetensors")
    torch.save({"string_to_param": {"*": vectors(width)}, "name": "inside"}, tmp_path / "other.pt")
    save_file({"<one>": vectors(width)[0], "<two>": vectors(width, 2)}, tmp_path / "learned_embeds.safetensors")
    pipe.load_textual_inversion([tmp_path / "ukiyoe-e.safetensors", tmp_path / "other.pt", tmp_path])
    pipe.load_textual_inversion([{"a": vectors(width)}, vectors(width)], token=["<three>", "<four>"])
    assert list(pipe.tokenizer.learnt_words) == ["ukiyoe-e", "inside", "<one>", "<two>", "<three>", "<four>"]


def test_negative_prompt_and_half_precision(pipe, width):
    pipe.to(torch.bfloat16)
    pipe.load_textual_inversion({"<bad>": vectors(width, 2)})
    assert pipe.text_encoder.get_input_embeddings().weight.dtype == torch.bfloat16
    with_word = pipe.encode_prompt("a cat", negative_prompt="<bad>")[1]
    assert not torch.equal(with_word, pipe.encode_prompt("a cat", negative_prompt="bad")[1])


def test_another_tokenizer_and_encoder(pipe, width):
    from random_checkpoint import build_pipeline

    other = build_pipeline("tiny")
    pipe.load_textual_inversion({"<toy>": vectors(width)}, tokenizer=other.tokenizer, text_encoder=other.text_encoder)
    assert "<toy>" in other.tokenizer.learnt_words
    assert "<toy>" not in pipe.tokenizer.learnt_words


REFUSED = {
    "wrong width": (lambda w: {"<a>": torch.rand(1, 768)}, {}, "768 channels and are made for Stable Diffusion 1"),
    "XL": (lambda w: {"clip_g": torch.rand(1, 1280), "clip_l": torch.rand(1, 768)}, {}, "made for Stable Diffusion XL"),
    "no word": (lambda w: torch.rand(1, w), {}, "pass token="),
    "spaces": (lambda w: {"two words": torch.rand(1, w)}, {}, "must be one word without spaces"),
    "in the vocabulary": (lambda w: {"!": torch.rand(1, w)}, {}, "'!' is in the vocabulary already"),
    "twice": (lambda w: {"<old>": torch.rand(1, w)}, {}, "'<old>' is learnt already"),
    "twice in other case": (lambda w: {"<OLD>": torch.rand(1, w)}, {}, "'<OLD>' is learnt already"),
    "further token": (lambda w: [{"<x>_1": torch.rand(1, w)}, {"<x>": torch.rand(2, w)}], {}, "already"),
    "twice in a list": (lambda w: [{"<x>": torch.rand(1, w)}] * 2, {}, "given twice"),
    "two words, one token": (
        lambda w: {"<x>": torch.rand(1, w), "<y>": torch.rand(1, w)},
        {"token": "<z>"},
        "has 2 words",
    ),
    "lists that do not pair": (lambda w: [{"<x>": torch.rand(1, w)}], {"token": ["a", "b"]}, "one word for each of 1"),
    "read as a further vector": (lambda w: {"<old>_1": torch.rand(1, w)}, {}, "as a further vector of '<old>'"),
    "sparse": (lambda w: {"<a>": torch.rand(1, w).to_sparse()}, {}, "NaN or infinity"),
    "NaN": (lambda w: {"<a>": torch.full((1, w), float("nan"))}, {}, "NaN or infinity"),
    "shape": (lambda w: {"<a>": torch.rand(1, 2, w)}, {}, "must be .n, "),
    "integers": (lambda w: {"<a>": torch.ones(1, w).int()}, {}, "must be .n, "),
    "no tensor": (lambda w: {"<a>": "text"}, {}, "expected a tensor"),
    "nothing": (lambda w: {}, {}, "expected vectors by word"),
    "missing file": (lambda w: "./nowhere.pt", {}, "is neither a folder nor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_unchanged(pipe, width, case):
    make, more, message = REFUSED[case]
    pipe.load_textual_inversion({"<old>": vectors(width)})
    before = pipe.text_encoder.get_input_embeddings().weight, dict(pipe.tokenizer.learnt_words), len(pipe.tokenizer)
    with pytest.raises((CheckpointError, ValueError), match=message):
        pipe.load_textual_inversion(make(width), **more)
    assert pipe.text_encoder.get_input_embeddings().weight is before[0]
    assert (dict(pipe.tokenizer.learnt_words), len(pipe.tokenizer)) == before[1:]


def test_unknown_word_is_not_unloaded(pipe, width):
    pipe.load_textual_inversion({"<old>": vectors(width)})
    with pytest.raises(ValueError, match="'<new>' was not learnt; the learnt words are <old>"):
        pipe.unload_textual_inversion("<new>")
