r"""Prompts with weights and of any length, in the syntax of AUTOMATIC1111's web UI; off unless a caller asks for it.

`(word)` weighs a word 1.1 times, `[word]` 1 / 1.1 times, `(word:1.3)` 1.3 times; brackets nest. A backslash takes the
meaning from a bracket or a backslash. `BREAK` starts a new chunk.

Source: AUTOMATIC1111/stable-diffusion-webui, wiki, "Features": "Attention/emphasis", "Infinite prompt length", and the
behaviour of its version 1.10.

Letters: B texts, n chunks, L tokens of a chunk with start and end, C channels of the text encoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from depthdiff.checks import brief
from depthdiff.conditioning import encode_tokens

PromptSyntax = Literal["a1111"]
SYNTAXES: tuple[PromptSyntax, ...] = ("a1111",)

BREAK = ("BREAK", math.inf)
"""The mark of a new chunk among the parts of a prompt; the weight of a text is finite."""

EMPHASIS = {")": 1.1, "]": 1 / 1.1}
"""Closing bracket -> the weight of what it closes."""

MAX_WEIGHT = 1000.0
COMMA_REACH = 20
"""How many tokens before the end of a chunk a comma may stand and still end it."""

PIECE = re.compile(
    r"""\\(?P<literal>[()\[\]\\]?)
    | (?P<open>[(\[])
    | :\s{0,9}(?P<weight>[+-]?(?:\d{1,999}(?:\.\d{0,99})?|\.\d{1,99}))\s{0,9}\)
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:]+|:)""",
    re.VERBOSE,
)
NEW_CHUNK = re.compile(r"\bBREAK\b")


class Chunk(NamedTuple):
    """One input of the text encoder.

    Attributes:
        ids: L tokens: the start, those of the text, the end, and padding.
        weights: L numbers, by which the embeddings are multiplied; 1 for start, end and padding.
    """

    ids: list[int]
    weights: list[float]


def check_prompt_syntax(value: object) -> PromptSyntax | None:
    """Return the syntax of the prompts, None for plain text.

    Raises:
        ValueError: an unknown one.
    """
    for known in SYNTAXES:
        if isinstance(value, str) and value == known:
            return known
    if value is not None:
        raise ValueError(f"prompt_syntax must be {' or '.join(map(repr, SYNTAXES))} or None, got {brief(value)}")
    return None


def parse_prompt(text: str) -> list[tuple[str, float]]:
    r"""Split a prompt into parts of one weight each.

    A bracket that is never closed counts to the end; one that was never opened is text, and so are a weight outside of
    round brackets and one that is not a decimal number. A backslash before anything else is dropped.

    Args:
        text: such as `a (red:1.2) cat \(toy\)`.

    Returns:
        (part, weight), neighbours of equal weight joined, with `BREAK` where a new chunk starts, also within brackets.

    Raises:
        ValueError: a weight beyond 1000, brackets around it multiplied.
    """
    parts: list[str | None] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {")": [], "]": []}

    def close(bracket: str, weight: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * one for one in weights[start:]]

    for found in PIECE.finditer(text):
        kind, piece = str(found.lastgroup), found[str(found.lastgroup)]
        if kind == "open":
            opened[")" if piece == "(" else "]"].append(len(parts))
        elif kind == "weight" and opened[")"]:
            close(")", float(piece))
        elif kind == "close" and opened[piece]:
            close(piece, EMPHASIS[piece])
        else:
            first, *others = [piece] if kind == "literal" else _sections(found[0])
            parts += [first, *(one for section in others for one in (None, section))]
            weights += [1.0] * (len(parts) - len(weights))
    for bracket, starts in opened.items():
        while starts:
            close(bracket, EMPHASIS[bracket])
    return _join(parts, weights)


def _sections(text: str) -> list[str]:
    """Split a text where new chunks start, without the spaces there."""
    sections = NEW_CHUNK.split(text)
    last = len(sections) - 1
    sections = [section if i == 0 else section.lstrip() for i, section in enumerate(sections)]
    return [section if i == last else section.rstrip() for i, section in enumerate(sections)]


def _join(parts: Sequence[str | None], weights: Sequence[float]) -> list[tuple[str, float]]:
    """Join neighbours of equal weight; None is the mark of a new chunk."""
    joined: list[tuple[str, float]] = []
    for (marks, weight), group in groupby(zip(parts, weights, strict=True), key=lambda one: (one[0] is None, one[1])):
        texts = [part or "" for part, _ in group]
        if not abs(weight) <= MAX_WEIGHT:
            raise ValueError(
                f"the weight of a part of a prompt must be in [{-MAX_WEIGHT:g}, {MAX_WEIGHT:g}], brackets around it "
                f"multiplied, got {weight:g}; escape brackets that are meant as text: \\("
            )
        joined += [BREAK] * len(texts) if marks else [("".join(texts), weight)]
    return joined or [("", 1.0)]


def chunk_tokens(parsed: Sequence[tuple[str, float]], tokenizer: Any, length: int = 77) -> list[Chunk]:
    """Turn the parts of a prompt into chunks of tokens.

    Each part is tokenized by itself. A chunk that is full ends at its last comma, if that is among its last 20 tokens,
    and what follows the comma moves to the next one. A word of several vectors is never cut in two. Chunks are padded
    as the tokenizer pads, so that a single one is what `tokenizer` makes of a plain text.

    Args:
        parsed: (part, weight), as from `parse_prompt`.
        tokenizer: text to tokens.
        length: L.

    Returns:
        At least one chunk.

    Raises:
        ValueError: a word has more vectors than a chunk has room.
    """
    chunks: list[list[tuple[int, float]]] = [[]]
    room, comma, last_comma = length - 2, _ids(",", tokenizer), -1
    for ids, weight in _units(parsed, tokenizer):
        row, is_comma = chunks[-1], ids == comma
        if len(ids) > room:
            raise ValueError(f"a word of a prompt has {len(ids)} vectors, a chunk of the text encoder holds {room}")
        if weight == math.inf or len(row) + len(ids) > room:
            full = weight != math.inf and len(row) == room and not is_comma
            tail = row[last_comma + 1 :] if full and room - COMMA_REACH <= last_comma >= 0 else []
            row[len(row) - len(tail) :] = []
            chunks += [tail, []] if len(tail) + len(ids) > room else [tail]
            last_comma = -1
        elif is_comma:
            last_comma = len(row)
        chunks[-1] += [(index, weight) for index in ids]
    if len(chunks) > 1 and not chunks[-1]:
        del chunks[-1]
    start, end, *padding = tokenizer([""], padding="max_length", max_length=length, truncation=True).input_ids[0]
    return [
        Chunk(
            [start, *(index for index, _ in row), end, *padding[len(row) :]],
            [1.0, *(weight for _, weight in row), *[1.0] * (length - 1 - len(row))],
        )
        for row in chunks
    ]


def _units(parsed: Sequence[tuple[str, float]], tokenizer: Any) -> Iterator[tuple[list[int], float]]:
    """Yield what is never cut in two, with its weight: one token, or all of a learnt word; none for a new chunk."""
    groups = {ids[0]: ids for ids in getattr(tokenizer, "learnt_words", {}).values()}
    for part, weight in parsed:
        ids, place = [] if weight == math.inf else _ids(part, tokenizer), 0
        if weight == math.inf:
            yield [], weight
        while place < len(ids):
            word = groups.get(ids[place], [])
            unit = word if word and ids[place : place + len(word)] == word else ids[place : place + 1]
            yield unit, weight
            place += len(unit)


def _ids(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text without start and end."""
    return list(tokenizer([text]).input_ids[0])[1:-1]


