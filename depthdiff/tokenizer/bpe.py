"""CLIP's byte-pair encoding, on the `tokenizers` library, its public vocabulary, and what the tokenizer accepts.

A text is normalised (Unicode NFC, single spaces, lower case) and cut into words. A word is written as its UTF-8 bytes,
each byte a printable letter, the last one with an end mark. Then pairs of neighbours are merged in the order that the
checkpoint fixes, until no merge applies (arXiv:1508.07909, algorithm 1).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from depthdiff.checks import brief, check_dense, check_number, show

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""The special tokens, as config files call them."""

END_OF_WORD = "</w>"
WORDS = "|".join(
    (r"<\|startoftext\|>", r"<\|endoftext\|>", "'s|'t|'re|'ve|'m|'ll|'d", r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+")
)
"""The patterns of a word. Source: openai/CLIP, clip/simple_tokenizer.py."""

MERGES = Path(__file__).parent.parent / "data" / "clip_merges.txt.gz"
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
"""Bytes that represent themselves; the others are written as the characters from 256 on."""


def build_bpe(vocab: Mapping[str, int], merges: list[tuple[str, str]], unk_token: str) -> Tokenizer:
    """Build the encoder of plain text, without added tokens."""
    bpe = BPE(dict(vocab), merges, unk_token=unk_token, end_of_word_suffix=END_OF_WORD, fuse_unk=False)
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_merges(merges: Iterable[str | Sequence[str]], vocab: Any) -> list[tuple[str, str]]:
    """Return the merges as pairs of tokens, or refuse what the vocabulary lacks."""
    if not isinstance(vocab, Mapping) or not all(type(i) is int and 0 <= i < 2**32 for i in vocab.values()):
        raise ValueError("vocab must map every token to an id from 0 upwards")
    if not isinstance(merges, (Iterator, Sequence)) or isinstance(merges, str):
        raise TypeError(f"merges must be a list of pairs of tokens, got {show(merges)}")
    pairs = []
    for number, merge in enumerate(merges, 1):
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge if isinstance(merge, Sequence) else ())
        if len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"merge {number} must be two tokens with one space between, got {merge!r}")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise ValueError(f"merge {number}, {' '.join(pair)!r}, needs the token {token!r}, which vocab lacks")
        pairs.append(pair)
    return pairs


def read_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Read CLIP's vocabulary from the package: 49408 tokens with their ids, and the merges that make them.

    Source: openai/CLIP, clip/simple_tokenizer.py; the file, its origin and its licence (MIT) are in `depthdiff/data`.
    """
    merges = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    letters = [chr(byte) for byte in PRINTABLE] + [chr(256 + number) for number in range(256 - len(PRINTABLE))]
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def text_of(token: object, name: str = "token") -> str:
    """Return the text of a token."""
    text = token.content if isinstance(token, AddedToken) else token
    if not isinstance(text, str) or not text:
        raise TypeError(f"{name} must be a text or an AddedToken, got {show(token)}")
    check_unicode(name, text)
    return text


def flags(token: AddedToken) -> dict[str, Any]:
    """Return a token's text and flags, as the files write them."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def as_special(token: str | AddedToken) -> AddedToken:
    """Make a token special; a plain text is then matched as it is written, before lower-casing."""
    return AddedToken(**{**({"content": token} if isinstance(token, str) else flags(token)), "special": True})


def group_words(added: Mapping[int, AddedToken]) -> dict[str, list[int]]:
    """Find the words of textual inversion among added tokens: word -> its id and those of `word_1` and so on."""
    groups: dict[str, list[int]] = {}
    for index, token in sorted(added.items()):
        word, _, number = token.content.rpartition("_")
        if token.special:
            continue
        if word in groups and number == str(len(groups[word])):
            groups[word].append(index)
        else:
            groups[token.content] = [index]
    return groups


# Arguments of the tokenizer


def one_of(name: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    """Return the meaning of a choice."""
    if not isinstance(value, (bool, str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {brief(value)}")
    return choices[value]


def check_unicode(name: str, text: str) -> None:
    """Refuse a text that no tokenizer can read."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} must be valid Unicode, got half of a surrogate pair in {text[:40]!r}")


def read_texts(text: Any) -> list[str]:
    """Read one text or several as a list."""
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else None
    if texts is None or not all(isinstance(one, str) for one in texts):
        found = type(text).__name__ if texts is None else ", ".join(sorted({type(one).__name__ for one in texts}))
        raise TypeError(f"text must be a str or a list of str, got {found}")
    if not texts:
        raise ValueError("text must hold at least one text, got an empty list")
    for one in texts:
        check_unicode("text", one)
    return texts


def read_ids(name: str, value: Any) -> Any:
    """Read one id, (L,) or (B, L) of them, as Python's ints."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0:
        if isinstance(value, Tensor):
            check_dense(name, value)
        value = value.tolist()
    if isinstance(value, Iterator):
        raise TypeError(f"{name} must be an id, or a list, an array or a tensor of them, got {show(value)}")
    if isinstance(value, (list, tuple, range)):
        rows = [read_ids(name, one) for one in value]
        deep = {isinstance(row, list) for row in rows}
        if len(deep) > 1 or any(isinstance(one, list) for row in rows if isinstance(row, list) for one in row):
            raise TypeError(f"{name} must be an id, a list of them, or a list of such lists, got {show(value)}")
        return rows
    return check_number(name, value, 0, 2**32 - 1, whole=True)


def read_words(words: object) -> dict[str, int]:
    """Read words to be learnt: word -> number of its vectors."""
    if not isinstance(words, Mapping) or not all(isinstance(word, str) and word for word in words):
        raise TypeError(f"words must map words to numbers of vectors, got {show(words)}")
    for word in words:
        check_unicode("words", word)
    return {word: check_number(f"words[{word!r}]", count, 1, 1000, whole=True) for word, count in words.items()}
