"""In the manner of a desktop GUI: settings in a form, a menu of schedulers, a history of what was made."""

import diffusers
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SEED = 0
SCHEDULERS = ("DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler")


class Session:
    """What the window holds."""

    def __init__(self, checkpoint):
        self.pipe = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
        self.default_config = dict(self.pipe.scheduler.config)
        self.history, self.status = [], []

    def choose(self, name):
        if self.pipe.scheduler.__class__.__name__ != name:
            self.pipe.scheduler = getattr(diffusers, name).from_config(self.pipe.scheduler.config)

    def on_step(self, pipe, step, timestep, kwargs):
        self.status.append(f"{step + 1}/{pipe.num_timesteps}")
        return kwargs

    def generate(self, image, prompt, negative="", steps=4, scale=7.0, strength=0.7, eta=0.0):
        settings = dict(prompt=prompt, negative_prompt=negative, num_inference_steps=steps, guidance_scale=scale)
        result = self.pipe(
            **settings, image=image, strength=strength, eta=eta, generator=torch.Generator().manual_seed(SEED),
            callback_on_step_end=self.on_step, output_type="np",
        ).images[0]  # fmt: skip
        picture = self.pipe.numpy_to_pil(result)[0]
        info = PngInfo()
        info.add_text("parameters", f"{prompt} | {steps} | {self.pipe.scheduler.config._class_name}"
                      if "_class_name" in self.pipe.scheduler.config else prompt)  # fmt: skip
        picture.save(f"{len(self.history):03}.png", pnginfo=info)
        self.history.append(result)
        return result


def main(checkpoint, photo):
    session, image = Session(checkpoint), Image.open(photo).convert("RGB")
    for name in (*SCHEDULERS, *reversed(SCHEDULERS)):
        session.choose(name)
        session.generate(image, "a harbour", "fog", eta=0.3 if name == "DDIMScheduler" else 0.0)
        saved = Image.open(f"{len(session.history) - 1:03}.png")
        assert saved.text["parameters"].startswith("a harbour")
    for key, value in session.default_config.items():
        if not key.startswith("_"):
            assert session.pipe.scheduler.config[key] == value, key
    session.pipe.set_progress_bar_config(leave=False)
    again = session.generate(Image.open(photo), "a castle", steps=3, strength=1.0)
    return {"history": session.history, "last": again, "steps": float(len(session.status))}