def fill_up(chunks: Sequence[Chunk], count: int, tokenizer: Any) -> list[Chunk]:
    """Append chunks of the empty text until there are `count`."""
    return [*chunks, *chunk_tokens([("", 1.0)], tokenizer, len(chunks[0].ids)) * (count - len(chunks))]


def count_chunks(rows: Sequence[Sequence[Chunk]], embeds: Sequence[Tensor | None]) -> int:
    """Return how many chunks each of several texts gets: as many as the longest, or as the embeddings beside them.

    Raises:
        ValueError: the embeddings (B, L, C) hold less than the longest text, or are not whole chunks.
    """
    longest, length = max(map(len, rows)), len(rows[0][0].ids)
    for given in (one.shape[1] for one in embeds if one is not None):
        if given % length or given < longest * length:
            raise ValueError(
                f"with `prompt_syntax`, embeddings beside a prompt given as text must have a multiple of {length} "
                f"tokens, and at least the {longest * length} of the text, got {given}; pass both as text, or fill up "
                "the embeddings with those of the empty text"
            )
        longest = given // length
    return longest


def encode_chunks(
    rows: Sequence[Sequence[Chunk]], encoder: Any, device: torch.device, clip_skip: int | None = None
) -> Tensor:
    """Read texts that are chunks already.

    Args:
        rows: B texts of n chunks each.
        encoder: tokens to embeddings, as `depthdiff.CLIPTextModel` or that of transformers.
        device: where the encoder works.
        clip_skip: how many of the encoder's last layers to leave out.

    Returns:
        (B, n L, C).
    """
    read = []
    for chunks in zip(*rows, strict=True):
        tokens = torch.tensor([chunk.ids for chunk in chunks], device=device)
        weights = torch.tensor([chunk.weights for chunk in chunks], device=device)
        read.append(weigh(encode_tokens(tokens, encoder, clip_skip), weights))
    return torch.cat(read, dim=1)


def weigh(embeds: Tensor, weights: Tensor) -> Tensor:
    """Multiply the embeddings of tokens by their weights, and restore the mean of each chunk.

    Args:
        embeds: (B, L, C).
        weights: (B, L), float32; a row of ones leaves its embeddings as they are.

    Returns:
        (B, L, C); NaN or infinity where the weighted embeddings of a chunk have the mean 0.
    """
    exact = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    weighted = exact * weights[:, :, None].to(exact.dtype)
    mean, new_mean = (x.mean(dim=(1, 2), keepdim=True) for x in (exact, weighted))
    changed = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(changed, (weighted * (mean / new_mean)).to(embeds.dtype), embeds)
