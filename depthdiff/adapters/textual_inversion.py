"""Textual inversion: words, and the vectors by which the text encoder replaces them.

Source of the method: arXiv:2208.01618. Source of the file layouts: huggingface/diffusers, loaders/textual_inversion.py;
AUTOMATIC1111/stable-diffusion-webui, modules/textual_inversion.

Letters: n vectors of a word, C channels of the text encoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.adapters.formats import CROSS_ATTENTION_DIMS, has_numbers, read_file
from depthdiff.arguments import ADAPTER, sort_out
from depthdiff.checks import check_names
from depthdiff.config import CheckpointError
from depthdiff.models.clip import CLIPTextModel
from depthdiff.tokenizer import CLIPTokenizer
from depthdiff.turns import Turns

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
Source = str | os.PathLike[str] | Mapping[str, Any] | Tensor


class TextualInversionLoaderMixin:
    """Adds textual inversion to a pipeline. Names and arguments are those of diffusers' mixin."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    _turns: Turns

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Source | Sequence[Source],
        token: str | Sequence[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: CLIPTextModel | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        hf_token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        **unused: Any,
    ) -> None:
        """Learn words from files; afterwards prompts and negative prompts can use them.

        Read are the forms of diffusers (`learned_embeds`), also with several words, of Automatic1111 (`.pt`, and
        `.safetensors`, whose word is the name of the file), and bare tensors.

        Args:
            pretrained_model_name_or_path: a file, a folder, a Hub id, tensors by word, one tensor (n, C) or (C,), or a
                list of these.
            token: the word to use instead of the file's; one for each source.
            tokenizer: which learns the words; the pipeline's if absent.
            text_encoder: whose table grows by the vectors; the pipeline's if absent.
            weight_name: of the file in a folder or repository.
            subfolder: of the folder or repository.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored.
            hf_token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.
            use_safetensors: refuse pickles if True.
            **unused: an argument of diffusers in `depthdiff.arguments.ADAPTER`.

        Raises:
            CheckpointError: a file is missing or damaged, or made for another text encoder; nothing has changed then.
            TypeError: an unknown argument.
            ValueError: a word is known already, or words and sources do not pair.
        """
        hub = {"token": hf_token, **unused}  # `token` is a word here, and the Hub's in the table of arguments
        hf_token = sort_out(self.load_textual_inversion, ADAPTER, hub, ("token",))["token"]
        tokenizer, encoder = tokenizer or self.tokenizer, text_encoder or self.text_encoder
        given = pretrained_model_name_or_path
        sources: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        tokens = [token] * len(sources) if token is None else check_names("token", token)
        if len(tokens) != len(sources) or not sources:
            raise ValueError(f"token must name one word for each of {len(sources)} sources, got {len(tokens)}")
        words: dict[str, Tensor] = {}
        for source, word in zip(sources, tokens, strict=True):
            if isinstance(source, (Mapping, Tensor)):
                content, name, stem = source, f"the {type(source).__name__} given", None
            else:
                content, _, path = read_file(
                    source, FILES, weight_name=weight_name, subfolder=subfolder, use_safetensors=use_safetensors,
                    revision=revision, cache_dir=cache_dir, token=hf_token,
                    local_files_only=local_files_only, force_download=force_download,
                )  # fmt: skip
                name, stem = str(path), path.stem
            for found, vectors in read_words(content, word, name, stem).items():
                if found in words:
                    raise ValueError(f"the word {found!r} is given twice; pass token=... to rename one")
                words[found] = _check_vectors(found, vectors, encoder, name)
        with self._turns.change("load_textual_inversion"):
            table = encoder.get_input_embeddings().weight.data
            if len(tokenizer) != len(table):
                raise ValueError(
                    f"the tokenizer has {len(tokenizer)} tokens, the text encoder {len(table)}; they must be equal"
                )
            with torch.inference_mode(table.is_inference()):
                longer = torch.cat([table, *(vectors.to(table.device, table.dtype) for vectors in words.values())])
            counts = {word: len(vectors) for word, vectors in words.items()}
            _exchange(tokenizer, encoder, longer, lambda: tokenizer.add_words(counts))

    def unload_textual_inversion(
        self,
        tokens: str | Sequence[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: CLIPTextModel | None = None,
    ) -> None:
        """Remove learnt words from the tokenizer, and their vectors from the text encoder.

        Args:
            tokens: one or several; all that were learnt if absent.
            tokenizer: the pipeline's if absent.
            text_encoder: the pipeline's if absent.

        Raises:
            ValueError: a word that was not learnt.
        """
        tokenizer, encoder = tokenizer or self.tokenizer, text_encoder or self.text_encoder
        with self._turns.change("unload_textual_inversion"):
            learnt = tokenizer.learnt_words
            chosen = list(learnt) if tokens is None else check_names("tokens", tokens)
            gone = {index for word in chosen for index in learnt.get(word, ())}
            if not gone:
                return tokenizer.remove_words(chosen)
            table = encoder.get_input_embeddings().weight.data
            kept = [index for index in range(len(table)) if index not in gone]
            with torch.inference_mode(table.is_inference()):
                shorter = table[kept]
            _exchange(tokenizer, encoder, shorter, lambda: tokenizer.remove_words(chosen))


def read_words(content: Any, token: str | None, name: str, stem: str | None) -> dict[str, Tensor]:
    """Find a file's words and their vectors; `token` replaces its word, `stem` is the word if it names none."""
    if isinstance(content, Tensor):
        if token is None:
            raise ValueError(f"{name} holds a tensor without a word; pass token=...")
        return {token: content}
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{name} holds a {type(content).__name__}, expected vectors by word")
    if "clip_g" in content or "clip_l" in content:
        raise CheckpointError(f"{name} is made for Stable Diffusion XL: it has vectors for two text encoders")
    found: dict[Any, Any] = dict(content)
    if "string_to_param" in content:
        vectors = content["string_to_param"]
        [vector] = vectors.values() if isinstance(vectors, Mapping) and len(vectors) == 1 else [None]
        found = {token or content.get("name") or stem: vector}
    elif "emb_params" in content:
        found = {token or stem: content["emb_params"]}
    elif token is not None:
        if len(found) > 1:
            raise ValueError(f"{name} has {len(found)} words ({', '.join(map(str, found))}); token must be None")
        found = {token: next(iter(found.values()))}
    for word, vector in found.items():
        if word is None:
            raise ValueError(f"{name} holds vectors without a word; pass token=...")
        if not isinstance(word, str) or not isinstance(vector, Tensor):
            raise CheckpointError(f"{name}: expected a tensor for {word!r}, got {type(vector).__name__}")
    return found


def _check_vectors(word: str, vectors: Tensor, encoder: CLIPTextModel, name: str) -> Tensor:
    """Reshape the vectors of a word to (n, C), or refuse them."""
    width = encoder.config.hidden_size
    if any("\ud800" <= letter <= "\udfff" for letter in word):
        raise ValueError(f"{name}: the word {word!r} must be valid Unicode; pass token=...")
    if not word or any(letter.isspace() for letter in word):
        raise ValueError(f"{name}: the word {word!r} must be one word without spaces; pass token=...")
    if vectors.ndim not in (1, 2) or not vectors.numel() or not vectors.is_floating_point():
        raise CheckpointError(f"{name}: the vectors of {word!r} must be (n, {width}), got {tuple(vectors.shape)}")
    if vectors.shape[-1] != width:
        kind = CROSS_ATTENTION_DIMS.get(vectors.shape[-1], "another model")
        raise CheckpointError(
            f"{name}: the vectors of {word!r} have {vectors.shape[-1]} channels and are made for {kind}; here {width}"
        )
    if not has_numbers(vectors):
        raise CheckpointError(f"{name}: the vectors of {word!r} hold NaN or infinity; is the file damaged?")
    return vectors.detach().reshape(-1, width)


def _exchange(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, table: Tensor, change: Callable[[], None]) -> None:
    """Change the words of a tokenizer and the table (V, C) of an encoder, both or neither."""
    embedding = encoder.get_input_embeddings()
    weight = nn.Parameter(table, requires_grad=embedding.weight.requires_grad)
    before = dict(vars(tokenizer)), embedding.weight, embedding.num_embeddings, encoder.config.vocab_size
    try:
        change()
        embedding.weight, embedding.num_embeddings, encoder.config.vocab_size = weight, len(table), len(table)
    except BaseException:
        vars(tokenizer).update(before[0])
        embedding.weight, embedding.num_embeddings, encoder.config.vocab_size = before[1:]
        raise
