"""Teach the model one thing from a few pictures, without forgetting its kind: DreamBooth. Saves the pipeline.

    python examples/train_dreambooth.py PHOTOS OUT --prompt "a sks ball" --class-prompt "a ball"

With --class-prompt, half of each batch are pictures of the kind: those in CLASS, which the model first paints over the
geometry of PHOTOS until there are --class-count. OUT is a folder that depthdiff and diffusers load.
Source: arXiv:2208.12242.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate
from training import Photos, add_noise, find_photos, make_loader, make_parser, positive, start, train

from depthdiff import CLIPTextModel, StableDiffusionDepth2ImgPipeline, UNet2DConditionModel

CLASSES: dict[str, Any] = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


def paint_class(pipe: StableDiffusionDepth2ImgPipeline, photos: Photos, options: argparse.Namespace) -> None:
    """Paint pictures of the kind until there are enough."""
    options.class_photos.mkdir(parents=True, exist_ok=True)
    for number in range(len(find_photos(options.class_photos)), options.class_count):
        scene = photos.picture(photos.paths[number % len(photos.paths)])
        generator = torch.Generator().manual_seed(number)
        painted = pipe(options.class_prompt, scene, strength=1.0, num_inference_steps=20, generator=generator).images[0]
        painted.save(options.class_photos / f"class-{number}.png")


def main(arguments: list[str] | None = None) -> list[float]:
    """Run the program, and return the losses."""
    parser = make_parser(__doc__, steps=200, rate=5e-5)
    parser.add_argument("--prompt", required=True, help="the words for the thing, with a rare one, such as sks")
    parser.add_argument("--class-prompt", help="the words for its kind; without it nothing guards the kind")
    parser.add_argument("--class-photos", type=Path, help="the folder CLASS of the kind's pictures (OUT/class)")
    parser.add_argument("--class-count", type=positive, default=8, help="pictures to have there (8)")
    parser.add_argument("--class-weight", type=float, default=1.0, help="of the kind's loss (1)")
    parser.add_argument("--train-text-encoder", action="store_true")
    options = parser.parse_args(arguments)
    options.class_photos = options.class_photos or options.out / "class"
    if options.class_photos.exists() and not options.class_photos.is_dir():
        parser.error(f"--class-photos must be a folder, {options.class_photos} is a file")
    pipe, accelerator = start(options)
    photos: Any = Photos(pipe, options, options.prompt)
    pairs: Any = photos
    if options.class_prompt:  # half of each batch: pairs of a photo and a picture of the kind
        if accelerator.is_main_process:
            paint_class(pipe, photos, options)
        accelerator.wait_for_everyone()
        kind = Photos(pipe, options, options.class_prompt, options.class_photos)
        pairs = [(photos[i % len(photos)], kind[i % len(kind)]) for i in range(max(len(photos), len(kind)))]

    def collate(examples: list[Any]) -> Any:
        """Put the kind's pictures behind those of the thing."""
        return default_collate([one for side in zip(*examples, strict=True) for one in side])

    networks = {name: getattr(pipe, name) for name in CLASSES if name == "unet" or options.train_text_encoder}
    for name in ("vae", "text_encoder", "unet"):
        getattr(pipe, name).requires_grad_(name in networks)
        getattr(pipe, name).train(name in networks)
    if options.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.text_encoder.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for n in networks.values() for p in n.parameters()], lr=options.rate)
    loader = make_loader(pairs, options, accelerator, collate_fn=collate if options.class_prompt else None)
    *prepared, optimizer, loader = accelerator.prepare(*networks.values(), optimizer, loader)
    trained = dict(zip(networks, prepared, strict=True))
    unet, text_encoder = trained["unet"], trained.get("text_encoder", pipe.text_encoder)

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        """Write the networks in their published layout, not in accelerate's."""
        for model in models:
            name = "unet" if isinstance(model, UNet2DConditionModel) else "text_encoder"
            model.save_pretrained(Path(folder) / name)
            weights.pop()

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        for name, network in networks.items():
            network.load_state_dict(CLASSES[name].from_pretrained(folder, subfolder=name).state_dict())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)

    def compute_loss(batch: dict[str, Tensor]) -> Tensor:
        noisy, timesteps, target = add_noise(pipe, batch)
        predicted = unet(noisy, timesteps, encoder_hidden_states=text_encoder(batch["input_ids"])[0]).sample.float()
        if not options.class_prompt:
            return F.mse_loss(predicted, target)
        (thing, kind), (thing_target, kind_target) = predicted.chunk(2), target.chunk(2)
        return F.mse_loss(thing, thing_target) + options.class_weight * F.mse_loss(kind, kind_target)

    losses = train(accelerator, options, list(trained.values()), optimizer, loader, compute_loss)
    if accelerator.is_main_process:
        pipe.save_pretrained(options.out)
        print(options.out)
    return losses


if __name__ == "__main__":
    main()
