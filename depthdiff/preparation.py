"""The steps before the loop: check, read the prompt, find the depth, choose the timesteps, make the first latents.

Each is a method with the name and signature of diffusers' pipeline; a subclass may override any of them.

Letters: B pictures, N images, L tokens, C channels, H, W pixels, h, w latents.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

import depthdiff.fast as speed
from depthdiff.call_options import CallOptions
from depthdiff.checks import check_flag
from depthdiff.conditioning import Ends, draw_latents, encode_images, fit_depth
from depthdiff.depth_maps import read_disparity
from depthdiff.devices import dtype_of, uses_weights
from depthdiff.estimators import call_function, cut_padding, keeping_aspect
from depthdiff.image import ImageInput, from_pixels, image_size, is_latents, read_images, to_pil
from depthdiff.inputs import (
    check_callbacks,
    check_prompt,
    read_numbers,
)
from depthdiff.masks import Kept, keep
from depthdiff.noise import randn
from depthdiff.parts import is_function
from depthdiff.precision import finite
from depthdiff.previews import PreviewMixin
from depthdiff.prompts import PromptMixin
from depthdiff.run import step_kwargs
from depthdiff.scene import Scene
from depthdiff.seamless import seamless
from depthdiff.single_files import FromSingleFileMixin
from depthdiff.windows import tiled


class PreparationMixin(PromptMixin, PreviewMixin, FromSingleFileMixin):
    """Adds to the components what a call does before its first step."""

    FOR_DEPTH = "feature_extractor", "depth_estimator"

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
    def prepare_depth_map(
        self,
        image: ImageInput,
        depth_map: ImageInput | None,
        batch_size: int,
        do_classifier_free_guidance: bool,
        dtype: torch.dtype,
        device: torch.device,
        ends: Ends = None,
    ) -> Tensor:
        """Estimate the depth where it is not given, and resize it to the latents' size.

        Args:
            image: see `__call__`.
            depth_map: see `__call__`; NaN and minus infinity are the sky (see `depthdiff.depth_maps.read_disparity`).
            batch_size: B.
            do_classifier_free_guidance: whether each map is needed twice.
            dtype: of the result.
            device: of the result.
            ends: what becomes -1 and 1, see `depthdiff.conditioning.normalize_depth`; each map's own extremes if None.

        Returns:
            (B, 1, h, w), or (2B, 1, h, w) with guidance, in [-1, 1], near is large.
        """
        if is_latents(image):
            height, width = image[0].shape[-2:]  # type: ignore[index, union-attr]
        else:
            height, width = (side // self.vae_scale_factor for side in image_size(read_images(image)))
        disparity = read_disparity(
            self.estimate_depth(image) if depth_map is None else depth_map,
            name="the estimated depth" if depth_map is None else "depth_map",
        )
        depth = fit_depth(disparity.to(device, torch.float32), height, width, ends).to(dtype)
        depth = depth.repeat_interleave(batch_size // len(depth), dim=0)
        return torch.cat([depth] * 2) if do_classifier_free_guidance else depth

    @torch.no_grad()
    @uses_weights
    def estimate_depth(self, image: ImageInput, keep_aspect: bool = False) -> Tensor:
        """Estimate the depth of images by the pipeline's depth estimator.

            disparity = pipe.estimate_depth(photo)  # (1, 384, 384) by the published checkpoint
            pipe("two tigers", photo, depth_map=disparity)

        Args:
            image: N images, see `__call__`.
            keep_aspect: resize as Stability's own script does: both sides by one factor, to about the image
                processor's size (384), and then to multiples of 32, or of what the processor asks for. Off by default:
                the processor's own way, which stretches images to 384x384, is that of diffusers.

        Returns:
            (N, H', W'), in the estimator's own size and unit: relative disparity, near is large, for the published
            checkpoint and for Depth Anything; metres, far is large, for ZoeDepth, whose padding is cut off; whatever a
            plain function returns, float32.

        Raises:
            TypeError: a `feature_extractor` that cannot keep the aspect, or a function that returns no map.
            ValueError: a bad image (see `depthdiff.image.read_images`) or map of a function, or `keep_aspect` for a
                function, which resizes by itself.
            FloatingPointError: NaN or infinity in the depth net.
        """
        keep_aspect = check_flag("keep_aspect", keep_aspect)
        self._need(*self.FOR_DEPTH)
        images = read_images(image)
        if is_function(self.depth_estimator):
            if keep_aspect:
                raise ValueError("keep_aspect must be False where depth_estimator is a function: it resizes by itself")
            return call_function(self.depth_estimator, to_pil(images))
        processor = keeping_aspect(self.feature_extractor) if keep_aspect else self.feature_extractor
        net, device = self._at_work("depth_estimator"), self._execution_device
        pixels = processor(images=to_pil(images), return_tensors="pt").pixel_values
        depth = finite("depth_estimator", net, lambda net: net(pixels.to(device, dtype_of(net))).predicted_depth)
        return cut_padding(self.feature_extractor, depth, *image_size(images))

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
        vae: Any = None,
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
            vae: to encode with, instead of the pipeline's.

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
            vae, config = self._at_work("vae") if vae is None else vae, self.vae.config
            encoded = finite("vae", vae, lambda net: encode_images(net, image.to(device, dtype_of(net)))).to(dtype)
            latents = config.scaling_factor * draw_latents(encoded, config.latent_channels, generator, copies)
        if not len(timestep):
            return latents
        noise = randn(latents.shape, generator, device=device, dtype=dtype)
        return self.scheduler.add_noise(latents, noise, timestep)

    def _depth_of(
        self,
        scene: Scene,
        options: CallOptions,
        batch: int,
        guided: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Find the depth of a scene; the result is that of `prepare_depth_map`."""
        image, depth_map = scene.image, scene.depth_map
        if depth_map is None and (options.reads_depth or options.depth_keep_aspect):
            estimate = self.estimate_depth(image, options.depth_keep_aspect)  # type: ignore[arg-type]
            name = "the estimated depth"
            depth_map = read_disparity(estimate, options.depth_invert, options.depth_range, name)
        if image is None:  # only its size counts where the depth is given
            image = torch.zeros(1, 4, *(side // self.vae_scale_factor for side in scene.size))
        if options.for_depth:
            self._check_override("prepare_depth_map", "ends", "depth_range and depth_normalize")
        return self.prepare_depth_map(image, depth_map, batch, guided, dtype, device, **options.for_depth)

    def _check_override(self, method: str, argument: str, options: str) -> None:
        """Refuse options that an override of a method with diffusers' arguments alone cannot know."""
        if argument not in inspect.signature(getattr(self, method)).parameters:
            raise ValueError(
                f"{options} need an argument {argument} of {method}, which {type(self).__name__} overrides without it; "
                f"let it take {argument}=None and pass it on"
            )

    def _start(
        self,
        scene: Scene,
        strength: float,
        num_inference_steps: int,
        pictures: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generator | Sequence[Generator] | None,
    ) -> dict[str, Any]:
        """Plan the steps and make the first latents; return the fields of a run that follow from that."""
        pixels = None if scene.image is None else self.image_processor.preprocess(scene.image)
        if scene.mask is not None or scene.axes or scene.windows:
            self._check_override("prepare_latents", "vae", "mask_image, seamless and windows")
        vae = {"vae": self._vae_of(scene.axes, scene.windows)} if scene.axes or scene.windows else {}
        each: Any = pictures, num_images_per_prompt, dtype, device, generator
        batch, kept = pictures * num_images_per_prompt, None
        with self._planning:  # calls share the scheduler, which holds the timesteps of one run at a time
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            timesteps, num_inference_steps = self.get_timesteps(num_inference_steps, strength, device)
            if scene.mask is not None:
                assert pixels is not None
                clean = self.prepare_latents(pixels, timesteps[:0].repeat(batch), *each, **vae)
                noise = randn(clean.shape, generator, device=device, dtype=dtype)
                kept = keep(scene.mask, pixels, clean, noise, scene.blur, self.vae_scale_factor)
                latents = self._masked_start(scene, kept, timesteps[:1].repeat(batch), generator)
            elif scene.pure_noise:
                shape = batch, self.vae.config.latent_channels, *(side // self.vae_scale_factor for side in scene.size)
                latents = randn(shape, generator, device=device, dtype=dtype) * self.scheduler.init_noise_sigma
            else:
                assert pixels is not None
                latents = self.prepare_latents(pixels, timesteps[:1].repeat(batch), *each, **vae)
            scheduler = copy.deepcopy(self.scheduler)
        return {
            "scheduler": scheduler,
            "timesteps": timesteps,
            "num_inference_steps": num_inference_steps,
            "latents": latents,
            "kept": kept,
            "seamless": scene.axes,
            "windows": scene.windows,
        }

    def _masked_start(
        self, scene: Scene, kept: Kept, timestep: Tensor, generator: Generator | Sequence[Generator] | None
    ) -> Tensor:
        """Make the first latents (B, 4, h, w) of a run with a mask; `timestep` is empty where no step is run."""
        clean, noise = kept.clean, kept.noise
        if not len(timestep):
            return clean
        content = clean
        if scene.noisy_content:
            content = kept.put_back(randn(clean.shape, generator, device=clean.device, dtype=clean.dtype), clean)
        if scene.pure_noise:
            latents = noise * self.scheduler.init_noise_sigma
        else:
            latents = self.scheduler.add_noise(content, noise, timestep)
        return kept.put_back(latents, self.scheduler.add_noise(clean, noise, timestep))

    def _vae_of(self, axes: str, windows: tuple[int, int] | None) -> Any:
        """Return the autoencoder as a run uses it: seamless along some axes, in tiles as large as its windows."""
        vae = seamless(self._at_work("vae"), axes)
        if windows is not None:
            vae = tiled(vae, windows[0], self.vae_scale_factor)
        if vae is not self.vae and self._fast:
            speed.enable(vae)
        return vae

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """Return `eta` and `generator`, as far as the scheduler's `step` accepts them."""
        return step_kwargs(self.scheduler, generator, eta)

    # What else diffusers' class has

    def run_safety_checker(self, image: Any, device: Any, dtype: Any) -> tuple[Any, None]:
        """Return the images as they are, and None: no safety check runs."""
        return image, None

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Turn an array (B, H, W, 3) or (H, W, 3) in [0, 1] into PIL images."""
        batch = torch.from_numpy(np.asarray(images, np.float32).reshape(-1, *images.shape[-3:]))
        return from_pixels(2 * batch.movedim(3, 1) - 1)  # type: ignore[return-value]
