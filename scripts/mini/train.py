"""Train the bundled model, from nothing, in one command: scenes, autoencoder, depth net, then text encoder and UNet.

    python scripts/mini/train.py                          # all stages, into runs/mini; goes on where it stopped
    python scripts/mini/train.py --stage unet --run DIR   # one stage
    python scripts/mini/train.py --from weights/mini --run DIR   # train text encoder and UNet of a model further

Every stage saves as it goes and resumes; a step's random numbers depend on its number alone, so that a run that was
broken off ends at the weights of an unbroken one. Losses are logged to DIR/log.txt. The model is written to DIR/model
whenever the last stage saves, and in the end in half precision to DIR/mini. CPU or GPU; bfloat16 where that is enough.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from binding import Guesses, facts, looking_loss, name_tokens, watch_words
from scenes import MAX_OBJECTS, SIZE, caption, random_scene, render, repaint, to_pictures, worded
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Generator, Tensor, nn

from depthdiff import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    DDIMScheduler,
    DPTForDepthEstimation,
    DPTImageProcessor,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
)
from depthdiff.conditioning import fit_depth

LOOKS = 2
"""Pictures of each geometry: the same depth under other words."""

LOOK_SEED = 10_000_000
DISPARITY_SCALE = 10.0
"""Brings the disparity of the scenes to about 1..5, which a network learns easily; depth is relative anyway."""

SWAPPED, SWAPPED_FROM = 0.7, 600
"""Share of noisy pictures, from this timestep on, that begin at another look of the same geometry, as a call with a
strength below 1 does: so the model learns to believe the words rather than the colours that shine through the noise.
A call at full strength does so too, since the noise of Stable Diffusion's schedule never hides everything."""

NOISY, NOISY_FROM = 0.6, 700
"""Share of timesteps that are drawn from this one on, in place of all. An object's colour is the mean of many latents,
so that noise hides it only there, and only there words have to tell it. Source: arXiv:2301.11093, sec. 2.3, which moves
the schedule for the same reason; Stable Diffusion's own is kept here, so that its schedulers fit."""

CROWDED, ALIKE = 0.3, 0.3
"""Shares of pictures that are drawn from those that show three and four objects alone, or two objects of one shape, in
place of all: one object gets its colour soon, and which of several is meant is what takes long to learn. Of the objects
that got a wrong colour, nearly half stood beside one of their own shape."""

BINDING = 0.3
"""Weight of the loss that teaches an object's places to look at the words that name it. Without it each colour of a
caption was painted, but on any of the objects: 90 % of them had a colour of the caption, 35 % their own."""

GUESSING = 0.1
"""Weight of each of the losses that teach queries to tell the shape and the place of an object, and words its colour.
Until these came, and the words that tell a side were what is to be looked at (`binding.name_tokens`), "on the left" was
not learnt: of two objects of one shape 37 % got their own colour, 50 % the other's."""

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
TOKENS = 48
DROPOUT = 0.1
"""Share of empty prompts in training, for guidance. Source: arXiv:2207.12598, sec. 3.2."""

