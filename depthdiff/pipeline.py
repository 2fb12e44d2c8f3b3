"""Depth-to-image, the story in one file: check -> read the prompt -> find the depth -> add noise -> denoise -> decode.

A photo and a prompt go in; the photo's depth is estimated, and a latent diffusion that sees this depth repaints the
scene while its geometry stays. `prepare`, `denoise` and `decode` are public, so that the loop can be the caller's:

    run = pipe.prepare("two tigers", photo, strength=0.7)
    for step in pipe.denoise(run):
        step.latents = step.latents + my_change(step.denoised)
    pictures = pipe.decode(run.latents)

Letters: B pictures (prompts or images, times `num_images_per_prompt`), L tokens, C channels, H, W pixels, h, w latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from PIL import Image
from torch import Generator, Tensor

from depthdiff import sampler
from depthdiff.acceleration import Acceleration
from depthdiff.adapters.loaders import Adapters
from depthdiff.checks import check_device, check_flag, nearest, plain
from depthdiff.components import uses_weights
from depthdiff.conditioning import encode_images, fit_depth, noisy_latents, read_disparity, read_texts
from depthdiff.image import ImageInput, from_pixels, image_size, is_latents, read_depth, read_images
from depthdiff.image_processor import DPTImageProcessor
from depthdiff.inputs import (
    CALLBACK_TENSORS,
    batch_size,
    check_callbacks,
    check_fit,
    check_generator,
    check_latents,
    check_output_type,
    check_prompts,
    expand,
    read_lora_scale,
    read_numbers,
    read_start,
    repeat,
    repeat_rows,
)
from depthdiff.models.clip_text import CLIPTextModel
from depthdiff.models.dpt import DPTForDepthEstimation
from depthdiff.models.gaussian import DiagonalGaussianDistribution
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.models.vae import AutoencoderKL
from depthdiff.precision import check_finite, check_first_step, finite
from depthdiff.predictor import noise_predictor
from depthdiff.run import (
    CallState,
    Run,
    StableDiffusionPipelineOutput,
    StepCallback,
    call_back,
    check_run,
    keeps_the_outer_call,
)
from depthdiff.sampler import Step
from depthdiff.schedulers.base import Scheduler
from depthdiff.shortcuts import choose
from depthdiff.single_files import SingleFiles
from depthdiff.tokenizer import CLIPTokenizer


class StableDiffusionDepth2ImgPipeline(Adapters, SingleFiles, Acceleration):
    """Image-to-image that keeps the input's depth, as diffusers' class of that name. Source: arXiv:2112.10752.

    Args:
        vae: pixels to latents and back.
        text_encoder: tokens to context.
        tokenizer: text to tokens.
        unet: predicts the noise; four latent channels and one of depth go in.
        scheduler: the noise levels and the solver.
        depth_estimator: pixels to disparity.
        feature_extractor: prepares pixels for it.
    """

    FOR_TEXT, FOR_DEPTH = ("tokenizer", "text_encoder"), ("feature_extractor", "depth_estimator")
    NAMES = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "depth_estimator", "feature_extractor")
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        depth_estimator: DPTForDepthEstimation,
        feature_extractor: DPTImageProcessor,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            depth_estimator=depth_estimator,
            feature_extractor=feature_extractor,
        )
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.scheduler, self.depth_estimator, self.feature_extractor = scheduler, depth_estimator, feature_extractor
        check_fit(vae, text_encoder, tokenizer, unet)
        self._call = CallState()

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels, in height and in width, one latent stands for."""
        return self.vae.factor

    @property
    def guidance_scale(self) -> float:
        """Of this thread's present or last call; a callback may assign `_guidance_scale` to change it on the way."""
        return self._call.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._call.guidance_scale = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance is on."""
        return self._guidance_scale > 1

    @property
    def clip_skip(self) -> int | None:
        """Of this thread's present or last call."""
        return self._call.clip_skip

    @property
    def num_timesteps(self) -> int:
        """How many times this thread's present or last call runs the UNet."""
        return self._call.num_timesteps

    @torch.no_grad()
    @uses_weights
    @keeps_the_outer_call
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        depth_map: ImageInput | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
        deep_cache: int | None = None,
        token_merging: float | None = None,
        preset: str | None = None,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any]:
        """Repaint images.

        Prompts, images and depth maps pair one to one; a single one serves all.

        Args:
            prompt: what the pictures should show.
            image: to start from: PIL images, arrays or tensors (see `depthdiff.image.read_images`), or latents
                (B, 4, h, w), for which `depth_map` is needed.
            depth_map: near is large, in any unit: PIL images, arrays or tensors (see `depthdiff.image.read_depth`);
                estimated from `image` if absent.
            strength: in [0, 1], how far to go from the image: the share of the steps that is run.
            num_inference_steps: of a whole run, at strength 1.
            guidance_scale: how closely to follow the prompt; guidance is on above 1.
            negative_prompt: what the pictures should not show; of no effect without guidance.
            num_images_per_prompt: pictures for each prompt.
            eta: in [0, 1], noise added on the way; only DDIM reads it.
            generator: one, or one a picture, to make the result reproducible.
            prompt_embeds: (B, L, C), in place of `prompt`.
            negative_prompt_embeds: (B, L, C), in place of `negative_prompt`.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, 4, h, w).
            return_dict: return a record, else a tuple of the images.
            cross_attention_kwargs: `{"scale": s}` multiplies the weights of all active adapters.
            clip_skip: how many of the text encoder's last layers to skip for the prompt (not for the negative one).
            callback_on_step_end: called after each step with the pipeline, the step's index, the timestep and a dict
                of tensors; may return a dict of those it replaces.
            callback_on_step_end_tensor_inputs: which tensors that dict holds.
            guidance_interval: (low, high), shares of the training timesteps, 1 being pure noise, between which guidance
                is on. This and the next two trade quality for speed, are off by default, and are explained in
                `depthdiff.shortcuts.Shortcuts`.
            deep_cache: run the deeper part of the UNet at every N-th step only.
            token_merging: in [0, 0.75], the share of tokens that self-attention of the finest level merges.
            preset: "fast" sets what of these is left out (see `depthdiff.shortcuts.PRESETS`).
            **kwargs: `callback` and `callback_steps` in diffusers' older form.

        Raises:
            TypeError: an unknown argument, or one of a wrong type.
            ValueError: a value out of range, or arguments that do not fit each other.
            FloatingPointError: NaN or infinity in the work; names the stage that they come from.
        """
        callback, callback_steps = kwargs.pop("callback", None), kwargs.pop("callback_steps", None)
        for name in kwargs:
            known = StableDiffusionDepth2ImgPipeline.__call__.__wrapped__.__annotations__  # type: ignore[attr-defined]
            raise TypeError(f"__call__ got an unknown argument {name!r}{nearest(name, known)}")
        callback_steps, names = check_callbacks(
            callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        check_output_type(output_type)
        return_dict = check_flag("return_dict", return_dict)
        lora_scale = read_lora_scale(cross_attention_kwargs)

        run = self.prepare(
            prompt,
            image,
            depth_map,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
            lora_scale=lora_scale,
            guidance_interval=guidance_interval,
            deep_cache=deep_cache,
            token_merging=token_merging,
            preset=preset,
        )
        if run.guidance_scale > 1 and "depth_mask" in names:  # diffusers' form, whose halves a callback may make differ
            run.depth = torch.cat([run.depth] * 2)
        self._call.begin(run.guidance_scale, plain(clip_skip), len(run))
        own = int(plain(num_inference_steps) * plain(strength))  # PNDM's second call for one step is none of these
        for step in self.progress_bar(self.denoise(run), total=len(run)):
            if callback_on_step_end is not None:
                call_back(callback_on_step_end, names, self, run, step)
            if callback is not None and step.index >= len(run) - own and step.index % callback_steps == 0:
                callback(step.index, step.timestep, step.latents)
        images = self.decode(run.latents, output_type)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images) if return_dict else (images,)

    @torch.no_grad()
    @uses_weights
    def prepare(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        depth_map: ImageInput | None = None,
        *,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator | Sequence[Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        lora_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        deep_cache: int | None = None,
        token_merging: float | None = None,
        preset: str | None = None,
    ) -> Run:
        """Do everything that comes before the first step. Arguments and errors as in `__call__`.

        `lora_scale` is what is called `scale` in `cross_attention_kwargs` there.
        """
        shortcuts = choose(
            preset, guidance_interval=guidance_interval, deep_cache=deep_cache, token_merging=token_merging
        )
        strength, guidance_scale, num_images_per_prompt, lora_scale = read_numbers(
            strength, guidance_scale, num_images_per_prompt, lora_scale
        )
        guided = guidance_scale > 1
        check_prompts(self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip, guided)
        self._need("scheduler", "vae", "unet", *(() if depth_map is not None else self.FOR_DEPTH))
        plan = self.scheduler.plan(num_inference_steps, strength, eta=eta, device=self.execution_device)
        images = read_start(image, depth_map, self.vae_scale_factor)
        depths = None if depth_map is None else read_depth(depth_map)
        texts = [prompt] if isinstance(prompt, str) else prompt
        counts = {"prompt": len(texts) if texts is not None else len(prompt_embeds), "image": len(images)}  # type: ignore[arg-type]
        if depths is not None:
            counts["depth_map"] = len(depths)
        pictures = batch_size(counts)
        check_generator(generator, pictures * num_images_per_prompt)

        texts = None if texts is None else repeat(texts, pictures)
        prompt_embeds = repeat_rows("prompt_embeds", prompt_embeds, pictures)
        positive, negative = self.encode_prompt(
            texts,
            self.execution_device,
            num_images_per_prompt,
            guided,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            lora_scale,
            clip_skip,
        )
        context = positive if negative is None else torch.cat([negative, positive])

        depth = self._depth(images, depths)
        depth = expand(depth, pictures, num_images_per_prompt).to(context.dtype)
        clean = self._encode(images, context.dtype)
        latents = noisy_latents(clean, plan, pictures, num_images_per_prompt, self.vae.config.scaling_factor, generator)
        return Run(plan, latents, context, depth, guidance_scale, generator, lora_scale, shortcuts)

    @torch.no_grad()
    def denoise(self, run: Run) -> Iterator[Step]:
        """Walk through a prepared run.

        Yields:
            Each step once it is taken; what the caller assigns to its `latents`, or to the run's fields, counts from
            the next step on. `run.latents` follows.
        """
        check_run(run)
        with self._in_use(ends_by_itself=False), ExitStack() as stack:
            unet = self._at_scale("unet", self._at_work("unet"), run.lora_scale)
            predict_noise = stack.enter_context(noise_predictor(unet, run))
            for step in sampler.denoise(predict_noise, run.plan, run.latents, run.generator):
                check_first_step(step, run, unet.dtype)
                run.latents = step.latents
                yield step
                run.latents = step.latents
                if self._offload_whole:
                    self._at_work("unet")  # another network may have worked meanwhile

    @torch.no_grad()
    @uses_weights
    def decode(self, latents: Tensor, output_type: Literal["pil", "np", "pt", "latent"] = "pil") -> Any:
        """Turn latents (B, 4, h, w) on any device into pictures, of the kind of `output_type` (see `__call__`)."""
        check_output_type(output_type)
        self._need("vae")
        check_latents(latents, self.vae.config.latent_channels)
        if output_type == "latent":
            return check_finite(latents, "the latents")
        vae, scaled = self._at_work("vae"), latents.to(self.execution_device) / self.vae.config.scaling_factor
        return from_pixels(finite("vae", vae, lambda net: net.decode(scaled.to(net.dtype)).sample, scaled), output_type)

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
    ) -> tuple[Tensor, Tensor | None]:
        """Read the prompts.

        Args:
            prompt: one or several.
            device: where the result lies.
            num_images_per_prompt: each prompt's context is repeated so often, neighbours staying neighbours.
            do_classifier_free_guidance: read the negative prompts as well.
            negative_prompt: one for all, or one a prompt; the empty text if absent.
            prompt_embeds: (B, L, C), in place of `prompt`.
            negative_prompt_embeds: (B, L, C), in place of `negative_prompt`.
            lora_scale: times the weights of the active adapters.
            clip_skip: how many of the last layers to leave out for the prompt; as in diffusers the negative one is
                always read with all.

        Returns:
            Two tensors (B * num_images_per_prompt, L, C): for the prompts, and for the negative ones or None.

        Raises:
            ValueError: numbers of prompts that do not pair, or a `clip_skip` beyond the encoder's layers.
        """
        do_classifier_free_guidance = check_flag("do_classifier_free_guidance", do_classifier_free_guidance)
        clip_skip = check_prompts(
            self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip, do_classifier_free_guidance
        )
        *_, times, lora_scale = read_numbers(1, 1, num_images_per_prompt, 1.0 if lora_scale is None else lora_scale)
        device = self.execution_device if device is None else check_device("device", device)
        texts = [prompt] if isinstance(prompt, str) else prompt or []
        count = len(texts) if prompt_embeds is None else len(prompt_embeds)
        negatives: list[str] = []
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negatives = [negative_prompt or ""] if not isinstance(negative_prompt, list) else negative_prompt
            if count % len(negatives):
                found = f"`negative_prompt` has batch size {len(negatives)}, but `prompt` {count}"
                raise ValueError(f"{found}; they must pair")
            negatives = repeat(negatives, count)
        elif do_classifier_free_guidance:
            negative_prompt_embeds = repeat_rows("negative_prompt_embeds", negative_prompt_embeds, count)

        if texts or negatives:
            encoder = self._at_work("text_encoder")
            encoder = self._at_scale("text_encoder", encoder, lora_scale)
            read = read_texts(texts, negatives, clip_skip, self.tokenizer, encoder, self.execution_device, self.cache)
            prompt_embeds = read[: len(texts)] if texts else prompt_embeds
            negative_prompt_embeds = read[len(texts) :] if negatives else negative_prompt_embeds
        kind = {"device": device, "dtype": self.unet.dtype}
        positive = prompt_embeds.to(**kind).repeat_interleave(times, dim=0)  # type: ignore[union-attr, call-overload]
        if not do_classifier_free_guidance:
            return positive, None
        return positive, negative_prompt_embeds.to(**kind).repeat_interleave(times, dim=0)  # type: ignore[union-attr, call-overload]

    def _encode(self, images: list[Image.Image] | Tensor, dtype: torch.dtype) -> Tensor | DiagonalGaussianDistribution:
        """Describe the latents of images; latents themselves are only brought to device and `dtype`."""
        if is_latents(images):
            return images.to(self.execution_device, dtype)  # type: ignore[union-attr]
        return encode_images(images, self._at_work("vae"), self.execution_device, dtype, self.cache)

    def _depth(self, images: list[Image.Image] | Tensor, disparity: Tensor | None) -> Tensor:
        """Estimate the depth where it is not given, and bring it to the latents' size: (N, 1, h, w) in [-1, 1]."""
        if is_latents(images):
            height, width = images.shape[-2:]  # type: ignore[union-attr]
        else:
            height, width = (side // self.vae_scale_factor for side in image_size(images))
        if disparity is None:
            disparity = self.estimate_depth(images)
        return fit_depth(disparity.to(self.execution_device, torch.float32), height, width)

    @torch.no_grad()
    @uses_weights
    def estimate_depth(self, image: ImageInput) -> Tensor:
        """Estimate the disparity (N, H', W') of images, near is large; H' and W' are the depth net's own."""
        self._need(*self.FOR_DEPTH)
        net = self._at_work("depth_estimator")
        pixels = self.feature_extractor(read_images(image)).pixel_values
        return read_disparity(pixels, net, self.execution_device, self.cache)
