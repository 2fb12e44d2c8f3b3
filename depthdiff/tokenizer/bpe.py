"""CLIP's byte-pair encoding, on the `tokenizers` library.

A text is brought to one form (Unicode NFC, single spaces, lower case) and cut into words; a word is written as its
UTF-8 bytes, each byte a printable letter, the last one marked as the end; and then pairs of neighbours are merged in
the order that the checkpoint fixes, until no merge applies (arXiv:1508.07909, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from depthdiff.checks import show

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""The special tokens, as config files call them."""

END_OF_WORD = "</w>"
WORDS = "|".join(
    (r"<\|startoftext\|>", r"<\|endoftext\|>", "'s|'t|'re|'ve|'m|'ll|'d", r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+")
)
"""What counts as one word. Source: openai/CLIP, clip/simple_tokenizer.py."""


def build_bpe(vocab: Mapping[str, int], merges: list[tuple[str, str]], unk_token: str) -> Tokenizer:
    """Build the encoder of plain text, without any token that is cut out before it.

    Args:
        vocab: every token and its id.
        merges: the pairs to merge, most wanted first, as `read_merges` returns them.
        unk_token: stands for what the vocabulary cannot spell.
    """
    bpe = BPE(dict(vocab), merges, unk_token=unk_token, end_of_word_suffix=END_OF_WORD, fuse_unk=False)
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_merges(merges: Iterable[str | Sequence[str]], vocab: Any) -> list[tuple[str, str]]:
    """Return the merges as pairs.

    Args:
        merges: each two tokens, or both in one text with a space between.
        vocab: must hold what they take and make.

    Raises:
        ValueError: merges and vocabulary do not fit together, or one of them is of another form.
    """
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


def text_of(token: str | AddedToken) -> str:
    """Return the text of a token."""
    return token if isinstance(token, str) else token.content


def as_special(token: str | AddedToken) -> AddedToken:
    """Make a token special; a plain text is then looked for as it is written, before lower-casing."""
    return (
        AddedToken(token, special=True) if isinstance(token, str) else AddedToken(**{**flags(token), "special": True})
    )


def flags(token: AddedToken) -> dict[str, Any]:
    """Return a token's text and flags, as the files write them."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


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
