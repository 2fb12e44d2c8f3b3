"""Train a LoRA on a handful of images, and save it in the layout that diffusers loads.

    python scripts/train_lora.py PHOTOS OUT --prompt "a blueprint drawing"     # PHOTOS: a folder of pictures

Of each picture `x.png` the words are those in `x.txt`, if there is such a file, with the prompt after them. On the
bundled model and two cores 150 steps take about half a minute. Source: arXiv:2106.09685.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from depthdiff import StableDiffusionDepth2ImgPipeline
from depthdiff.conditioning import fit_depth
from depthdiff.image import read_images, to_pixels

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
TARGETS = (*ATTENTION, ".conv1", ".conv2")
BATCH = 4


class LowRank(nn.Module):
    """Adds up @ down to a weight (O, I, *K); up begins at zero, so that training begins at the model as it is."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2)))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight + (self.up.flatten(1) @ self.down.flatten(1)).view_as(weight)


def add_layers(network: nn.Module, rank: int) -> dict[str, LowRank]:
    """Freeze a network and put trainable layers beside its attention and convolutions; by module path."""
    network.requires_grad_(False)
    layers = {}
    for name, module in list(network.named_modules()):
        if name.endswith(TARGETS):
            layers[name] = LowRank(module.weight, rank)
            parametrize.register_parametrization(module, "weight", layers[name])
    return layers


@torch.no_grad()
def load_examples(
    pipe: StableDiffusionDepth2ImgPipeline, folder: Path, prompt: str
) -> tuple[Tensor, Tensor, list[str]]:
    """Bring pictures to latents (N, 4, h, w), depth (N, 1, h, w) and words."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions())
    if not paths:
        raise SystemExit(f"{folder} has no pictures")
    latents, depths, words = [], [], []
    for path in paths:
        picture = read_images(Image.open(path))[0].resize((side, side))
        posterior = pipe.vae.encode(to_pixels([picture], pipe.vae_scale_factor)).latent_dist
        latents.append(posterior.mode() * pipe.vae.config.scaling_factor)
        depths.append(fit_depth(pipe.estimate_depth(picture), *latents[-1].shape[2:]))
        text = path.with_suffix(".txt")
        words.append(", ".join(filter(None, [text.read_text().strip() if text.exists() else "", prompt])))
    return torch.cat(latents), torch.cat(depths), words


def train(
    pipe: StableDiffusionDepth2ImgPipeline, folder: Path, prompt: str, *, rank: int, steps: int, rate: float
) -> dict[str, dict[str, Tensor]]:
    """Fit the layers; return them by component, under published names."""
    latents, depths, words = load_examples(pipe, folder, prompt)
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    layers = {component: add_layers(network, rank) for component, network in networks.items()}
    parameters = [p for group in layers.values() for layer in group.values() for p in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    scheduler = pipe.scheduler
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        flip = torch.rand((), generator=generator) < 0.5
        clean, depth = ((x[index].flip(3) if flip else x[index]) for x in (latents, depths))
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        a = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = a**0.5 * noise - (1 - a) ** 0.5 * clean if velocity else noise
        ids = pipe.tokenizer(
            [words[i] for i in index], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        prompt_embeds = pipe.text_encoder(ids).last_hidden_state
        loss = F.mse_loss(pipe.unet(torch.cat([noisy, depth], 1), timesteps, prompt_embeds).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return {component: published(group) for component, group in layers.items()}


def published(layers: dict[str, LowRank]) -> dict[str, Tensor]:
    """Name the layers' weights as diffusers does."""
    state = {}
    for name, layer in layers.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = layer.down.detach(), layer.up.detach()
    return state


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", required=True, help="the words for what is common to the pictures")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(options.model)
    layers = train(pipe, options.photos, options.prompt, rank=options.rank, steps=options.steps, rate=options.rate)
    pipe.save_lora_weights(options.out, layers["unet"], layers["text_encoder"])
    print(options.out / "pytorch_lora_weights.safetensors")


if __name__ == "__main__":
    main()
