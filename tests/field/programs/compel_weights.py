"""In the manner of a prompt-weighting program with compel: weights, blends, and prompts beyond 77 tokens."""

import torch
from compel import Compel
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image

SEED = 0


def main(checkpoint, photo):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    compel = Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=False, device="cpu")
    image, results = Image.open(photo).convert("RGB"), {}

    def paint(positive, negative="", **kwargs):
        with torch.no_grad():
            conditioning = compel.build_conditioning_tensor(positive)
            negative_conditioning = compel.build_conditioning_tensor(negative)
            padded = compel.pad_conditioning_tensors_to_same_length([conditioning, negative_conditioning])
        generator = torch.Generator().manual_seed(SEED)
        return pipe(
            prompt_embeds=padded[0], negative_prompt_embeds=padded[1], image=image, strength=0.7, generator=generator,
            num_inference_steps=4, output_type="np", **kwargs,
        ).images[0], padded[0]  # fmt: skip

    for name, text in {
        "plain": "a red cat playing with a ball",
        "more": "a (red)1.6 cat playing with a ball++",
        "less": "a red- cat playing with a (ball)0.3",
        "blend": '("a red cat", "an old wooden ship at sea").blend(0.7, 0.4)',
    }.items():
        results[name] = paint(text)
    long = "a red cat playing with a ball, " * 12
    results["long"] = paint(long, "bad, deformed, ugly, bad anatomy")
    results["long negative"] = paint("a (cat)1.2", long, guidance_scale=5.0, num_images_per_prompt=2)
    assert results["long"][1].shape[1] > 77
    batch = compel(["a red cat++", "a wooden ship"])
    results["batch"] = pipe(
        prompt_embeds=batch, negative_prompt_embeds=compel(["", ""]), image=[image, image], num_inference_steps=3,
        generator=[torch.Generator().manual_seed(SEED + i) for i in range(2)], output_type="np",
    ).images  # fmt: skip
    return results
