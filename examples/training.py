"""What the four training programs share: their options, photos with words and depth, noise, and checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from depthdiff import StableDiffusionDepth2ImgPipeline
from depthdiff.image import to_pixels


def make_parser(doc: str, steps: int, rate: float) -> argparse.ArgumentParser:
    """Make a parser with the options of all programs; `doc` is the program's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("photos", type=Path, help="a folder of pictures; x.txt holds the words of x.png, if any")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--model", default="mini", help="a folder or Hub id; the bundled model by default")
    parser.add_argument("--steps", type=positive, default=steps, help=f"updates of the weights ({steps})")
    parser.add_argument("--rate", type=above_zero, default=rate, help=f"of learning ({rate})")
    parser.add_argument("--batch", type=positive, default=4, help="photos of a step (4)")
    parser.add_argument("--accumulate", type=positive, default=1, help="batches that make a step (1)")
    parser.add_argument("--size", type=positive, help="side of the pictures in pixels; the model's own by default")
    parser.add_argument("--flip", action="store_true", help="also train on the mirrored photos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no", help="of autocast (no)")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again for gradients: less memory")
    parser.add_argument("--save-every", type=positive, help="steps after which to write OUT/checkpoint-STEP")
    parser.add_argument("--resume", type=Path, help="such a checkpoint; go on from there with the same options")
    return parser


def positive(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def find_photos(folder: Path) -> list[Path]:
    """List the pictures of a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions())


def list_photos(folder: Path) -> list[Path]:
    """List the pictures of a folder; end the program where one is not readable, or there is none."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder; name the folder of the photos")
    paths = find_photos(folder)
    if not paths:
        raise SystemExit(f"{folder} has no pictures; put some there, such as x.png and its words in x.txt")
    for path in paths:
        try:
            with Image.open(path) as file:
                file.verify()
        except (OSError, SyntaxError) as error:
            raise SystemExit(f"{path} is not a picture that Pillow reads ({error}); remove or replace it") from error
    return paths


def start(options: argparse.Namespace) -> tuple[StableDiffusionDepth2ImgPipeline, Accelerator]:
    """Check the options, before any work, and load the pipeline."""
    list_photos(options.photos)
    if options.out.exists() and not options.out.is_dir():
        raise SystemExit(f"{options.out} is a file; name a folder to write to")
    if options.resume and not (options.resume.is_dir() and 0 < first_step(options) < options.steps):
        raise SystemExit(f"--resume {options.resume}: expected a folder checkpoint-STEP, STEP below --steps")
    set_seed(options.seed)
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate, mixed_precision=options.precision)
    try:
        pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(options.model, torch_dtype=torch.float32, fast=False)
    except OSError as error:
        raise SystemExit(f"--model {options.model}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    factor = pipe.vae_scale_factor
    options.size = options.size or pipe.unet.config.sample_size * factor
    if options.size % factor:
        raise SystemExit(f"--size must be a multiple of {factor}, got {options.size}")
    return pipe.to(accelerator.device), accelerator


def first_step(options: argparse.Namespace) -> int:
    """Return how many steps are done already: the number in `checkpoint-STEP`."""
    number = options.resume.name.removeprefix("checkpoint-") if options.resume else "0"
    return int(number) if number.isdecimal() else 0


class Photos(Dataset[dict[str, Tensor]]):
    """Photos as `pixel_values` (3, H, W) and `depth` (1, h, w), both in [-1, 1], with their words, `input_ids` (L,)."""

    def __init__(
        self,
        pipe: StableDiffusionDepth2ImgPipeline,
        options: argparse.Namespace,
        prompt: str,
        folder: Path | None = None,
    ) -> None:
        self.size, self.paths, self.flip = options.size, list_photos(folder or options.photos), options.flip
        self.words = [", ".join(filter(None, [read_words(path), prompt])) for path in self.paths]
        self.ids = pipe.tokenizer(
            self.words,
            max_length=pipe.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        pictures = (self.picture(path) for path in self.paths)
        self.depth = [
            pipe.prepare_depth_map(one, None, 1, False, torch.float32, pipe.device)[0].cpu() for one in pictures
        ]

    def picture(self, path: Path) -> Image.Image:
        """Read a photo, cut to a square."""
        with Image.open(path) as file:
            return ImageOps.fit(ImageOps.exif_transpose(file).convert("RGB"), (self.size, self.size))

    def __len__(self) -> int:
        return len(self.paths) * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mirrored, index = divmod(index, len(self.paths))
        pixels, depth = to_pixels([self.picture(self.paths[index])], 1)[0], self.depth[index]
        if mirrored:
            pixels, depth = pixels.flip(2), depth.flip(2)
        return {"pixel_values": pixels, "depth": depth, "input_ids": self.ids[index]}


def read_words(path: Path) -> str:
    """Return the words beside a photo."""
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.exists() else ""


class Order(Sampler[int]):
    """Photos in random order, again and again, as many as the steps need; a resumed run goes on where it was."""

    def __init__(self, count: int, options: argparse.Namespace, processes: int) -> None:
        each = options.batch * options.accumulate * processes
        self.count, self.seed = count, options.seed
        self.start, self.end = first_step(options) * each, options.steps * each

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        rounds = -(-self.end // self.count)
        yield from torch.cat([torch.randperm(self.count, generator=generator) for _ in range(rounds)])[
            self.start : self.end
        ].tolist()


def make_loader(photos: Any, options: argparse.Namespace, accelerator: Accelerator, **kwargs: Any) -> Any:
    """Return the batches of the steps that are left."""
    order = Order(len(photos), options, accelerator.num_processes)
    generator = torch.Generator().manual_seed(options.seed)  # else the loader draws from the noise's
    return DataLoader(photos, batch_size=options.batch, sampler=order, generator=generator, **kwargs)


def add_noise(pipe: StableDiffusionDepth2ImgPipeline, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the UNet's input (B, 5, h, w), timesteps (B,), and what it should predict (B, 4, h, w)."""
    scheduler = pipe.scheduler
    with torch.no_grad():
        latents = pipe.vae.encode(batch["pixel_values"]).latent_dist.sample() * pipe.vae.config.scaling_factor
    latents = latents.float()
    noise = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    return torch.cat([noisy, batch["depth"]], dim=1), timesteps, target


def train(
    accelerator: Accelerator,
    options: argparse.Namespace,
    networks: list[Any],
    optimizer: torch.optim.Optimizer,
    loader: Any,
    compute_loss: Callable[[dict[str, Tensor]], Tensor],
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Take the steps, and return their losses; `compute_loss` gets a batch, `after_step` follows every update."""
    if options.resume:
        accelerator.load_state(str(options.resume))
    losses: list[float] = []
    parts: list[float] = []
    done = first_step(options)
    bar = tqdm(total=options.steps, initial=done, unit="step", disable=not accelerator.is_main_process)
    for batch in loader:
        with accelerator.accumulate(*networks):
            with accelerator.autocast():
                loss = compute_loss(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_([p for network in networks for p in network.parameters()], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        parts.append(loss.item())
        if accelerator.sync_gradients:
            after_step()
            losses, parts, done = [*losses, sum(parts) / len(parts)], [], done + 1
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
            if options.save_every and done % options.save_every == 0:
                accelerator.save_state(str(options.out / f"checkpoint-{done}"))
    bar.close()
    return losses
