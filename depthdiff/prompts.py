"""Read the prompts: texts to embeddings, for what the pictures should show and for what they should not.

Letters: B pictures, L tokens, C channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from depthdiff.adapters.mixin import LoraLoaderMixin
from depthdiff.checks import check_device, check_flag, check_number
from depthdiff.conditioning import encode_texts, text_length
from depthdiff.devices import dtype_of, uses_weights
from depthdiff.inputs import LARGEST_SCALE, check_prompts, pair_texts, read_numbers, repeat_rows
from depthdiff.precision import finite
from depthdiff.prompt_syntax import (
    PromptSyntax,
    check_prompt_syntax,
    chunk_tokens,
    count_chunks,
    encode_chunks,
    fill_up,
    parse_prompt,
)


class PromptMixin(LoraLoaderMixin):
    """Adds to the components how a call reads its prompts."""

    FOR_TEXT = "tokenizer", "text_encoder"

    @torch.no_grad()
    @uses_weights
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        prompt_syntax: PromptSyntax | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Read the prompts.

        Args:
            prompt: one or several.
            device: of the result.
            num_images_per_prompt: each prompt's embeddings are repeated so often, neighbours staying neighbours.
            do_classifier_free_guidance: read the negative prompts as well.
            negative_prompt: one for all, or one a prompt; the empty text if None.
            prompt_embeds: (B, L, C), instead of `prompt`.
            negative_prompt_embeds: (B, L, C), instead of `negative_prompt`.
            lora_scale: multiplies all active adapters.
            clip_skip: how many of the last layers to leave out for the prompt; as in diffusers the negative one is
                always read with all.
            prompt_syntax: "a1111" reads brackets in prompts as weights, and prompts of any length in chunks (see
                `depthdiff.prompt_syntax`); None reads them as plain text, and cuts them at the tokenizer's length.

        Returns:
            Two tensors (B * num_images_per_prompt, L, C): for the prompts, and for the negative ones or None. With
            `prompt_syntax`, L is 77 for each chunk of the longest text of both sides.

        Raises:
            ValueError: numbers of prompts that do not pair, a `clip_skip` beyond the encoder's layers, an unknown
                `prompt_syntax`, or one without any text, or beside embeddings whose length is not that of the chunks.
        """
        prompt_syntax = check_prompt_syntax(prompt_syntax)
        guided = check_flag("do_classifier_free_guidance", do_classifier_free_guidance)
        given = prompt, negative_prompt, prompt_embeds, negative_prompt_embeds
        clip_skip = check_prompts(self, *given, clip_skip, guided)
        _, _, times, *_ = read_numbers(num_images_per_prompt=num_images_per_prompt)
        device = self._execution_device if device is None else check_device("device", device)
        if lora_scale is not None:
            lora_scale = check_number("lora_scale", lora_scale, -LARGEST_SCALE, LARGEST_SCALE)
        texts = [prompt] if isinstance(prompt, str) else prompt
        negatives = None
        if guided and negative_prompt_embeds is None:
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            negatives = pair_texts(negatives, len(prompt_embeds if texts is None else texts))  # type: ignore[arg-type]
        if prompt_syntax is not None and prompt is None and negative_prompt is None:
            raise ValueError("`prompt_syntax` is for prompts given as text, got embeddings; leave it out")
        if prompt_syntax is not None and (texts or negatives):
            embeds = prompt_embeds, negative_prompt_embeds if guided else None
            prompt_embeds, negative_prompt_embeds = self._read_chunks((texts, negatives), embeds, lora_scale, clip_skip)
        if prompt_embeds is None:
            length = None if negative_prompt_embeds is None else negative_prompt_embeds.shape[1]
            prompt_embeds = self._read_at(texts or [], length, lora_scale, clip_skip)
        if negatives is not None and negative_prompt_embeds is None:
            negative_prompt_embeds = self._read_at(negatives, prompt_embeds.shape[1], lora_scale)
        network = self.text_encoder if self.unet is None else self.unet
        kind: dict[str, Any] = {
            "device": device,
            "dtype": prompt_embeds.dtype if network is None else dtype_of(network),
        }
        positive = prompt_embeds.to(**kind).repeat_interleave(times, dim=0)
        if not guided:
            return positive, None
        negative = repeat_rows("negative_prompt_embeds", negative_prompt_embeds, len(prompt_embeds))
        return positive, negative.to(**kind).repeat_interleave(times, dim=0)  # type: ignore[union-attr]

    def _read_at(
        self, texts: list[str], length: int | None, lora_scale: float | None, clip_skip: int | None = None
    ) -> Tensor:
        """Encode texts, (B, L, C), at a length L, or the tokenizer's if None, with the adapters at a scale."""
        encoder = self._at_scale("text_encoder", self._at_work("text_encoder"), lora_scale)
        device, tokenizer = self._execution_device, self.tokenizer
        texts = [str(self.maybe_convert_prompt(text, tokenizer)) for text in texts]

        def read(net: Any) -> Tensor:
            return encode_texts(texts, tokenizer, net, device, clip_skip, length)

        return finite("text_encoder", encoder, read)

    def _read_chunks(
        self,
        texts: tuple[list[str] | None, list[str] | None],
        embeds: tuple[Tensor | None, Tensor | None],
        lora_scale: float | None,
        clip_skip: int | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Encode the texts of both sides, or of one beside the embeddings of the other, in equally many chunks."""
        encoder = self._at_scale("text_encoder", self._at_work("text_encoder"), lora_scale)
        device, tokenizer = self._execution_device, self.tokenizer
        length = text_length(tokenizer, encoder)
        sides = [
            [
                chunk_tokens(parse_prompt(str(self.maybe_convert_prompt(text, tokenizer))), tokenizer, length)
                for text in side or ()
            ]
            for side in texts
        ]
        count = count_chunks([chunks for side in sides for chunks in side], embeds)
        read = list(embeds)
        for place, (side, skip) in enumerate(zip(sides, (clip_skip, None), strict=True)):
            if side:
                rows = [fill_up(chunks, count, tokenizer) for chunks in side]
                work = partial(encode_chunks, rows, device=device, clip_skip=skip)
                read[place] = finite("text_encoder", encoder, work)
        return read[0], read[1]

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: Any) -> str | list[str]:
        """Return the prompt as it is: the tokenizer itself spells out words of several vectors."""
        return prompt

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Tensor:
        """Read the prompts, the negative ones first, in one tensor; arguments as those of `encode_prompt`."""
        positive, negative = self.encode_prompt(*args, **kwargs)
        return positive if negative is None else torch.cat([negative, positive])
