"""A tokenizer's published files, read and written."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from depthdiff.checkpoint.hub import read_json
from depthdiff.checkpoint.transaction import check_folder
from depthdiff.checkpoint.write import write_text
from depthdiff.config import CheckpointError
from depthdiff.tokenizer.bpe import END_OF_WORD, ROLES, flags

logger = logging.getLogger(__name__)

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES = ("tokenizer.json", "vocab.json", "merges.txt", *SETTINGS)


def read_tokenizer(cls: type[Any], folder: Path) -> Any:
    """Build a tokenizer from the files in `folder`, or raise CheckpointError."""
    source: Path = folder / "tokenizer.json"
    listed: list[Any] = []
    if source.is_file():
        tokenizer = read_json(source)
        model, listed = tokenizer.get("model"), tokenizer.get("added_tokens") or []
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            raise CheckpointError(f"{source} holds no byte-pair model; it is damaged or of another kind of tokenizer")
        vocab, merges = model.get("vocab") or {}, model["merges"]
    else:
        source = folder / "merges.txt"
        vocab = read_json(folder / "vocab.json")
        try:
            lines = [line.rstrip("\r") for line in source.read_text(encoding="utf-8").split("\n")]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source} cannot be read: {error}") from error
        merges = [line for line in lines if line and not line.startswith("#version")]
    try:
        built = cls(vocab, merges, **_read_settings(folder, listed))
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{source} is damaged or does not fit the files beside it: {error}") from error
    made = {left + right for left, right in built.merges}
    unmade = sum(len(token.removesuffix(END_OF_WORD)) > 1 and token not in made for token in vocab)
    if unmade > len(vocab) // 10:
        logger.warning("%s: no merge makes %d of %d tokens; is the file complete?", source, unmade, len(vocab))
    return built


def write_tokenizer(tokenizer: Any, save_directory: str | os.PathLike[str]) -> None:
    """Write a tokenizer into files that transformers and `read_tokenizer` load with equal ids."""
    folder = check_folder("save_directory", save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    added, roles = tokenizer.added_tokens_decoder, tokenizer.special_tokens_map
    config = {
        "added_tokens_decoder": {str(i): flags(token) for i, token in sorted(added.items())},
        **roles,
        "model_max_length": tokenizer.model_max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    vocab = dict(sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]))
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.merges)
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "#version: 0.2\n" + merges)
    write_text(folder / "special_tokens_map.json", json.dumps(roles, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _read_settings(folder: Path, listed: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the constructor's other arguments; `listed` are the added tokens of `tokenizer.json`."""
    config, roles, numbers = (read_json(folder / name) if (folder / name).is_file() else {} for name in SETTINGS)
    if "added_tokens_decoder" in config:  # a newer file, which lists all
        added = {int(i): _token(value) for i, value in config["added_tokens_decoder"].items()}
    else:
        config = {**config, **roles}
        special = {_token(config[name]).content for name in ROLES if config.get(name)}
        added = {i: AddedToken(t, normalized=t not in special, special=t in special) for t, i in numbers.items()}
        added |= {record["id"]: _token(record) for record in listed}
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise CheckpointError(f"{folder}: {side} is {config[side]!r}; implemented here: 'right'")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    ordered = [token for _, token in sorted(added.items())]
    known = {token.content for token in ordered}
    ordered += [token for token in map(_token, extra) if token.content not in known]
    limit = config.get("model_max_length")
    return {
        **{name: _token(config[name]) for name in ROLES if config.get(name)},
        "model_max_length": None if limit is None else int(limit),
        "added_tokens": ordered,
    }


def _token(value: Any) -> AddedToken:
    """Read a token as the files write it: a text, or an object with flags."""
    given: dict[str, Any] = {"content": value} if isinstance(value, str) else value
    return AddedToken(**{"special": True, **{key: flag for key, flag in given.items() if key not in ("__type", "id")}})
