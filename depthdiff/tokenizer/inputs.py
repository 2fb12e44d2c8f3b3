"""The border of the tokenizer: texts, ids and options of every accepted form, or an error that names the argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken
from torch import Tensor

from depthdiff.checks import brief, check_dense, check_number, show


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


def one_of(name: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    """Return what a choice means.

    Raises:
        ValueError: none of the choices.
    """
    if not isinstance(value, (bool, str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {brief(value)}")
    return choices[value]


def list_added(tokens: Any) -> list[AddedToken]:
    """List the added tokens."""
    added = list(tokens) if isinstance(tokens, (Iterator, Sequence, set, frozenset, Mapping)) else [tokens]
    if not all(isinstance(token, AddedToken) for token in added):
        raise TypeError(f"added_tokens must be AddedTokens, got {show(tokens)}")
    return added


def check_unicode(name: str, text: str) -> None:
    """Refuse a text that no tokenizer can read."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} must be valid Unicode, got half of a surrogate pair in {text[:40]!r}")


def read_texts(text: Any) -> list[str]:
    """Read one text or several as a list.

    Raises:
        TypeError: no texts.
        ValueError: none, or one that is no valid Unicode.
    """
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else None
    if texts is None or not all(isinstance(one, str) for one in texts):
        found = type(text).__name__ if texts is None else ", ".join(sorted({type(one).__name__ for one in texts}))
        raise TypeError(f"text must be a str or a list of str, got {found}")
    if not texts:
        raise ValueError("text must hold at least one text, got an empty list")
    for one in texts:
        check_unicode("text", one)
    return texts


def check_token(name: str, token: object) -> None:
    """Refuse what can be no token with a role.

    Raises:
        TypeError: neither a text nor an AddedToken.
        ValueError: no valid Unicode.
    """
    text = token.content if isinstance(token, AddedToken) else token
    if not isinstance(text, str) or not text:
        raise TypeError(f"{name} must be a text or an AddedToken, got {show(token)}")
    check_unicode(name, text)


def read_words(words: object) -> dict[str, int]:
    """Read words to be learnt, with the numbers of their vectors.

    Raises:
        TypeError: no mapping of texts to whole numbers.
        ValueError: no valid Unicode, or no vectors.
    """
    if not isinstance(words, Mapping) or not all(isinstance(word, str) and word for word in words):
        raise TypeError(f"words must map words to numbers of vectors, got {show(words)}")
    for word in words:
        check_unicode("words", word)
    return {word: check_number(f"words[{word!r}]", count, 1, 1000, whole=True) for word, count in words.items()}
