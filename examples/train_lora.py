"""Train a LoRA on a handful of pictures, and save it in the layout that diffusers loads.

    python examples/train_lora.py PHOTOS OUT --prompt "blueprint"

PHOTOS holds pictures, and of x.png the words in x.txt, if there are any; the prompt follows them. OUT holds
`pytorch_lora_weights.safetensors` afterwards. Source: arXiv:2106.09685.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from training import Photos, add_noise, make_loader, make_parser, positive, start, train

FILE = "pytorch_lora_weights.safetensors"
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


def main(arguments: list[str] | None = None) -> list[float]:
    """Run the program, and return the losses."""
    parser = make_parser(__doc__, steps=150, rate=2e-3)
    parser.add_argument("--prompt", required=True, help="the words for what is common to the pictures")
    parser.add_argument("--rank", type=positive, default=8, help="of the added matrices (8)")
    options = parser.parse_args(arguments)
    pipe, accelerator = start(options)
    photos = Photos(pipe, options, options.prompt)

    pipe.vae.requires_grad_(False)
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for name, network in networks.items():
        network.requires_grad_(False)
        network.train()
        network.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS[name]))
    if options.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.text_encoder.gradient_checkpointing_enable()
    layers = [p for p in itertools.chain(*(n.parameters() for n in networks.values())) if p.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=options.rate, weight_decay=0.0)
    loader = make_loader(photos, options, accelerator)
    unet, text_encoder, optimizer, loader = accelerator.prepare(pipe.unet, pipe.text_encoder, optimizer, loader)

    def write(folder: Path) -> None:
        states = {
            name: get_peft_model_state_dict(accelerator.unwrap_model(network))
            for name, network in {"unet": unet, "text_encoder": text_encoder}.items()
        }
        pipe.save_lora_weights(
            folder, unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"], weight_name=FILE
        )

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        """Write the added layers alone."""
        write(Path(folder))
        weights.clear()

    def load(models: list[Any], folder: str) -> None:
        state = load_file(Path(folder) / FILE)
        models.clear()
        for name, network in networks.items():
            prefix = f"{name}."
            mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            set_peft_model_state_dict(network, mine)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)

    def compute_loss(batch: dict[str, Tensor]) -> Tensor:
        noisy, timesteps, target = add_noise(pipe, batch)
        prompt_embeds = text_encoder(batch["input_ids"])[0]
        return F.mse_loss(unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample.float(), target)

    losses = train(accelerator, options, [unet, text_encoder], optimizer, loader, compute_loss)
    if accelerator.is_main_process:
        write(options.out)
        print(options.out / FILE)
    return losses


if __name__ == "__main__":
    main()
