"""CLIP's public vocabulary, which comes with the package for checkpoints that bring no tokenizer.

Source: openai/CLIP, clip/simple_tokenizer.py; the file, its origin and its licence (MIT) are in `depthdiff/data`.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from depthdiff.tokenizer import CLIPTokenizer
from depthdiff.tokenizer.bpe import END_OF_WORD

MERGES = Path(__file__).parent.parent / "data" / "clip_merges.txt.gz"
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
"""Bytes that stand for themselves; the others are written as the characters from 256 on."""


def byte_letters() -> list[str]:
    """List the letters of the 256 bytes in the order of their ids: the printable bytes come first."""
    return [chr(byte) for byte in PRINTABLE] + [chr(256 + number) for number in range(256 - len(PRINTABLE))]


def read_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Read the vocabulary: 49408 tokens with their ids, and the merges that make them."""
    merges = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    letters = byte_letters()
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def clip_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer of Stable Diffusion 2: it pads with "!", id 0, and cuts texts to 77 tokens."""
    vocab, merges = read_vocabulary()
    return CLIPTokenizer(vocab, merges, pad_token="!", model_max_length=77)
