"""In the manner of a research repository whose pipeline is a subclass with a copied and changed `__call__`."""

import torch
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image

SEED = 0


class RescaledGuidancePipeline(StableDiffusionDepth2ImgPipeline):
    """Adds guidance rescale, which the published call lacks."""

    @torch.no_grad()
    def __call__(self, prompt, image, depth_map=None, strength=0.8, num_inference_steps=50, guidance_scale=7.5,
                 negative_prompt=None, num_images_per_prompt=1, eta=0.0, generator=None, guidance_rescale=0.7,
                 output_type="pil", callback=None, callback_steps=1):  # fmt: skip
        self.check_inputs(prompt, strength, callback_steps, negative_prompt=negative_prompt)
        batch_size = 1 if isinstance(prompt, str) else len(prompt)
        device = self._execution_device
        do_classifier_free_guidance = guidance_scale > 1.0
        prompt_embeds, negative_embeds = self.encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt
        )
        if do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_embeds, prompt_embeds])
        rows = batch_size * num_images_per_prompt
        depth_mask = self.prepare_depth_map(
            image, depth_map, rows, do_classifier_free_guidance, prompt_embeds.dtype, device
        )
        image = self.image_processor.preprocess(image)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps, num_inference_steps = self.get_timesteps(num_inference_steps, strength, device)
        latent_timestep = timesteps[:1].repeat(rows)
        latents = self.prepare_latents(
            image, latent_timestep, batch_size, num_images_per_prompt, prompt_embeds.dtype, device, generator
        )
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                x = torch.cat([latents] * 2) if do_classifier_free_guidance else latents
                x = self.scheduler.scale_model_input(x, t)
                x = torch.cat([x, depth_mask], dim=1)
                noise_pred = self.unet(x, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
                uncond, text = noise_pred.chunk(2)
                noise_pred = uncond + guidance_scale * (text - uncond)
                ratio = text.std(dim=(1, 2, 3), keepdim=True) / noise_pred.std(dim=(1, 2, 3), keepdim=True)
                noise_pred = guidance_rescale * noise_pred * ratio + (1 - guidance_rescale) * noise_pred
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs).prev_sample
                if i == len(timesteps) - 1 or (i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0:
                    progress_bar.update()
        image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return self.image_processor.postprocess(image, output_type=output_type)


def main(checkpoint, photo):
    pipe, image = RescaledGuidancePipeline.from_pretrained(checkpoint), Image.open(photo).convert("RGB")
    first = pipe("a tiger", image, num_inference_steps=5, generator=torch.manual_seed(SEED), output_type="np")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return first, pipe(["a", "b"], image, None, 0.5, 6, eta=0.5, generator=torch.manual_seed(SEED), output_type="np")