VAE = {
    "block_out_channels": [32, 48, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "scaling_factor": 1.0,
}
DEPTH = {
    "is_hybrid": True,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": SIZE,
    "neck_hidden_sizes": [32, 64, 64, 64],
    "fusion_hidden_size": 48,
    "backbone_out_indices": [0, 1, 2, 3],
    "readout_type": "project",
    "reassemble_factors": [1, 1, 1, 0.5],
    "neck_ignore_stages": [0, 1],
    "backbone_featmap_shape": [1, 96, 8, 8],
    "backbone_config": {
        "model_type": "bit",
        "hidden_sizes": [32, 64, 96],
        "depths": [1, 2, 2],
        "embedding_size": 16,
        "num_groups": 8,
        "layer_type": "bottleneck",
        "global_padding": "SAME",
        "embedding_dynamic_padding": True,
        "out_features": ["stage1", "stage2", "stage3"],
    },
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "hidden_act": "gelu",
}
UNET = {
    "sample_size": SIZE // 4,
    "in_channels": 5,
    "block_out_channels": [64, 128, 160],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4, 5],
    "cross_attention_dim": 128,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    geometries: int = 12_000
    vae_steps: int = 5_000
    depth_steps: int = 4_000
    unet_steps: int = 10_000
    batch: int = 16
    save_every: int = 250
    ema: float = 0.9995


TINY = Settings(geometries=8, vae_steps=20, depth_steps=20, unet_steps=20, batch=4, save_every=10, ema=0.9)
"""For tests: everything runs, nothing is learnt."""


def log(run: Path, text: str) -> None:
    """Print a line and append it to the log."""
    line = f"{time.strftime('%H:%M:%S')} {text}"
    print(line, flush=True)
    with (run / "log.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


# Data


def scene_of(index: int) -> Any:
    """Return the scene of a picture: LOOKS pictures have the same geometry."""
    geometry, look = divmod(index, LOOKS)
    scene = random_scene(geometry)
    return scene if look == 0 else repaint(scene, geometry + look * LOOK_SEED)


def render_chunk(indices: list[int]) -> tuple[list[int], dict[str, np.ndarray]]:
    """Render some pictures: bytes, disparity in half precision, which objects can be seen, as bits, and where."""
    torch.set_num_threads(1)
    result = render([scene_of(i) for i in indices])
    seen = sum(
        ((result.mask == k + 1).sum((1, 2)) >= 12).to(torch.uint8) << k for k in range(4)
    )  # an object of a few pixels is not named
    return indices, {
        "disparity": result.disparity.numpy().astype(np.float16),
        "seen": seen.numpy(),
        "objects": result.mask[:, 2::4, 2::4].to(torch.uint8).numpy(),
        "images": to_pictures(result.image),
    }


def make_data(run: Path, settings: Settings) -> None:
    """Render all pictures once to disk; goes on where it stopped."""
    count = settings.geometries * LOOKS
    done = run / "data" / "done.json"
    if done.exists() and json.loads(done.read_text())["count"] == count:
        return
    (run / "data").mkdir(parents=True, exist_ok=True)
    shapes = {"images": ((count, SIZE, SIZE, 3), np.uint8), "disparity": ((count, SIZE, SIZE), np.float16)}
    shapes |= {"seen": ((count,), np.uint8), "objects": ((count, SIZE // 4, SIZE // 4), np.uint8)}
    arrays = {}
    for name, (shape, dtype) in shapes.items():
        path = run / "data" / f"{name}.npy"
        fresh = not path.exists() or np.load(path, mmap_mode="r").shape != shape
        arrays[name] = np.lib.format.open_memmap(path, mode="w+" if fresh else "r+", dtype=dtype, shape=shape)
    missing = [i for i in range(0, count, 4) if not arrays["images"][i].any()]
    chunks = [list(range(i, min(i + 4, count))) for i in missing]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for n, (indices, parts) in enumerate(pool.imap_unordered(render_chunk, chunks)):
            for name, part in parts.items():
                arrays[name][indices] = part
            if n % 250 == 0:
                log(run, f"data {4 * n} of {4 * len(chunks)}")
    for array in arrays.values():
        array.flush()
    done.write_text(json.dumps({"count": count}))


class Data:
    """The pictures of a run, read from disk as they are needed."""

    def __init__(self, run: Path) -> None:
        self.images, self.disparity, self.seen, self.objects = (
            np.load(run / "data" / f"{name}.npy", mmap_mode="r") for name in ("images", "disparity", "seen", "objects")
        )

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: np.ndarray) -> Tensor:
        """Return pictures as (B, 3, SIZE, SIZE) in [-1, 1]."""
        return torch.from_numpy(self.images[index]).movedim(3, 1).float() / 127.5 - 1

    def hard(self) -> tuple[Tensor, Tensor]:
        """List the pictures in which at least three objects can be seen, and those with two of one shape: int64.

        A list without any such picture has all of them.
        """
        crowded, alike = list[int](), list[int]()
        for index, bits in enumerate(self.seen.tolist()):
            shapes = [body.shape for k, body in enumerate(scene_of(index).bodies) if bits >> k & 1]
            crowded += [index] * (len(shapes) >= 3)
            alike += [index] * (len(set(shapes)) < len(shapes))
        return torch.tensor(crowded or range(len(self))), torch.tensor(alike or range(len(self)))

    def facts(self, index: int, flip: bool) -> Tensor:
        """Return what is true of the objects of a picture or of its mirror image: (MAX_OBJECTS, 3), int64."""
        return facts(scene_of(index), [k for k in range(MAX_OBJECTS) if self.seen[index] >> k & 1], flip)

    def words(self, index: int, seed: int, flip: bool) -> tuple[str, dict[int, str]]:
        """Return one of the captions of a picture or of its mirror image, and the part of it that names each object."""
        seen = {k for k in range(MAX_OBJECTS) if self.seen[index] >> k & 1}
        text, names = worded(scene_of(index), seed, seen)
        return (mirrored(text), {k: mirrored(name) for k, name in names.items()}) if flip else (text, names)


def mirrored(text: str) -> str:
    """Exchange left and right."""
    return text.replace("left", "<>").replace("right", "left").replace("<>", "right")


# Fitting


def fit(
    run: Path,
    name: str,
    model: nn.Module,
    loss_of: Callable[[Generator, int], Tensor],
    settings: Settings,
    *,
    steps: int,
    rate: float,
    on_save: Callable[[nn.Module], None] | None = None,
) -> None:
    """Minimise a loss with AdamW, a warm-up and a cosine; leave the averaged weights in `model`.

    Args:
        run: folder of the run; `name.pt` in it holds the state.
        name: of the stage.
        model: whose weights are fitted.
        loss_of: (generator of the step, step) -> loss.
        settings: batch, EMA and how often to save.
        steps: in all.
        rate: the highest learning rate.
        on_save: called with the averaged weights in the model whenever the state is saved.
    """
    path, start = run / f"{name}.pt", 0
    average = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
    losses: list[float] = []
    model.train()
    for step in range(start, steps):
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        loss = loss_of(torch.Generator().manual_seed(step), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(settings.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in model.named_parameters():
                average[key].lerp_(value, 1 - keep)
        losses.append(loss.item())
        if (step + 1) % settings.save_every == 0 or step + 1 == steps:
            log(run, f"{name} step {step + 1} of {steps}, loss {sum(losses) / len(losses):.4f}")
            losses.clear()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save({**state, "step": step + 1}, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
            if on_save is not None:
                with averaged(model, average):
                    on_save(model)
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(average[key])
    model.eval()


class averaged:  # noqa: N801
    """Put the averaged weights into a model for a while."""

    def __init__(self, model: nn.Module, average: dict[str, Tensor]) -> None:
        self.model, self.average = model, average

    def __enter__(self) -> None:
        self.own = {key: value.detach().clone() for key, value in self.model.named_parameters()}
        self._fill(self.average)

    def __exit__(self, *error: object) -> None:
        self._fill(self.own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for key, value in self.model.named_parameters():
            value.copy_(values[key])


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return differences of neighbouring pixels, across and down."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """Compare the edges of two pictures."""
    return sum((F.l1_loss(x, y) for x, y in zip(edges(a), edges(b), strict=True)), torch.zeros(()))


# Stages


class Trainer:
    """The stages, in order; each needs those before it."""

    def __init__(self, run: Path, settings: Settings, device: str, start: Path | None = None) -> None:
        self.run, self.settings, self.device, self.start = run, settings, torch.device(device), start
        run.mkdir(parents=True, exist_ok=True)

    def half(self) -> Any:
        """Compute in bfloat16 where that is enough."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def seeded(self, kind: Any, config: dict[str, Any]) -> Any:
        """Make a network whose first weights are always the same."""
        torch.manual_seed(0)
        return kind.from_config(config).to(self.device, memory_format=torch.channels_last)

    def vae(self) -> AutoencoderKL:
        """Train the autoencoder on crops, later on whole pictures; then make its latents unit normal."""
        folder, data = (self.start or self.run) / "vae", Data(self.run)
        if folder.exists():
            return AutoencoderKL.from_pretrained(folder).to(self.device)
        vae, steps = self.seeded(AutoencoderKL, VAE), self.settings.vae_steps

        def loss_of(generator: Generator, step: int) -> Tensor:
            whole = step > 0.85 * steps
            index = torch.randint(len(data), (self.settings.batch // (2 if whole else 1),), generator=generator)
            x = data.pixels(index.numpy())
            if not whole:
                top, left = torch.randint(SIZE // 2, (2,), generator=generator).tolist()
                x = x[:, :, top : top + SIZE // 2, left : left + SIZE // 2]
            x = x.to(self.device)
            with self.half():
                posterior = vae.encode(x).latent_dist
                y = vae.decode(posterior.sample(generator)).sample
            y, kl = y.float(), posterior.kl().float().mean() / posterior.mean[0].numel()
            return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + edge_loss(y, x) + 5e-4 * kl

        fit(self.run, "vae", vae, loss_of, self.settings, steps=steps, rate=1e-3)
        whiten(vae, data, self.device)
        vae.save_pretrained(folder)
        return vae

    def depth(self) -> DPTForDepthEstimation:
        """Train the depth net on the exact disparity."""
        folder, data = (self.start or self.run) / "depth_estimator", Data(self.run)
        if folder.exists():
            return DPTForDepthEstimation.from_pretrained(folder).to(self.device)
        net = self.seeded(DPTForDepthEstimation, DEPTH)
        nn.init.constant_(net.head.conv3.bias, 2.0)  # the head ends in a ReLU, which must not be dead at the start

        def loss_of(generator: Generator, step: int) -> Tensor:
            index = torch.randint(len(data), (self.settings.batch,), generator=generator).numpy()
            x = data.pixels(index).to(self.device)
            target = torch.from_numpy(data.disparity[index].astype(np.float32)).to(self.device) * DISPARITY_SCALE
            if torch.rand((), generator=generator) < 0.5:
                x, target = x.flip(3), target.flip(2)
            with self.half():
                y = net(x).predicted_depth
            return F.l1_loss(y.float(), target) + 2 * edge_loss(y.float(), target)

        fit(self.run, "depth", net, loss_of, self.settings, steps=self.settings.depth_steps, rate=1e-3)
        net.save_pretrained(folder)
        return net

    def unet(self) -> None:
        """Train text encoder and UNet together, on latents and depth made once."""
        vae, net, data = self.vae(), self.depth(), Data(self.run)
        tokenizer = make_tokenizer(self.start or self.run)
        latents, depths = self.encoded(vae, net, data)
        special = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        special["bos_token_id"] = tokenizer.bos_token_id
        model = nn.ModuleDict(
            {"text": self.seeded(CLIPTextModel, TEXT | special), "unet": self.seeded(UNet2DConditionModel, UNET)}
        )
        if self.start is not None:
            for name, network in (("text_encoder", model["text"]), ("unet", model["unet"])):
                network.load_state_dict(type(network).from_pretrained(self.start / name).state_dict())
        else:
            start_small(model["text"])
        model["unet"].set_attention("math")  # trains 1.4 times as fast as the fused kernel at these widths, on a CPU
        groups = (torch.arange(len(data)), *data.hard())
        group_shares = torch.tensor((1 - CROWDED - ALIKE, CROWDED, ALIKE))
        looks, shares = watch_words(model["unet"]), list[list[float]]()
        model["guesses"] = Guesses(model["unet"], TEXT["hidden_size"]).to(self.device)
        scheduler = DDIMScheduler(**SCHEDULER)
        alphas_cumprod = scheduler.alphas_cumprod.to(self.device)

        def loss_of(generator: Generator, step: int) -> Tensor:
            batch = self.settings.batch
            which = torch.multinomial(group_shares, batch, replacement=True, generator=generator)
            drawn = [group[torch.randint(len(group), (batch,), generator=generator)] for group in groups]
            index = torch.stack(drawn)[which, torch.arange(batch)]
            flip = torch.randint(2, (batch,), generator=generator)
            clean = torch.from_numpy(latents[flip.numpy(), index.numpy()].astype(np.float32)).to(self.device)
            depth = torch.from_numpy(depths[index.numpy()].astype(np.float32))
            depth = torch.where(flip[:, None, None, None] == 1, depth.flip(3), depth).to(self.device)
            texts = [
                ("", {})
                if torch.rand((), generator=generator) < DROPOUT
                else data.words(int(i), step * batch + n, bool(flip[n]))
                for n, i in enumerate(index)
            ]
            words = [text for text, _ in texts]
            ids = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
            places = torch.from_numpy(data.objects[index.numpy()].astype(np.int64))
            places = torch.where(flip[:, None, None] == 1, places.flip(2), places)
            timesteps = random_timesteps(batch, generator)
            noise = torch.randn(clean.shape, generator=generator).to(self.device)
            a = alphas_cumprod[timesteps.to(self.device)].view(-1, 1, 1, 1)
            swapped = (torch.rand(batch, generator=generator) < SWAPPED) & (timesteps >= SWAPPED_FROM)
            # pictures 2n and 2n + 1 have one geometry
            begin = torch.from_numpy(latents[flip.numpy(), (index ^ swapped).numpy()].astype(np.float32))
            noisy = a**0.5 * begin.to(self.device) + (1 - a) ** 0.5 * noise
            noise = (noisy - a**0.5 * clean) / (1 - a) ** 0.5
            target = a**0.5 * noise - (1 - a) ** 0.5 * clean
            with self.half():
                context = model["text"](ids.to(self.device)).last_hidden_state
                out = model["unet"](torch.cat([noisy, depth], 1), timesteps.to(self.device), context).sample
            names, telling = (marks.to(self.device) for marks in name_tokens(tokenizer, texts))
            told = torch.stack([data.facts(int(i), bool(f)) for i, f in zip(index, flip, strict=True)])
            bound = looking_loss(looks, places.to(self.device), telling)
            guesses = model["guesses"](looks, context, places.to(self.device), names, told.to(self.device))
            looks.clear()
            losses = torch.stack([bound, *guesses]).tolist()
            shares.append([math.exp(-loss) if loss > 0 else math.nan for loss in losses])  # 0: nothing to tell
            return F.mse_loss(out.float(), target) + BINDING * bound + GUESSING * sum(guesses)

        def export(model: nn.Module) -> None:
            if shares:
                means = " ".join(f"{share:.2f}" for share in np.nanmean(shares, axis=0))
                log(self.run, f"unet looks at what tells objects apart, knows shape, place; words know colour: {means}")
            shares.clear()
            StableDiffusionDepth2ImgPipeline(
                vae=vae,
                text_encoder=model["text"],
                tokenizer=tokenizer,
                unet=model["unet"],
                scheduler=scheduler,
                depth_estimator=net,
                feature_extractor=DPTImageProcessor.from_config({"size": {"height": SIZE, "width": SIZE}}),
                fast=False,
            ).save_pretrained(self.run / "model")

        steps, rate = self.settings.unet_steps, 8e-4 if self.start is None else 6e-4
        fit(self.run, "unet", model, loss_of, self.settings, steps=steps, rate=rate, on_save=export)
        export(model)
        small = StableDiffusionDepth2ImgPipeline.from_pretrained(self.run / "model", torch_dtype=torch.float16)
        small.save_pretrained(self.run / "mini")

    @torch.no_grad()
    def encoded(self, vae: AutoencoderKL, net: DPTForDepthEstimation, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """Make latents (2, N, 4, h, w), of pictures and their mirror images, and the depth net's maps (N, 1, h, w)."""
        side = SIZE // 2 ** (len(vae.config.block_out_channels) - 1)
        paths = self.run / "data" / "latents.npy", self.run / "data" / "depths.npy"
        shapes = (2, len(data), 4, side, side), (len(data), 1, side, side)
        if all(path.exists() for path in paths):
            latents, depths = (np.load(path, mmap_mode="r") for path in paths)
            if (latents.shape, depths.shape) == shapes:
                return latents, depths
        latents, depths = (np.zeros(shape, np.float16) for shape in shapes)
        for index in batches(len(data), 32):
            x = data.pixels(index).to(self.device)
            with self.half():
                for flip, picture in enumerate((x, x.flip(3))):
                    latents[flip, index] = vae.encode(picture).latent_dist.mode().half().cpu().numpy()
                disparity = net(x).predicted_depth
            depths[index] = fit_depth(disparity.float(), side, side).half().cpu().numpy()
        for path, array in zip(paths, (latents, depths), strict=True):
            np.save(path, array)
        return latents, depths


def random_timesteps(count: int, generator: Generator) -> Tensor:
    """Draw timesteps, NOISY of them from NOISY_FROM on: (count,), 0..999."""
    anywhere = torch.randint(1000, (count,), generator=generator)
    noisy = torch.randint(NOISY_FROM, 1000, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < NOISY, noisy, anywhere)


def batches(count: int, size: int) -> Iterator[np.ndarray]:
    """Cut 0..count into pieces."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


@torch.no_grad()
def whiten(vae: AutoencoderKL, data: Data, device: torch.device) -> None:
    """Shift and scale each latent channel to mean 0 and deviation 1, inside the convolutions around the latents."""
    means = [
        vae.encode(data.pixels(i).to(device)).latent_dist.mode() for i in itertools.islice(batches(len(data), 32), 32)
    ]
    flat = torch.cat(means).transpose(0, 1).flatten(1)
    mean, std = flat.mean(1), flat.std(1)
    channels = len(mean)
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    quant = vae.quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def start_small(text: CLIPTextModel) -> None:
    """Give a text encoder CLIP's first weights: small, so that words outweigh their first, random places.

    Source: openai/CLIP, clip/model.py, `initialize_parameters`.
    """
    width, layers = text.config.hidden_size, text.config.num_hidden_layers
    inner = width**-0.5 * (2 * layers) ** -0.5
    deviations = {"q_proj": width**-0.5, "k_proj": width**-0.5, "v_proj": width**-0.5, "out_proj": inner}
    deviations |= {"token_embedding": 0.02, "position_embedding": 0.01, "fc1": (2 * width) ** -0.5, "fc2": inner}
    for name, parameter in text.named_parameters():
        module, _, kind = name.rpartition(".")
        deviation = deviations.get(module.rpartition(".")[2])
        if deviation is not None and kind == "weight":
            nn.init.normal_(parameter, std=deviation)
        elif deviation is not None:
            nn.init.zeros_(parameter)


def make_tokenizer(run: Path) -> CLIPTokenizer:
    """Learn a small byte-pair vocabulary from captions; other words are spelled in pieces."""
    folder = run / "tokenizer"
    if folder.exists():
        return CLIPTokenizer.from_pretrained(folder)
    texts = [caption(random_scene(seed), seed) for seed in range(4000)]
    backend = Tokenizer(BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.train_from_iterator(texts, BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *SPECIAL]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab, merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/mini"))
    parser.add_argument("--from", type=Path, dest="start", metavar="MODEL", help="go on from the weights of a model")
    parser.add_argument("--stage", choices=("data", "vae", "depth", "unet", "all"), default="all")
    parser.add_argument("--tiny", action="store_true", help="a run that shows only that everything runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    trainer = Trainer(options.run, TINY if options.tiny else Settings(), options.device, options.start)
    stages = {"vae": trainer.vae, "depth": trainer.depth, "unet": trainer.unet}
    make_data(options.run, trainer.settings)
    for name, stage in stages.items():
        if options.stage in (name, "all"):
            stage()
    log(options.run, "done")


if __name__ == "__main__":
    main()
