"""Fine-tune the whole UNet on pictures with words, and save the pipeline.

    python examples/train_text_to_image.py PHOTOS OUT --steps 200

PHOTOS holds pictures, and of x.png the words in x.txt. OUT is a folder that depthdiff and diffusers load. Saved are the
moving average of the weights over the steps, unless --ema 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import Photos, add_noise, make_loader, make_parser, start, train

from depthdiff import UNet2DConditionModel


def main(arguments: list[str] | None = None) -> list[float]:
    """Run the program, and return the losses."""
    parser = make_parser(__doc__, steps=200, rate=1e-4)
    parser.add_argument("--prompt", default="", help="words to put behind those of every picture")
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the moving average; 0 for none (0.99)")
    options = parser.parse_args(arguments)
    if not 0 <= options.ema < 1:
        parser.error(f"--ema must be in [0, 1), got {options.ema}")
    pipe, accelerator = start(options)
    photos = Photos(pipe, options, options.prompt)

    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.train()
    if options.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    average = AveragedModel(pipe.unet, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=options.rate, weight_decay=1e-2)
    loader = make_loader(photos, options, accelerator)
    unet, optimizer, loader = accelerator.prepare(pipe.unet, optimizer, loader)
    accelerator.register_for_checkpointing(average)

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        """Write the UNet in its published layout, not in accelerate's."""
        for model in models:
            model.save_pretrained(Path(folder) / "unet")
            weights.pop()

    def load(models: list[Any], folder: str) -> None:
        while models:
            model = models.pop()
            loaded = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
            model.register_to_config(**loaded.config)
            model.load_state_dict(loaded.state_dict())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)

    def compute_loss(batch: dict[str, Tensor]) -> Tensor:
        noisy, timesteps, target = add_noise(pipe, batch)
        prompt_embeds = pipe.text_encoder(batch["input_ids"])[0]
        return F.mse_loss(unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample.float(), target)

    def after_step() -> None:
        average.update_parameters(accelerator.unwrap_model(unet))

    losses = train(accelerator, options, [unet], optimizer, loader, compute_loss, after_step)
    if accelerator.is_main_process:
        pipe.unet = average.module
        pipe.save_pretrained(options.out)
        print(options.out)
    return losses


if __name__ == "__main__":
    main()
