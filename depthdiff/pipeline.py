"""Depth-to-image, the story in one file: check -> read the prompt -> find the depth -> add noise -> denoise -> decode.

A photo and a prompt go in; the photo's depth is estimated, and a latent diffusion that sees this depth repaints the
scene while its geometry stays. Every step is a method under diffusers' name, and a subclass may override it. `prepare`,
`denoise` and `decode` are public, so that the loop can be the caller's:

    run = pipe.prepare("two tigers", photo, strength=0.7)
    for step in pipe.denoise(run):
        step.latents = step.latents + my_change(step.denoised)
    pictures = pipe.decode(run.latents)

Letters: B pictures (prompts or images, times `num_images_per_prompt`), L tokens, C channels, H, W pixels, h, w latents.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Generator, Tensor

import depthdiff.fast as speed
from depthdiff.approximations import approximated, resolve_preset
from depthdiff.arguments import CALL, sort_out
from depthdiff.checks import check_flag, plain
from depthdiff.devices import dtype_of, uses_weights
from depthdiff.image import ImageInput, read_depth
from depthdiff.inputs import (
    CALLBACK_TENSORS,
    batch_size,
    check_callbacks,
    check_fit,
    check_generator,
    check_kwargs,
    check_latents,
    check_prompts,
    paired,
    read_numbers,
    read_output_type,
    read_start,
    repeat,
    repeat_rows,
)
from depthdiff.precision import check_finite, check_first_step, finite
from depthdiff.preparation import PreparationMixin
from depthdiff.run import (
    CallState,
    Run,
    StableDiffusionPipelineOutput,
    Step,
    StepCallback,
    call_back,
    check_run,
    check_tensors,
    denoised,
    keeps_the_call,
    keeps_the_outer_call,
    step_kwargs,
)


class StableDiffusionDepth2ImgPipeline(PreparationMixin):
    """Image-to-image that keeps the input's depth, as diffusers' class of that name. Source: arXiv:2112.10752.

    Components of diffusers and transformers, or others that keep their contract, work as well.

    Args:
        vae: pixels to latents and back.
        text_encoder: tokens to embeddings.
        tokenizer: text to tokens.
        unet: predicts the noise; four latent channels and one of depth go in.
        scheduler: the noise levels and the solver.
        depth_estimator: pixels to disparity.
        feature_extractor: prepares pixels for it.
        fast: use the equivalent faster computations of `depthdiff.fast` where they apply.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_TENSORS)
    lora_scale = 1.0

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        depth_estimator: Any,
        feature_extractor: Any,
        *,
        fast: bool = True,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            depth_estimator=depth_estimator,
            feature_extractor=feature_extractor,
            fast=fast,
        )
        check_fit(vae, text_encoder, tokenizer, unet)
        self._call = CallState()

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of this thread's current or latest call; callbacks may assign `_guidance_scale`."""
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
        """The `clip_skip` of this thread's current or latest call."""
        return self._call.clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """Those of this thread's current or latest call."""
        return self._call.cross_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """The number of UNet calls in this thread's current or latest call."""
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
        callback: Any = None,
        callback_steps: int | None = None,
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any]:
        """Repaint images.

        Prompts, images and depth maps are paired in order; fewer of one kind are repeated, if their number divides the
        largest.

        Args:
            prompt: what the pictures should show.
            image: to start from: PIL images, arrays or tensors (see `depthdiff.image.read_images`), or latents
                (B, 4, h, w), for which `depth_map` is needed.
            depth_map: near is large, in any unit: PIL images, arrays or tensors (see `depthdiff.image.read_depth`);
                estimated from `image` if None.
            strength: in [0, 1], how far to go from the image: the share of the steps that is run.
            num_inference_steps: of a whole run, at strength 1.
            guidance_scale: how closely to follow the prompt; guidance is on above 1.
            negative_prompt: what the pictures should not show; ignored without guidance.
            num_images_per_prompt: pictures for each prompt.
            eta: in [0, 1], noise added on the way; only DDIM reads it.
            generator: one, or one a picture, to make the result reproducible.
            prompt_embeds: (B, L, C), instead of `prompt`.
            negative_prompt_embeds: (B, L, C), instead of `negative_prompt`.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, 4, h, w).
            return_dict: return a record, else a tuple of the images.
            cross_attention_kwargs: for the attention processors; "scale" multiplies all active adapters.
            clip_skip: how many of the text encoder's last layers to skip for the prompt (not for the negative one).
            callback_on_step_end: called after each step with the pipeline, the step's index, the timestep and a dict
                of tensors; may return a dict of those it replaces.
            callback_on_step_end_tensor_inputs: which tensors that dict holds.
            guidance_interval: (low, high), shares of the training timesteps, 1 being pure noise, between which guidance
                is on. This and the next two trade quality for speed, are off by default, and are explained in
                `depthdiff.approximations.Approximations`.
            deep_cache: run the deeper part of the UNet at every N-th step only.
            token_merging: in [0, 0.75], the share of tokens that self-attention of the finest level merges.
            preset: "fast" sets what of these is left out (see `depthdiff.approximations.PRESETS`).
            callback: diffusers' older form, called with index, timestep and latents.
            callback_steps: every how many steps.
            **unknown: an argument of other pipelines in `depthdiff.arguments.CALL`, which is ignored with a warning.

        Raises:
            TypeError: an unknown argument, or one of a wrong type.
            ValueError: a value out of range, or arguments that do not fit each other.
            FloatingPointError: NaN or infinity in the work; names the stage that they come from.
        """
        sort_out(StableDiffusionDepth2ImgPipeline.__call__, CALL, unknown)
        callback_steps, names = check_callbacks(
            callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        output_type = read_output_type(output_type)
        return_dict = check_flag("return_dict", return_dict)
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
            cross_attention_kwargs=cross_attention_kwargs,
            clip_skip=clip_skip,
            guidance_interval=guidance_interval,
            deep_cache=deep_cache,
            token_merging=token_merging,
            preset=preset,
        )
        for step in self.progress_bar(self.denoise(run), total=len(run)):
            if callback_on_step_end is not None:
                call_back(callback_on_step_end, names, self, run, step)
            if callback is not None and run.ends_step(step.index) and step.index % callback_steps == 0:
                callback(step.index // run.order, step.timestep, step.latents)
        images = self.decode(run.latents, output_type)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images) if return_dict else (images,)

    @torch.no_grad()
    @uses_weights
    @keeps_the_call
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
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        deep_cache: int | None = None,
        token_merging: float | None = None,
        preset: str | None = None,
    ) -> Run:
        """Do everything that comes before the first step. Arguments and errors as in `__call__`."""
        approximations = resolve_preset(
            preset, guidance_interval=guidance_interval, deep_cache=deep_cache, token_merging=token_merging
        )
        self.check_inputs(prompt, strength, None, negative_prompt, prompt_embeds, negative_prompt_embeds)
        self._need("scheduler", "vae", "unet", *(() if depth_map is not None else self.FOR_DEPTH))
        numbers = read_numbers(
            strength, guidance_scale, num_images_per_prompt, num_inference_steps, eta, self.scheduler
        )
        strength, guidance_scale, num_images_per_prompt, num_inference_steps, eta = numbers
        lora_scale, guided, device = check_kwargs(cross_attention_kwargs), guidance_scale > 1, self._execution_device
        check_prompts(self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip, guided)
        counts = {"image": len(read_start(image, depth_map, self.vae_scale_factor))}
        if depth_map is not None:
            counts["depth_map"] = len(read_depth(depth_map))
        texts = [prompt] if isinstance(prompt, str) else prompt
        counts["prompt"] = len(texts if texts is not None else prompt_embeds)  # type: ignore[arg-type]
        pictures = batch_size(counts)
        check_generator(generator, pictures * num_images_per_prompt)

        self._call.begin(guidance_scale, plain(clip_skip), cross_attention_kwargs, self._call.num_timesteps)
        positive, negative = self.encode_prompt(
            None if texts is None else repeat(texts, pictures),
            device,
            num_images_per_prompt,
            guided,
            negative_prompt,
            prompt_embeds=repeat_rows("prompt_embeds", prompt_embeds, pictures),
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=lora_scale,
            clip_skip=clip_skip,
        )
        dtype, batch = positive.dtype, pictures * num_images_per_prompt
        image = paired(image, counts["image"], pictures)
        depth_map = paired(depth_map, counts.get("depth_map"), pictures)
        depth = self.prepare_depth_map(image, depth_map, batch, guided, dtype, device)
        pixels = self.image_processor.preprocess(image)
        with self._planning:  # calls share the scheduler, which holds the timesteps of one run at a time
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            timesteps, num_inference_steps = self.get_timesteps(num_inference_steps, strength, device)
            latents = self.prepare_latents(
                pixels, timesteps[:1].repeat(batch), pictures, num_images_per_prompt, dtype, device, generator
            )
            scheduler = copy.deepcopy(self.scheduler)
        self._call.num_timesteps = len(timesteps)
        return Run(
            scheduler=scheduler,
            timesteps=timesteps,
            num_inference_steps=num_inference_steps,
            latents=latents,
            prompt_embeds=positive if negative is None else torch.cat([negative, positive]),
            depth=depth,
            guidance_scale=guidance_scale,
            generator=generator,
            eta=eta,
            cross_attention_kwargs=cross_attention_kwargs,
            approximations=approximations,
        )

    @torch.no_grad()
    def denoise(self, run: Run) -> Iterator[Step]:
        """Walk through a prepared run.

        Yields:
            Each step once it is taken; what the caller assigns to its `latents`, or to those fields of the run that
            are read at every step (see `Run`), counts from the next step on. `run.latents` follows.
        """
        check_run(run)
        with self._in_use(ends_by_itself=False):
            unet, made_of = self._unet_of(run)
            scheduler, extra = copy.deepcopy(run.scheduler), self.prepare_extra_step_kwargs(run.generator, run.eta)
            if type(scheduler) is not type(self.scheduler):  # the pipeline's was replaced after `prepare`
                extra = step_kwargs(scheduler, run.generator, run.eta)
            numbers = run.timesteps.cpu()  # once, so that the host need not wait for the device in every step
            for index, (timestep, number) in enumerate(zip(run.timesteps, numbers, strict=True)):
                latents = run.latents
                if made_of != (self.unet, self._adapters, run.cross_attention_kwargs, run.approximations):
                    unet, made_of = self._unet_of(run)  # changed since the last step
                noise_pred = predict_noise(unet, scheduler, run, timestep, number)
                output = scheduler.step(noise_pred, number, latents, **extra)
                step = Step(
                    index, timestep, output.prev_sample, denoised(scheduler, output, noise_pred, number, latents)
                )
                check_first_step(step, run, noise_pred.dtype)
                run.latents = step.latents  # for the caller to see
                yield step
                run.latents = step.latents  # which the caller may have replaced
                if self._offload_whole:
                    self._at_work("unet")  # another network may have worked meanwhile

    def _unet_of(self, run: Run) -> tuple[Any, tuple[Any, ...]]:
        """Return the UNet as a run uses it, with its scale and approximations, and what it was made of."""
        made_of = self.unet, self._adapters, run.cross_attention_kwargs, run.approximations
        unet = self._at_scale("unet", self._at_work("unet"), check_kwargs(run.cross_attention_kwargs))
        unet = approximated(unet, run.approximations)
        if unet is not self.unet and self._fast:
            speed.enable(unet)
        return unet, made_of

    @torch.no_grad()
    @uses_weights
    def decode(self, latents: Tensor, output_type: Literal["pil", "np", "pt", "latent"] = "pil") -> Any:
        """Turn latents (B, 4, h, w) on any device into pictures, of the kind of `output_type` (see `__call__`)."""
        output_type = read_output_type(output_type)
        self._need("vae")
        check_latents(latents, self.vae.config.latent_channels)
        if output_type == "latent":
            return check_finite(latents, "the latents")
        vae, scaled = self._at_work("vae"), latents.to(self._execution_device) / self.vae.config.scaling_factor
        pixels = finite("vae", vae, lambda net: net.decode(scaled.to(dtype_of(net)), return_dict=False)[0], scaled)
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Turn latents (B, 4, h, w) into an array (B, H, W, 3), float32, in [0, 1]."""
        return self.decode(latents, "np")


def predict_noise(unet: Any, scheduler: Any, run: Run, timestep: Tensor, number: Tensor | None = None) -> Tensor:
    """Ask the UNet for the noise in the latents, and apply guidance.

    Args:
        unet: the network, or one that approximates it.
        scheduler: the run's.
        run: whose latents, embeddings and depth.
        timestep: for the UNet, a tensor without dimensions.
        number: the same on the CPU, for the scheduler.

    Returns:
        (B, 4, h, w).
    """
    check_tensors(run, run.latents, unet)
    latents, embeds, depth = run.latents, run.prompt_embeds, run.depth
    number = timestep if number is None else number
    guided = run.guides(number)
    if run.guidance_scale > 1 and not guided:  # outside its interval: the prompts alone
        embeds = embeds.chunk(2)[1]
    rows = len(embeds)
    depth = depth[-rows:] if len(depth) >= rows else torch.cat([depth] * 2)
    sample = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, number)
    sample = torch.cat([sample.to(depth.dtype), depth], dim=1)  # (2B, 5, h, w)
    noise_pred = unet(
        sample,
        timestep,
        encoder_hidden_states=embeds,
        cross_attention_kwargs=run.cross_attention_kwargs,
        return_dict=False,
    )[0]
    if not guided:
        return noise_pred
    uncond, cond = noise_pred.chunk(2)
    return apply_guidance(uncond, cond, run.guidance_scale)


def apply_guidance(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Push a prediction away from the one without the prompt.

    Args:
        uncond: (B, 4, h, w), prediction for the negative prompt.
        cond: (B, 4, h, w), prediction for the prompt.
        guidance_scale: 1 gives `cond`, 0 `uncond`; larger follows the prompt more closely.

    Source: arXiv:2207.12598, eq. 6, with w = guidance_scale - 1.
    """
    return uncond + guidance_scale * (cond - uncond)
