"""Token ids beside transformers' CLIPTokenizer: for every layout of files, on 500 generated and nasty texts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer as Reference

from depthdiff.tokenizer import CLIPTokenizer, clip_tokenizer

DATA = Path(__file__).parents[1] / "data" / "tokenizer"

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PLAIN = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
SD2_CONFIG = {
    "add_prefix_space": False,
    "bos_token": {"__type": "AddedToken", "content": BOS, **PLAIN},
    "do_lower_case": True,
    "eos_token": {"__type": "AddedToken", "content": EOS, **PLAIN},
    "errors": "replace",
    "model_max_length": 77,
    "name_or_path": "a/b",
    "pad_token": EOS,
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": {"__type": "AddedToken", "content": EOS, **PLAIN},
}
SD2_ROLES = {
    "bos_token": {"content": BOS, **PLAIN},
    "eos_token": {"content": EOS, **PLAIN},
    "pad_token": "!",
    "unk_token": {"content": EOS, **PLAIN},
}
LISTED = {
    "0": {"content": "!", **PLAIN, "special": True},
    "963": {"content": BOS, **PLAIN, "normalized": False, "special": True},
    "964": {"content": EOS, **PLAIN, "normalized": False, "special": True},
}
STRINGS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
LAYOUTS = {
    "stable diffusion 2": {"tokenizer_config.json": SD2_CONFIG, "special_tokens_map.json": SD2_ROLES},
    "clip": {
        "tokenizer_config.json": {**SD2_CONFIG, "pad_token": EOS},
        "special_tokens_map.json": {**SD2_ROLES, "pad_token": EOS},
    },
    "vocabulary alone": {},
    "no special tokens map": {"tokenizer_config.json": {**STRINGS, "pad_token": "!", "model_max_length": 40}},
    "newer, which overrules the map": {
        "tokenizer_config.json": {**STRINGS, "pad_token": "!", "added_tokens_decoder": LISTED, "model_max_length": 77},
        "special_tokens_map.json": {**STRINGS, "pad_token": EOS},
    },
    "added tokens": {
        "tokenizer_config.json": SD2_CONFIG,
        "special_tokens_map.json": SD2_ROLES,
        "added_tokens.json": {"<cat-toy>": 965, "Moon Gate": 966},
    },
    "other special tokens": {
        "tokenizer_config.json": {"model_max_length": 16, "bos_token": "<s>", "eos_token": "</s>"},
        "special_tokens_map.json": {"unk_token": "<unk>", "pad_token": "<pad>"},
    },
    "extra special tokens": {
        "tokenizer_config.json": {**SD2_CONFIG, "additional_special_tokens": ["[A]", "photo"]},
        "special_tokens_map.json": SD2_ROLES,
    },
}
WHOLE = ["tokenizer.json", "tokenizer.json wins over the pair"]

NASTY = [
    "",
    " ",
    " \t\r\n\u3000\u2028\x0b\x85\xa0 ",
    "!",
    "!!!",
    "wow!!! cat ! !dog!a",
    "a cat" * 400,
    "x" * 3000,
    "🐱" * 100,
    f"{BOS} a {EOS} b{EOS}c {EOS}{EOS}",
    "<|ENDOFTEXT|> <|StartOfText|> <|endoftext| > <|endoftext",
    "it's they're WE'VE don't I'LL he'd 'tis ''s 's",
    "İstanbul ıI ǅ ß ẞ ﬁ ﬀ Σας ΣΑΣ",
    "e\u0301 \u00e9 A\u030a \u212b a\u0323\u0307 a\u0307\u0323 \u1100\u1161\u11a8 각",
    "zero\u200bwidth\u200djoin\u200cer\ufeff \u2060 soft\u00adhyphen",
    "日本語の写真 東京 中文测试，한국어 ไทย हिन्दी العربية עברית",
    "👩‍👩‍👧 🇩🇪 ❤️ ✨ 🏳️‍🌈 \U0001f9d1\U0001f3fd",
    "\x00 a\x00b \x01\x02 \x7f \x1b[0m \ufffd \U0010ffff \ufffe",
    "&amp; &lt;b&gt; &#39; <b>bold</b> &nbsp;",
    "1234567890 3.14 ½ ² ① Ⅷ ٣ 1,000,000",
    "(((best quality))) [low:high:0.5] {a|b} a_b-c+d=e/f\\g @x #y 100% 5€ $3",
    "“quotes” ‘single’ — – … ‹› «»",
    "MiXeD CaSe CamelCase ALLCAPS",
    "<s> </s> <pad> <unk> [A] photo photograph moon gate Moon Gate <cat-toy><CAT-TOY>",
    "a</w> </w> Ġa ĥ",
    "moon  gate moon\ngate Moon\u00a0Gate",
]


def texts() -> list[str]:
    """500 texts: the nasty ones, random Unicode from all planes, and random mixtures of words and oddities."""
    rng = random.Random(0)
    ranges = [(32, 126), (0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x1FFF), (0x2000, 0x33FF)]
    ranges += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF)]
    words = ["a", "photo", "CAT", "Bär", "night", "it's", "3", "42", "!", ",", "...", "東京", "ночью", "🐱", "\u200b"]
    words += ["of", "cat", "coffee", "\u0301", "é", EOS]
    result = list(NASTY)
    while len(result) < 500:
        if len(result) % 2:
            pool = rng.sample(ranges, rng.randint(1, 3))
            codes = (rng.randint(*rng.choice(pool)) for _ in range(rng.randint(1, 60)))
            result.append("".join(chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF))
        else:
            result.append(rng.choice((" ", "", "  ")).join(rng.choices(words, k=rng.randint(1, 90))))
    return result


TEXTS = texts()


def write_layout(folder: Path, name: str) -> Path:
    shutil.copytree(DATA, folder, dirs_exist_ok=True)
    for file, content in LAYOUTS.get(name, LAYOUTS["stable diffusion 2"]).items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    if name in WHOLE:
        whole = folder / "whole"
        Reference.from_pretrained(folder).save_pretrained(whole)
        if name == WHOLE[1]:
            (whole / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
            (whole / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return whole
    return folder


@pytest.fixture(scope="module", params=[*LAYOUTS, *WHOLE])
def pair(request, tmp_path_factory):
    folder = write_layout(tmp_path_factory.mktemp("tokenizer"), request.param)
    return CLIPTokenizer.from_pretrained(folder), Reference.from_pretrained(folder)


def test_ids_equal(pair):
    ours, reference = pair
    different = [text for text in TEXTS if ours(text).input_ids != reference(text).input_ids]
    assert len(TEXTS) == 500
    assert not different, f"{len(different)} differ, first {different[0]!r}"


def test_tokens_and_text_equal(pair):
    ours, reference = pair
    for text in TEXTS:
        ids = reference(text).input_ids
        assert ours.tokenize(text) == reference.tokenize(text)
        assert ours.convert_ids_to_tokens(ids) == reference.convert_ids_to_tokens(ids)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)
            assert ours.convert_ids_to_tokens(ids, skip) == reference.convert_ids_to_tokens(ids, skip)
    batch = reference(TEXTS[20:30], padding=True, return_tensors="pt").input_ids
    assert ours.batch_decode(batch, skip_special_tokens=True) == reference.batch_decode(batch, skip_special_tokens=True)
    assert ours.decode(5) == reference.decode(5)


OPTIONS = [
    {"padding": padding, "truncation": truncation, "max_length": length}
    for padding in (False, True, "longest", "max_length", "do_not_pad")
    for truncation in (None, True, False, "longest_first", "do_not_truncate")
    for length in (None, 2, 3, 12)
]


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
def test_padding_and_truncation_equal(pair):
    ours, reference = pair
    some = [*NASTY[:6], *NASTY[9:12], *TEXTS[100:103]]
    for options in OPTIONS:
        for special in (True, False):
            a = ours(some, add_special_tokens=special, **options)
            b = reference(some, add_special_tokens=special, **options)
            assert (a.input_ids, a["attention_mask"]) == (b.input_ids, b["attention_mask"]), options
            one = ours.encode(some[5], add_special_tokens=special, **options)
            assert one == reference.encode(some[5], add_special_tokens=special, **options)
    a, b = (one(some, padding="max_length", max_length=77, truncation=True, return_tensors="pt") for one in pair)
    assert a.input_ids.dtype == b.input_ids.dtype and torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a[1], b.attention_mask)
    a, b = (one(some, padding=True, return_tensors="np") for one in pair)
    assert a.input_ids.dtype == b.input_ids.dtype and (a.input_ids == b.input_ids).all()


def test_attributes_equal(pair):
    ours, reference = pair
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, name) == getattr(reference, name)
        assert getattr(ours, name + "_id") == getattr(reference, name + "_id")
    assert ours.get_vocab() == reference.get_vocab()
    assert (len(ours), ours.vocab_size) == (len(reference), reference.vocab_size)
    assert ours.model_max_length == reference.model_max_length
    assert set(ours.all_special_ids) == set(reference.all_special_ids)
    tokens = ["a</w>", "cat</w>", "nothing of the kind", "!", ours.eos_token]
    assert ours.convert_tokens_to_ids(tokens) == reference.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("a</w>") == reference.convert_tokens_to_ids("a</w>")


def test_what_we_save_the_reference_loads(pair, tmp_path):
    ours, reference = pair
    ours.save_pretrained(tmp_path)
    for loaded in (Reference.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)):
        assert [loaded(text).input_ids for text in TEXTS] == [reference(text).input_ids for text in TEXTS]
        assert (loaded.pad_token_id, loaded.model_max_length) == (reference.pad_token_id, reference.model_max_length)
        assert loaded.get_vocab() == reference.get_vocab()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_exclamation_marks_of_stable_diffusion_2(tmp_path):
    folder = write_layout(tmp_path, "stable diffusion 2")
    ours, reference = CLIPTokenizer.from_pretrained(folder), Reference.from_pretrained(folder)
    assert ours.pad_token_id == reference.pad_token_id == 0
    ids = ours("wow!!! cat", padding="max_length", max_length=20).input_ids
    assert ids == reference("wow!!! cat", padding="max_length", max_length=20).input_ids
    assert ids.count(0) == 20 - sum(ours("wow cat").attention_mask)


@pytest.mark.parametrize("known", [[], ["<toy>"]])
def test_a_new_word_of_several_tokens(tmp_path, known):
    """As textual inversion trains one: `<toy>`, `<toy>_1`, ..., all written out in its captions."""
    ours = clip_tokenizer()
    ours.save_pretrained(tmp_path)
    theirs = Reference.from_pretrained(tmp_path)
    words = ["<toy>", "<toy>_1", "<toy>_2"]
    for tokenizer in (ours, theirs):
        assert tokenizer.add_tokens(known) == len(known)
        assert tokenizer.add_tokens(words) == len(words) - len(known)
    ids = ours.convert_tokens_to_ids(words)
    assert ids == theirs.convert_tokens_to_ids(words)
    written = " ".join(ours.convert_ids_to_tokens(ids))
    texts = [f"a photo of {written}", f"{written} in the style of {written} again", f"a cropped {written}, clean"]
    assert ours(texts).input_ids == theirs(texts).input_ids
    assert ours("a <toy>").input_ids == ours(f"a {written}").input_ids, "alone it means all of its vectors"
    ours.save_pretrained(tmp_path / "grown")
    for again in (CLIPTokenizer.from_pretrained(tmp_path / "grown"), Reference.from_pretrained(tmp_path / "grown")):
        assert len(again) == len(theirs)
        assert again(texts).input_ids == theirs(texts).input_ids


def test_tokens_added_and_ids_padded_as_in_transformers(tmp_path):
    """As a training script does: a new token, a longer table, batches of ids."""
    ours = clip_tokenizer()
    ours.save_pretrained(tmp_path)
    theirs = Reference.from_pretrained(tmp_path)
    for tokenizer in (ours, theirs):
        assert tokenizer.add_tokens(["<toy>"]) == 1
        assert tokenizer.add_tokens("<toy>") == 0
    assert len(ours) == len(theirs)
    assert ours.added_tokens_encoder["<toy>"] == theirs.added_tokens_encoder["<toy>"]
    assert ours("a <toy> here").input_ids == theirs("a <toy> here").input_ids
    batch = {"input_ids": [ours("a").input_ids, ours("a <toy> and more").input_ids]}
    for options in ({"padding": True}, {"padding": "max_length", "max_length": 20}):
        one, two = (tokenizer.pad(batch, return_tensors="pt", **options) for tokenizer in (ours, theirs))
        assert one.input_ids.equal(two.input_ids) and one.attention_mask.equal(two.attention_mask)
