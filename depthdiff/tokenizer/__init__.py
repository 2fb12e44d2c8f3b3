"""CLIP's tokenizer: start, end, padding and truncation around the byte-pair encoding of `bpe.py`.

Letters: B prompts, L tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tokenizers import AddedToken

from depthdiff.arguments import NO_WEIGHTS, SAVING, sort_out
from depthdiff.checkpoint.hub import fetch
from depthdiff.checks import check_flag, check_names, check_number, check_path, show
from depthdiff.config import BaseOutput
from depthdiff.tokenizer import bpe
from depthdiff.tokenizer.bpe import one_of, read_ids, read_texts, text_of
from depthdiff.tokenizer.files import FILES, read_tokenizer, write_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_TOKENS = 2**20
UNLIMITED = int(1e30)
"""`model_max_length` of a tokenizer whose files name none, as in transformers."""

PADDING: dict[Any, str] = {False: "", "do_not_pad": "", True: "longest", "longest": "longest", "max_length": "limit"}
TRUNCATION: dict[Any, bool] = {None: False, False: False, "do_not_truncate": False, True: True, "longest_first": True}


@dataclass
class BatchEncoding(BaseOutput):
    """The tokenizer's result.

    Attributes:
        input_ids: (B, L) int64 tensor or array; or lists, flat for a single text.
        attention_mask: of the same form, 1 on the text with its start and end, 0 on padding.
    """

    input_ids: Any
    attention_mask: Any = None

    def to(self, device: torch.device | str) -> BatchEncoding:
        """Return the same tensors on `device`."""
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


class CLIPTokenizer:
    """CLIP's tokenizer, with the interface and the ids of transformers' class of that name.

    A special token is matched wherever its text occurs in a prompt. Stable Diffusion 2 pads with "!", so every "!" of
    a prompt becomes id 0, not the "!</w>" of the vocabulary.

    Args:
        vocab: every token and its id.
        merges: the pairs to merge, in order; each two tokens, or both in one text "left right".
        bos_token: put before every text; a text, or an `AddedToken` with flags.
        eos_token: put after every text.
        unk_token: replaces what the vocabulary cannot spell.
        pad_token: fills the short texts of a batch.
        model_max_length: L that the text encoder takes; unlimited if None.
        added_tokens: tokens that are matched before the byte pairs; what `vocab` lacks gets the next ids.

    Attributes:
        bos_token_id: and `eos_token_id`, `unk_token_id`, `pad_token_id`: the ids of these tokens.

    Raises:
        ValueError: `vocab` and `merges` do not fit together.
    """

    padding_side = truncation_side = "right"

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Iterable[str | Sequence[str]],
        *,
        bos_token: str | AddedToken = "<|startoftext|>",
        eos_token: str | AddedToken = "<|endoftext|>",
        unk_token: str | AddedToken = "<|endoftext|>",
        pad_token: str | AddedToken = "<|endoftext|>",
        model_max_length: int | None = None,
        added_tokens: Iterable[AddedToken] = (),
    ) -> None:
        roles = (bos_token, eos_token, unk_token, pad_token)
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = map(text_of, roles, bpe.ROLES)
        longest = UNLIMITED if model_max_length is None else model_max_length
        self.model_max_length = check_number("model_max_length", longest, 1, whole=True)
        self.merges = bpe.read_merges(merges, vocab)
        self._backend = bpe.build_bpe(vocab, self.merges, self.unk_token)
        texts = self.special_tokens_map.values()
        several = isinstance(added_tokens, (Iterator, Sequence, set, frozenset, Mapping))
        listed: list[Any] = list(added_tokens) if several else [added_tokens]
        if not all(isinstance(token, AddedToken) for token in listed):
            raise TypeError(f"added_tokens must be AddedTokens, got {show(added_tokens)}")
        added = [bpe.as_special(token) if token.content in texts else token for token in listed]
        known = {token.content for token in added}
        self._backend.add_tokens(
            added + [bpe.as_special(token) for token, text in zip(roles, texts, strict=True) if text not in known]
        )
        self._vocab = vocab
        self._learnt = bpe.group_words(self.added_tokens_decoder)
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = map(
            self.convert_tokens_to_ids, texts
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tokens, model_max_length={self.model_max_length})"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **unused: Any,
    ) -> Self:
        """Load the tokenizer from a folder or from the Hub.

        `tokenizer.json` is read if there is one, else `vocab.json` and `merges.txt`. As in transformers,
        `special_tokens_map.json` overrides `tokenizer_config.json`, unless the latter has an `added_tokens_decoder`.

        Args:
            pretrained_model_name_or_path: a folder that holds the files, or a Hub id.
            subfolder: of the folder or repository, such as "tokenizer".
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored; huggingface_hub's own cache if absent.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.
            **unused: an argument of diffusers or transformers in `depthdiff.arguments.NO_WEIGHTS`.

        Raises:
            CheckpointError: a file is missing or damaged.
            TypeError: an unknown argument.
        """
        token = sort_out(cls.from_pretrained, NO_WEIGHTS, {"token": token, **unused}, ("token",))["token"]
        folder = fetch(
            pretrained_model_name_or_path, (), optional=FILES, subfolder=subfolder, revision=revision,
            cache_dir=cache_dir, token=token, local_files_only=local_files_only, force_download=force_download,
        )  # fmt: skip
        return read_tokenizer(cls, folder)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **unused: Any) -> None:
        """Write the vocabulary, the merges and the special tokens into files that transformers loads with equal ids.

        Args:
            save_directory: the folder; made if it does not exist.
            **unused: arguments of diffusers in `depthdiff.arguments.SAVING`.

        Raises:
            TypeError: an unknown argument.
        """
        sort_out(self.save_pretrained, SAVING, unused)
        check_path("save_directory", save_directory)
        write_tokenizer(self, save_directory)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | Literal["longest", "max_length", "do_not_pad"] = False,
        truncation: bool | Literal["longest_first", "do_not_truncate"] | None = None,
        max_length: int | None = None,
        return_tensors: Literal["pt", "np"] | None = None,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """Turn texts into ids.

        Args:
            text: one text or several.
            padding: False; True or "longest" to the longest of the batch; "max_length" to `max_length`.
            truncation: whether a text is cut to `max_length`; if None, only where that is given without padding.
            max_length: L, start and end included; `model_max_length` if absent.
            return_tensors: "pt" for tensors, "np" for arrays, None for lists.
            add_special_tokens: whether to put the start and the end around each text.

        Returns:
            `.input_ids` and `.attention_mask`, (B, L) int64; lists if `return_tensors` is None, flat for a single text.

        Raises:
            TypeError: `text` is not a text.
            ValueError: an unknown option, no text, or texts of different lengths for one tensor.
        """
        texts = read_texts(text)
        cut = one_of("truncation", truncation, TRUNCATION)
        one_of("return_tensors", return_tensors, dict.fromkeys((None, "pt", "np")))
        cut = cut or (truncation is None and max_length is not None and padding is False)
        add_special_tokens = check_flag("add_special_tokens", add_special_tokens)
        limit = self._limit(padding, max_length)
        room = limit - (2 if add_special_tokens else 0)
        if cut and room < 0:
            raise ValueError(f"max_length must leave room for the start and the end of a text, 2 tokens, got {limit}")
        rows = [self._spell_out(self._backend.encode(one, add_special_tokens=False).ids) for one in texts]
        rows = [row[:room] for row in rows] if cut else rows
        if add_special_tokens:
            rows = [[self.bos_token_id, *row, self.eos_token_id] for row in rows]
        batch = self._batch(rows, padding, limit, return_tensors)
        if return_tensors is None and isinstance(text, str):
            return BatchEncoding(batch.input_ids[0], batch.attention_mask[0])
        return batch

    def _limit(self, padding: Any, max_length: Any) -> int:
        """Return the largest number of tokens of a text."""
        limit = self.model_max_length if max_length is None else check_number("max_length", max_length, 0, whole=True)
        if one_of("padding", padding, PADDING) == "limit" and UNLIMITED > limit > MAX_TOKENS:
            raise ValueError(f"max_length must be at most {MAX_TOKENS} where texts are padded to it, got {limit:.3g}")
        return limit

    def _batch(self, rows: list[list[int]], padding: Any, limit: int, return_tensors: Any) -> BatchEncoding:
        """Pad rows of ids, and return them as lists, tensors or arrays."""
        pad = PADDING[padding]
        length = max(map(len, rows)) if pad == "longest" else limit if pad and limit < UNLIMITED else 0
        masks = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        rows = [row + [self.pad_token_id] * (length - len(row)) for row in rows]
        if return_tensors is None:
            return BatchEncoding(rows, masks)
        if len({len(row) for row in rows}) > 1:
            lengths = ", ".join(str(len(row)) for row in rows[:8])
            raise ValueError(f"text makes rows of {lengths} ids, no tensor; pass padding=True and truncation=True")
        ids, mask = np.array(rows, dtype=np.int64), np.array(masks, dtype=np.int64)
        if return_tensors == "np":
            return BatchEncoding(ids, mask)
        return BatchEncoding(torch.from_numpy(ids), torch.from_numpy(mask))

    def encode(self, text: str, **options: Any) -> Any:
        """Return the ids of one text: `.input_ids` of `__call__` with the same options."""
        return self(text, **options).input_ids

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text, without start and end; a word's last token ends in "</w>"."""
        return self._backend.encode(read_texts(text)[0], add_special_tokens=False).tokens

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        """Turn ids back into text, in lower case and with a space after every word.

        Args:
            token_ids: one id, (L,) ids, or (B, L) of them; list, array or tensor.
            skip_special_tokens: leave out the start, the end and the padding.

        Returns:
            One text, or a list of B.
        """
        ids = read_ids("token_ids", token_ids)
        ids = [ids] if isinstance(ids, int) else ids
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens) for row in ids]
        text = self._backend.decode(ids, skip_special_tokens=check_flag("skip_special_tokens", skip_special_tokens))
        return text.replace(bpe.END_OF_WORD, " ").strip()

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """Turn (B, L) ids into B texts: see `decode`."""
        texts = self.decode(sequences, skip_special_tokens)
        return [texts] if isinstance(texts, str) else texts

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Return the id of a token, or the list of those of several; unknown ones have `unk_token`'s."""
        if not isinstance(tokens, str):
            tokens = check_names("tokens", tuple(tokens) if isinstance(tokens, Iterator) else tokens)
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._backend.token_to_id(tokens)
        return self._backend.token_to_id(self.unk_token) if index is None else index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of an id, or the list of those of several; None where the vocabulary has no such id."""
        numbers = read_ids("ids", ids)
        if isinstance(numbers, int):
            return self._backend.id_to_token(numbers)
        if numbers and isinstance(numbers[0], list):
            raise TypeError("ids must be one id or a list of them, got several lists; pass them one at a time")
        skipped = self.all_special_ids if check_flag("skip_special_tokens", skip_special_tokens) else ()
        return [self._backend.id_to_token(i) for i in numbers if i not in skipped]

    def get_vocab(self, *, with_added_tokens: bool = True) -> dict[str, int]:
        """Return every token with its id, with or without the added ones."""
        return self._backend.get_vocab(with_added_tokens=with_added_tokens)

    @property
    def learnt_words(self) -> dict[str, list[int]]:
        """The words of textual inversion, each with the ids of its vectors."""
        return dict(self._learnt)

    def add_words(self, words: Mapping[str, int]) -> None:
        """Add words of one vector or several each (word, word_1, ...), all or none; their ids follow the last one.

        A word is matched in any case; one that begins or ends in a letter or digit only as a word of its own.
        """
        words = bpe.read_words(words)
        known, lowered = self.get_vocab(), {word.lower() for word in self._learnt}
        names: list[str] = []
        counts = {word: len(ids) for word, ids in self._learnt.items()}
        for word, count in words.items():
            stem, _, number = word.rpartition("_")
            if number == str(counts.get(stem)):
                raise ValueError(f"the word {word!r} would be read as a further vector of {stem!r}; pass another word "
                                 "as token=...")  # fmt: skip
            counts[word] = count
            tokens = [word, *(f"{word}_{i}" for i in range(1, count))]
            if word.lower() in lowered:
                raise ValueError(f"the word {word!r} is learnt already; unload it first, or pass token=...")
            for token in tokens:
                if token in known or token in names:
                    raise ValueError(f"{token!r} is in the vocabulary already; pass another word as token=...")
            lowered.add(word.lower())
            names += tokens
        self._append(names)

    def _append(self, names: list[str]) -> None:
        """Put new tokens behind the last one."""
        alone = {name: name[0].isalnum() or name[-1].isalnum() for name in names}
        new = [AddedToken(name, single_word=alone[name], normalized=True) for name in names]
        self._replace([*(token for _, token in sorted(self.added_tokens_decoder.items())), *new])

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens of one vector each, as training scripts do before they resize the embeddings.

        Tokens `word`, `word_1` and so on are the vectors of one word, as in `add_words`.

        Args:
            new_tokens: one or several; those that are tokens already are left out.
            special_tokens: ignored: an added token is matched either way.

        Returns:
            The number of added tokens, by which `len(tokenizer)` grows.

        Raises:
            ValueError: a token that no text can hold.
        """
        given = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else list(new_tokens)
        names = check_names("new_tokens", [one.content if isinstance(one, AddedToken) else one for one in given])
        known = self.get_vocab()
        new = [name for name in bpe.read_words(dict.fromkeys(names, 1)) if name not in known]
        if new:
            self._append(new)
        return len(new)

    def pad(
        self,
        encoded_inputs: Mapping[str, Any],
        padding: bool | Literal["longest", "max_length", "do_not_pad"] = True,
        max_length: int | None = None,
        return_tensors: Literal["pt", "np"] | None = None,
    ) -> BatchEncoding:
        """Pad texts that are ids already, B lists of them under "input_ids"; the options are those of `__call__`.

        Raises:
            ValueError: an unknown option, or texts of different lengths for one tensor.
        """
        one_of("return_tensors", return_tensors, dict.fromkeys((None, "pt", "np")))
        rows = [[int(index) for index in row] for row in encoded_inputs["input_ids"]]
        return self._batch(rows, padding, self._limit(padding, max_length), return_tensors)

    def remove_words(self, words: Iterable[str]) -> None:
        """Remove learnt words; the ids of the others move up."""
        words = check_names("words", words)
        for word in words:
            if word not in self._learnt:
                raise ValueError(f"{word!r} was not learnt; the learnt words are {', '.join(self._learnt) or 'none'}")
        gone = {index for word in words for index in self._learnt[word]}
        self._replace([token for index, token in sorted(self.added_tokens_decoder.items()) if index not in gone])

    def _replace(self, added: list[AddedToken]) -> None:
        """Replace the added tokens, all or none."""
        backend = bpe.build_bpe(self._vocab, self.merges, self.unk_token)
        backend.add_tokens(added)
        vars(self).update(_backend=backend, _learnt=bpe.group_words(backend.get_added_tokens_decoder()))

    def _spell_out(self, ids: list[int]) -> list[int]:
        """Replace the first id of a learnt word by those of all its vectors, unless the text names them all itself."""
        spelt: list[int] = []
        groups = {group[0]: group for group in self._learnt.values()}
        for place, index in enumerate(ids):
            group = groups.get(index, [index])
            spelt += [index] if ids[place : place + len(group)] == group else group
        return spelt

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """The number of tokens without the added ones."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are matched before the byte pairs, by id."""
        return self._backend.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The ids of the tokens that are matched before the byte pairs, by text."""
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The tokens with a role, by the role's name."""
        return dict(zip(bpe.ROLES, (self.bos_token, self.eos_token, self.unk_token, self.pad_token), strict=True))

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens with a role and those that are special without one, each once."""
        added = (token.content for token in self.added_tokens_decoder.values() if token.special)
        return list(dict.fromkeys((*self.special_tokens_map.values(), *added)))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)


def clip_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer of Stable Diffusion 2: it pads with "!", id 0, and cuts texts to 77 tokens."""
    vocab, merges = bpe.read_vocabulary()
    return CLIPTokenizer(vocab, merges, pad_token="!", model_max_length=77)
