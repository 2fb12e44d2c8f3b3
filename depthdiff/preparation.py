"""The steps before the loop: check, read the prompt, find the depth, choose the timesteps, make the first latents.

Each is a method with the name and signature of diffusers' pipeline; a subclass may override any of them.

Letters: B pictures, N images, L tokens, C channels, H, W pixels, h, w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from depthdiff.adapters.mixin import LoraLoaderMixin
from depthdiff.checks import check_device, check_flag, check_number
from depthdiff.conditioning import draw_latents, encode_images, encode_texts, fit_depth, text_length
from depthdiff.devices import dtype_of, uses_weights
from depthdiff.image import ImageInput, from_pixels, image_size, is_latents, read_depth, read_images
from depthdiff.inputs import (
    LARGEST_SCALE,
    check_callbacks,
    check_prompt,
    check_prompts,
    pair_texts,
    read_numbers,
    repeat_rows,
)
from depthdiff.noise import randn
from depthdiff.precision import finite
from depthdiff.previews import LatentToRGB, preview_pictures
from depthdiff.prompt_syntax import (
    PromptSyntax,
    check_prompt_syntax,
    chunk_tokens,
    count_chunks,
    encode_chunks,
    fill_up,
    parse_prompt,
)
from depthdiff.run import Step, step_kwargs
from depthdiff.single_files import FromSingleFileMixin


class PreparationMixin(LoraLoaderMixin, FromSingleFileMixin):
    """Adds to the components what a call does before its first step."""

    FOR_TEXT, FOR_DEPTH = ("tokenizer", "text_encoder"), ("feature_extractor", "depth_estimator")

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        strength: float,
        callback_steps: int | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> None:
        """Refuse arguments of a call that cannot be right whatever the components are. Errors as in `__call__`."""
        read_numbers(strength)
        check_callbacks(None, callback_steps, None, callback_on_step_end_tensor_inputs)
        check_prompt(prompt, prompt_embeds)
        check_prompt(negative_prompt, negative_prompt_embeds, "negative_prompt")
        if prompt is None and prompt_embeds is None:
            raise ValueError("Provide either `prompt` or `prompt_embeds`; both are None")

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

    @torch.no_grad()
    @uses_weights
    def prepare_depth_map(
        self,
        image: ImageInput,
        depth_map: ImageInput | None,
        batch_size: int,
        do_classifier_free_guidance: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Estimate the depth where it is not given, and resize it to the latents' size.

        Args:
            image: see `__call__`.
            depth_map: see `__call__`.
            batch_size: B.
            do_classifier_free_guidance: whether each map is needed twice.
            dtype: of the result.
            device: of the result.

        Returns:
            (B, 1, h, w), or (2B, 1, h, w) with guidance, in [-1, 1], near is large.
        """
        if is_latents(image):
            height, width = image[0].shape[-2:]  # type: ignore[index, union-attr]
        else:
            height, width = (side // self.vae_scale_factor for side in image_size(read_images(image)))
        disparity = self.estimate_depth(image) if depth_map is None else read_depth(depth_map)
        depth = fit_depth(disparity.to(device, torch.float32), height, width).to(dtype)
        depth = depth.repeat_interleave(batch_size // len(depth), dim=0)
        return torch.cat([depth] * 2) if do_classifier_free_guidance else depth

    @torch.no_grad()
    @uses_weights
    def estimate_depth(self, image: ImageInput) -> Tensor:
        """Estimate the disparity (N, H', W') of images, near is large; H' and W' are the depth net's own."""
        self._need(*self.FOR_DEPTH)
        net, device = self._at_work("depth_estimator"), self._execution_device
        pixels = self.feature_extractor(images=read_images(image), return_tensors="pt").pixel_values
        return finite("depth_estimator", net, lambda net: net(pixels.to(device, dtype_of(net))).predicted_depth)

    def get_timesteps(
        self, num_inference_steps: int, strength: float, device: torch.device | str
    ) -> tuple[Tensor, int]:
        """Cut the scheduler's timesteps by the strength: the timesteps that are run, and the number of steps.

        Source: arXiv:2108.01073 (SDEdit), sec. 3, where strength is t0.
        """
        steps = min(int(num_inference_steps * strength), num_inference_steps)
        if getattr(self.scheduler, "fix_start", False):  # with such a start, PNDM's first steps take four calls each
            return self.scheduler.plan(num_inference_steps, strength, device=device).timesteps, steps
        start = (num_inference_steps - steps) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index") and start < len(self.scheduler.timesteps):
            self.scheduler.set_begin_index(start)
        return self.scheduler.timesteps[start:], steps

    @torch.no_grad()
    @uses_weights
    def prepare_latents(
        self,
        image: Tensor,
        timestep: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> Tensor:
        """Encode images, and add the noise of the first step.

        Args:
            image: (N, 3, H, W), pixels in [-1, 1], or (N, 4, h, w), latents.
            timestep: (B * num_images_per_prompt,), of the first step; empty where no step is run, which adds no noise.
            batch_size: B, a multiple of N.
            num_images_per_prompt: pictures of each prompt.
            dtype: of the latents.
            device: of the latents.
            generator: one, or one a picture; one draws for every image encoded and then the noise.

        Returns:
            (B * num_images_per_prompt, 4, h, w).

        Raises:
            ValueError: `batch_size` is not a multiple of N.
        """
        if batch_size % len(image):
            raise ValueError(f"Cannot duplicate `image` of batch size {len(image)} to {batch_size} text prompts.")
        copies = batch_size // len(image) * num_images_per_prompt
        if image.shape[1] == 4:
            latents = image.to(device, dtype).repeat_interleave(copies, dim=0)
        else:
            vae, config = self._at_work("vae"), self.vae.config
            encoded = finite("vae", vae, lambda net: encode_images(net, image.to(device, dtype_of(net)))).to(dtype)
            latents = config.scaling_factor * draw_latents(encoded, config.latent_channels, generator, copies)
        if not len(timestep):
            return latents
        noise = randn(latents.shape, generator, device=device, dtype=dtype)
        return self.scheduler.add_noise(latents, noise, timestep)

    @torch.no_grad()
    @uses_weights
    def preview(self, step_or_latents: Step | Tensor, decoder: Any = None) -> list[Image.Image]:
        """Turn latents on the way into pictures, for little work.

        Args:
            step_or_latents: a step of `denoise`, of which the clean latents that it predicts are shown, or its latents
                where the scheduler does not tell; or latents (B, 4, h, w).
            decoder: see `depthdiff.previews.preview_pictures`. If None, a `LatentToRGB` is fitted to the pipeline's own
                autoencoder, again in every call; in a loop, fit it once and pass it.

        Returns:
            B RGB images.

        Raises:
            FloatingPointError: NaN or infinity in what an autoencoder decodes.
            TypeError: neither a step nor latents, or not a decoder.
            ValueError: latents of another number of channels.
        """
        latents = step_or_latents
        if isinstance(latents, Step):
            latents = latents.latents if latents.denoised is None else latents.denoised
        if decoder is not None and decoder is not self.vae:
            return preview_pictures(latents, decoder)
        vae, device = self._at_work("vae"), self._execution_device
        return preview_pictures(latents, LatentToRGB.fit(vae, device) if decoder is None else vae, device)

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """Return `eta` and `generator`, as far as the scheduler's `step` accepts them."""
        return step_kwargs(self.scheduler, generator, eta)

    # What else diffusers' class has

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: Any) -> str | list[str]:
        """Return the prompt as it is: the tokenizer itself spells out words of several vectors."""
        return prompt

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Tensor:
        """Read the prompts, the negative ones first, in one tensor; arguments as those of `encode_prompt`."""
        positive, negative = self.encode_prompt(*args, **kwargs)
        return positive if negative is None else torch.cat([negative, positive])

    def run_safety_checker(self, image: Any, device: Any, dtype: Any) -> tuple[Any, None]:
        """Return the images as they are, and None: no safety check runs."""
        return image, None

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Turn an array (B, H, W, 3) or (H, W, 3) in [0, 1] into PIL images."""
        batch = torch.from_numpy(np.asarray(images, np.float32).reshape(-1, *images.shape[-3:]))
        return from_pixels(2 * batch.movedim(3, 1) - 1)  # type: ignore[return-value]
