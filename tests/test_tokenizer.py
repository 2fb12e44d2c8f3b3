"""The tokenizer alone: round trips, options, damaged files, wrong arguments."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from depthdiff.config import CheckpointError
from depthdiff.tokenizer import CLIPTokenizer

DATA = Path(__file__).parent / "data" / "tokenizer"
LETTERS = "abdehilnorstuw"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DATA, tmp_path / "tokenizer"))


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(DATA)


def hand_made(**options):
    """Three merges that can be followed by hand."""
    letters = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    made = ["er</w>", "lo", "lower</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate([*letters, "w er</w>".replace(" ", ""), *made])}
    return CLIPTokenizer(vocab, ["e r</w>", ("l", "o"), "w er</w>", ("lo", "wer</w>")], **options)


def test_merges_in_order():
    tokenizer = hand_made()
    assert tokenizer.tokenize("lower") == ["lower</w>"]
    assert tokenizer.tokenize("LOWER\n slower") == ["lower</w>", "s", "lower</w>"]
    assert tokenizer.tokenize("lowers er loe") == ["lo", "w", "e", "r", "s</w>", "er</w>", "lo", "e</w>"]


def test_words(tokenizer):
    words = ["it", "'s", "4", "2", ",", "they", "'re", "日本", "a", "!!)"]
    tokens = tokenizer.tokenize("It's 42, THEY're\t日本 a!!)")
    assert "".join(tokens).count("</w>") == len(words)
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(tokens)) == " ".join(words)


def test_start_end_padding_and_truncation(tokenizer):
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    body = tokenizer("a photo of a cat", add_special_tokens=False).input_ids
    assert tokenizer("a photo of a cat").input_ids == [start, *body, end]
    long = tokenizer(["a photo of a cat", ""], padding="max_length", max_length=9, truncation=True)
    assert long.input_ids == [[start, *body, end, *[pad] * (7 - len(body))], [start, end, *[pad] * 7]]
    assert long.attention_mask == [[1] * (len(body) + 2) + [0] * (7 - len(body)), [1, 1] + [0] * 7]
    cut = tokenizer("a photo of a cat", truncation=True, max_length=4).input_ids
    assert cut == [start, *body[:2], end]


def test_tensors_and_record(tokenizer):
    batch = tokenizer(["a cat", "a photo of two cats"], padding=True, return_tensors="pt")
    assert batch.input_ids.dtype == torch.int64
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, int(batch[1].shape[1])]
    assert torch.equal(batch.to("cpu").input_ids, batch.input_ids)
    assert list(dict(**batch)) == ["input_ids", "attention_mask"], "as model(**batch) needs it"
    array = tokenizer("a cat", return_tensors="np").input_ids
    assert isinstance(array, np.ndarray) and array.shape == (1, 4)


def test_text_survives_the_round_trip(tokenizer):
    rng = random.Random(1)
    pool = [*range(0x61, 0x7B), *range(0xE0, 0xF7), *range(0x430, 0x450), *range(0x4E00, 0x4F00), 0x1F431]
    for _ in range(200):
        words = ["".join(chr(rng.choice(pool[:26])) for _ in range(rng.randint(1, 9))) for _ in range(4)]
        words += [
            "".join(chr(rng.choice(pool[26:-1])) for _ in range(rng.randint(1, 9))).replace("×", "x") for _ in "12"
        ]
        text = " ".join(words)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(torch.tensor([ids]), skip_special_tokens=True) == [text]
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids[1:-1]
        assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids


def test_the_batch_does_not_change_a_text(tokenizer):
    texts = ["a cat", "!!!", "", "東京の夜 " * 40, "it's " * 90]
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    together = tokenizer(texts, **options).input_ids
    assert together == [tokenizer(text, **options).input_ids for text in texts]
    assert {len(row) for row in together} == {77}


def test_special_tokens_are_cut_out():
    tokenizer = hand_made(added_tokens=[AddedToken("<toy>", normalized=False)], pad_token="e")
    assert tokenizer.tokenize("lo<toy>wer") == ["l", "o</w>", "<toy>", "w</w>", "e", "r</w>"]
    assert tokenizer("<toy>").input_ids[1] == len(tokenizer) - 1 == tokenizer.vocab_size
    assert tokenizer.tokenize("E <|ENDOFTEXT|>")[0] == "e</w>", "a plain text is looked for as it is written"
    assert tokenizer.decode(tokenizer.encode("lo <toy> e"), skip_special_tokens=True) == "lo <toy>"
    assert tokenizer.convert_tokens_to_ids("unheard of") == tokenizer.unk_token_id == tokenizer.eos_token_id


def test_save_and_load(tmp_path):
    tokenizer = hand_made(added_tokens=[AddedToken("<toy>")], pad_token="e", model_max_length=5)
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    loaded = CLIPTokenizer.from_pretrained(tmp_path / "new", subfolder="folder")
    text = "lower <toy> one er lowest"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.model_max_length, loaded.pad_token, len(loaded)) == (5, "e", len(tokenizer))
    assert json.loads((tmp_path / "new/folder/vocab.json").read_text()) == tokenizer.get_vocab(with_added_tokens=False)


def replace_line(path, number, line):
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[number] = line
    path.write_text("\n".join(lines), encoding="utf-8")


DAMAGE = {
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), "vocab.json"),
    "no merges": (lambda f: (f / "merges.txt").unlink(), "merges.txt"),
    "truncated vocabulary": (lambda f: (f / "vocab.json").write_bytes(b'{"!": 0, "a'), "vocab.json"),
    "vocabulary of another kind": (lambda f: (f / "vocab.json").write_text('["a", "b"]'), "vocab.json"),
    "ids that are no numbers": (lambda f: (f / "vocab.json").write_text('{"a": "0"}'), "vocab"),
    "merge of one token": (lambda f: replace_line(f / "merges.txt", 9, "abc"), "merges.txt.*merge 9"),
    "merge of three tokens": (lambda f: replace_line(f / "merges.txt", 9, "a b c"), "merges.txt.*merge 9"),
    "merge that the vocabulary lacks": (lambda f: replace_line(f / "merges.txt", 3, "q z"), "merges.txt.*'qz'"),
    "merges that are no text": (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe\x00"), "merges.txt"),
    "damaged settings": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
    "damaged map": (lambda f: (f / "special_tokens_map.json").write_text("nothing"), "special_tokens_map.json"),
    "a token that is none": (lambda f: (f / "special_tokens_map.json").write_text('{"pad_token": 3}'), "damaged"),
    "padding on the left": (lambda f: (f / "tokenizer_config.json").write_text('{"padding_side": "left"}'), "'left'"),
    "whole file without a model": (lambda f: (f / "tokenizer.json").write_text('{"model": {}}'), "tokenizer.json"),
    "truncated whole file": (lambda f: (f / "tokenizer.json").write_text('{"model": '), "tokenizer.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(folder, case):
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        CLIPTokenizer.from_pretrained(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        CLIPTokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        CLIPTokenizer.from_pretrained(tmp_path)


def test_incomplete_merges_are_reported(folder, caplog):
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    (folder / "merges.txt").write_text("\n".join(lines[: len(lines) // 2]), encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder)
    assert "complete?" in caplog.text


WRONG = {
    "None": (TypeError, "text must be a str or a list of str, got NoneType", {"text": None}),
    "a number among texts": (TypeError, "got int, str", {"text": ["a", 3]}),
    "no text": (ValueError, "at least one", {"text": []}),
    "half a surrogate pair": (ValueError, "surrogate", {"text": "a\ud800"}),
    "padding": (ValueError, "padding must be one of .*'max_length', got 'max'", {"text": "a", "padding": "max"}),
    "truncation": (ValueError, "truncation must be one of", {"text": "a", "truncation": 3}),
    "return_tensors": (ValueError, "return_tensors must be one of .*'pt'", {"text": "a", "return_tensors": "tf"}),
    "no room": (ValueError, "max_length .* got 1", {"text": "a", "truncation": True, "max_length": 1}),
    "ragged": (ValueError, "padding=True", {"text": ["a", "a cat of"], "return_tensors": "pt"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(tokenizer, case):
    error, message, options = WRONG[case]
    with pytest.raises(error, match=message):
        tokenizer(**options)


def test_wrong_pair():
    with pytest.raises(ValueError, match="merge 1, 'a b', needs the token 'ab'"):
        CLIPTokenizer({"a": 0, "b": 1}, ["a b"])
    with pytest.raises(ValueError, match="vocab must map"):
        CLIPTokenizer({"a": -1}, [])
