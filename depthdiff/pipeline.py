"""Depth-to-image, the story in one file: check -> read the prompt -> find the depth -> add noise -> denoise -> decode.

A photo and a prompt go in; the photo's depth is estimated, and a latent diffusion that sees this depth repaints the
scene while its geometry stays. Every step is a method under diffusers' name, and a subclass may override it. `prepare`,
`denoise` and `decode` are public, so that the loop can be the caller's:

    run = pipe.prepare("two tigers", photo, strength=0.7)
    for step in pipe.denoise(run):
        step.latents = step.latents + my_change(step.denoised)
    pictures = pipe.decode(run)

Letters: B pictures (prompts or images, times `num_images_per_prompt`), L tokens, C channels, H, W pixels, h, w latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

import depthdiff.fast as speed
from depthdiff.approximations import approximated, resolve_preset
from depthdiff.arguments import CALL, sort_out
from depthdiff.call_options import NAMES, Options, read_hires, read_options
from depthdiff.call_state import CallStateMixin, keeps_the_call, keeps_the_outer_call
from depthdiff.checks import check_flag, check_tensor, plain
from depthdiff.devices import dtype_of, uses_weights
from depthdiff.guidance import apply_guidance as apply_guidance  # which programs import from here
from depthdiff.guidance import predict_noise
from depthdiff.image import ImageInput
from depthdiff.inputs import (
    CALLBACK_TENSORS,
    batch_size,
    check_callbacks,
    check_fit,
    check_generator,
    check_kwargs,
    check_latents,
    check_prompts,
    check_scales,
    is_guided,
    read_numbers,
    read_output_type,
    repeat,
    repeat_rows,
)
from depthdiff.interruption import Stop
from depthdiff.precision import check_finite, check_first_step, finite
from depthdiff.preparation import PreparationMixin
from depthdiff.run import (
    Run,
    StableDiffusionPipelineOutput,
    Step,
    StepCallback,
    call_back,
    check_run,
    denoised,
    step_kwargs,
)
from depthdiff.scene import Scene, read_scene
from depthdiff.seamless import seamless
from depthdiff.sizes import enlarge, resize_maps

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StableDiffusionDepth2ImgPipeline(CallStateMixin, PreparationMixin):
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
        guidance_scale: float | Sequence[float] = 7.5,
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
        hires: float | None = None,
        hires_strength: float | None = None,
        preview: Callable[[int, list[Image.Image]], Any] | None = None,
        preview_steps: int | None = None,
        preview_decoder: Any = None,
        **options: Unpack[Options],
    ) -> StableDiffusionPipelineOutput | tuple[Any]:
        """Repaint images.

        Prompts, images and depth maps are paired in order; fewer of one kind are repeated, if their number divides the
        largest.

        Args:
            prompt: what the pictures should show.
            image: to start from: PIL images, arrays or tensors (see `depthdiff.image.read_images`), or latents
                (B, 4, h, w), for which `depth_map` is needed. Without one, the pictures start from pure noise, with the
                size of the depth map, and `strength` is 1 whatever is given.
            depth_map: near is large, in any unit, NaN is the sky: PIL images, arrays or tensors (see
                `depthdiff.depth_maps.read_disparity`); estimated from `image` if None.
            strength: in [0, 1], how far to go from the image: the share of the steps that is run.
            num_inference_steps: of a whole run, at strength 1.
            guidance_scale: how closely to follow the prompt, one number or one a picture; guidance is on above 1.
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
            hires: in [1, 4], repaint the result once more, so many times larger, with the same depth; see `enlarge`.
                Steps are counted from 0 again, also for callbacks.
            hires_strength: of that second pass (0.35 if None).
            preview: called with a step's index and pictures of what it predicts as the end, while they are in the
                making; see `preview`.
            preview_steps: every how many steps (5 if None).
            preview_decoder: for these pictures; fitted on the autoencoder if None.
            **options: more options, see `depthdiff.call_options.CallOptions`; or an argument of other pipelines in
                `depthdiff.arguments.CALL`, which is ignored with a warning.

        Raises:
            TypeError: an unknown argument, or one of a wrong type.
            ValueError: a value out of range, or arguments that do not fit each other.
            FloatingPointError: NaN or infinity in the work; names the stage that they come from.
        """
        more = sort_out(StableDiffusionDepth2ImgPipeline.__call__, CALL, options, NAMES)
        callback_steps, names = check_callbacks(
            callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        output_type = read_output_type(output_type)
        return_dict = check_flag("return_dict", return_dict)
        hires, hires_strength = read_hires(hires, hires_strength)

        watch = self._watch(preview, preview_steps, preview_decoder)
        with self._interruption.under_way(Stop()) as stop:
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
                **more,
            )
            for enlarged in (False, True)[: 1 if hires is None else 2]:
                if enlarged and stop.asked:
                    break
                run = self.enlarge(run, hires, hires_strength) if enlarged else run
                run.stop, self._call.num_timesteps = stop, len(run)
                for step in self.progress_bar(self.denoise(run), total=len(run)):
                    if callback_on_step_end is not None:
                        call_back(callback_on_step_end, names, self, run, step)
                    if callback is not None and run.ends_step(step.index) and step.index % callback_steps == 0:
                        callback(step.index // run.order, step.timestep, step.latents)
                    watch(step)
        images = self.decode(run if run.shapes_the_picture else run.latents, output_type)
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
        guidance_scale: float | Sequence[float] = 7.5,
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
        **options: Unpack[Options],
    ) -> Run:
        """Do everything that comes before the first step. Arguments and errors as in `__call__`."""
        chosen = read_options(StableDiffusionDepth2ImgPipeline.prepare, {}, options)
        approximations = resolve_preset(
            preset, guidance_interval=guidance_interval, deep_cache=deep_cache, token_merging=token_merging
        )
        self.check_inputs(prompt, strength, None, negative_prompt, prompt_embeds, negative_prompt_embeds)
        self._need("scheduler", "vae", "unet", *(() if depth_map is not None else self.FOR_DEPTH))
        numbers = read_numbers(
            strength, guidance_scale, num_images_per_prompt, num_inference_steps, eta, self.scheduler
        )
        strength, scale, num_images_per_prompt, num_inference_steps, eta = numbers
        strength = 1.0 if image is None and depth_map is not None else strength
        lora_scale, guided = check_kwargs(cross_attention_kwargs), is_guided(scale)
        check_prompts(self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip, guided)
        texts = [prompt] if isinstance(prompt, str) else prompt
        chosen.check(
            image, depth_map, strength, texts is not None or negative_prompt is not None, self.vae_scale_factor,
            approximations.deep_cache,
        )  # fmt: skip
        scene = read_scene(image, depth_map, chosen, self.vae_scale_factor)
        count = len(texts if texts is not None else prompt_embeds)  # type: ignore[arg-type]
        pictures = batch_size({**scene.counts, "prompt": count})
        batch, device, scene = pictures * num_images_per_prompt, self._execution_device, scene.paired(pictures)
        check_generator(generator, batch)
        check_scales(scale, batch)

        self._call.begin(scale, plain(clip_skip), cross_attention_kwargs, self._call.num_timesteps)
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
            **chosen.for_prompts,
        )
        depth = self._depth_of(scene, chosen, batch, guided, positive.dtype, device)
        run = Run(
            **self._start(
                scene, strength, num_inference_steps, pictures, num_images_per_prompt, positive.dtype, device, generator
            ),
            prompt_embeds=positive if negative is None else torch.cat([negative, positive]),
            depth=depth,
            guidance_scale=scale,
            generator=generator,
            eta=eta,
            cross_attention_kwargs=cross_attention_kwargs,
            approximations=approximations,
            guidance_rescale=chosen.guidance_rescale,
        )
        self._call.num_timesteps = len(run)
        return run

    @torch.no_grad()
    @uses_weights
    def enlarge(self, run: Run, factor: float | None = 1.5, strength: float | None = None) -> Run:
        """Prepare a second run that repaints the pictures of one, enlarged, with the same depth.

        Args:
            run: whose latents are as they are to be enlarged, as when it has ended.
            factor: in [1, 4], by which height and width grow.
            strength: of the second run (0.35 if None).

        Returns:
            A run for `denoise`; the given one stays as it is.
        """
        check_run(run)
        growth, strength = read_hires(factor, strength)
        assert growth is not None
        self._need("scheduler", "vae", "unet")
        height, width = (self.vae_scale_factor * max(1, round(side * growth)) for side in run.latents.shape[2:])
        pixels = enlarge(self.decode(run, "pt").float() * 2 - 1, height, width)
        scene = Scene((pixels + 1) / 2, None, None, (height, width), axes=run.seamless, windows=run.windows)
        if run.kept is not None:
            scene = replace(scene, mask=resize_maps(run.kept.sharp, height, width), blur=run.kept.blur * growth)
        device, steps = run.latents.device, run.scheduler.num_inference_steps
        started = self._start(scene, strength, steps, len(run.latents), 1, run.latents.dtype, device, run.generator)
        if run.kept is not None:  # the kept part is the image itself, not what it became
            started["kept"].pixels = enlarge(run.kept.pixels, height, width)
        depth = check_tensor("depth", run.depth, "(B, 1, h, w)", 4)  # which a callback may have replaced
        depth = F.interpolate(depth, size=started["latents"].shape[2:], mode="bicubic").clamp(-1, 1)
        return replace(run, **started, depth=depth, stop=Stop())

    @torch.no_grad()
    def denoise(self, run: Run) -> Iterator[Step]:
        """Walk through a prepared run.

        Yields:
            Each step once it is taken; what the caller assigns to its `latents`, or to those fields of the run that
            are read at every step (see `Run`), counts from the next step on. `run.latents` follows.
        """
        check_run(run)
        with self._in_use(ends_by_itself=False), self._interruption.under_way(run.stop) as stop:
            unet, made_of = self._unet_of(run)
            scheduler, extra = copy.deepcopy(run.scheduler), self.prepare_extra_step_kwargs(run.generator, run.eta)
            if type(scheduler) is not type(self.scheduler):  # the pipeline's was replaced after `prepare`
                extra = step_kwargs(scheduler, run.generator, run.eta)
            numbers = run.timesteps.cpu()  # once, so that the host need not wait for the device in every step
            for index, (timestep, number) in enumerate(zip(run.timesteps, numbers, strict=True)):
                if stop.asked:
                    return
                latents = run.latents
                if made_of != self._unet_parts(run):
                    unet, made_of = self._unet_of(run)  # changed since the last step
                noise_pred = predict_noise(unet, scheduler, run, timestep, number)
                output = scheduler.step(noise_pred, number, latents, **extra)
                clean = denoised(scheduler, output, noise_pred, number, latents)
                step = Step(index, timestep, run.with_kept(output.prev_sample, index + 1), clean)
                check_first_step(step, run, noise_pred.dtype)
                run.latents = step.latents  # for the caller to see
                yield step
                run.latents = step.latents  # which the caller may have replaced
                if self._offload_whole:
                    self._at_work("unet")  # another network may have worked meanwhile

    def _unet_of(self, run: Run) -> tuple[Any, tuple[Any, ...]]:
        """Return the UNet as a run uses it, with its scale and approximations, and what it was made of."""
        made_of = self._unet_parts(run)
        unet = self._at_scale("unet", self._at_work("unet"), check_kwargs(run.cross_attention_kwargs))
        unet = seamless(approximated(unet, run.approximations), run.seamless)
        if unet is not self.unet and self._fast:
            speed.enable(unet)
        return unet, made_of

    def _unet_parts(self, run: Run) -> tuple[Any, ...]:
        """Return what the UNet of a run is made of."""
        return self.unet, self._adapters, run.cross_attention_kwargs, run.approximations, run.seamless

    @torch.no_grad()
    @uses_weights
    def decode(self, latents: Tensor | Run, output_type: Literal["pil", "np", "pt", "latent"] = "pil") -> Any:
        """Turn latents into pictures.

        Args:
            latents: (B, 4, h, w), on any device; or a run, whose pictures are then seamless, decoded in tiles, or have
                the kept part of the image pasted in, as it was prepared.
            output_type: see `__call__`.
        """
        output_type = read_output_type(output_type)
        self._need("vae")
        run, latents = (latents, latents.latents) if isinstance(latents, Run) else (None, latents)
        check_latents(latents, self.vae.config.latent_channels)
        if output_type == "latent":
            return check_finite(latents, "the latents")
        vae = self._at_work("vae") if run is None else self._vae_of(run.seamless, run.windows)
        scaled = latents.to(self._execution_device) / self.vae.config.scaling_factor
        pixels = finite("vae", vae, lambda net: net.decode(scaled.to(dtype_of(net)), return_dict=False)[0], scaled)
        if run is not None and run.kept is not None:
            pixels = run.kept.paste(pixels)
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Turn latents (B, 4, h, w) into an array (B, H, W, 3), float32, in [0, 1]."""
        return self.decode(latents, "np")
