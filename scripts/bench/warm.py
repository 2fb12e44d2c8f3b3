"""Stages that are timed in one process, after a warm-up, with both packages loaded side by side."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.meters import PACKAGES, PHOTO, Row, flops_of, in_turns, peak_of, seconds_of
from depthdiff import DiffusionPipeline, fast

STAGES = ("text", "depth", "encode", "unet", "decode", "call", "preset")
AGREED = 0.02
"""Relative difference of the operations that both packages count, from which on it is said."""


def load(package: str, folder: Path, dtype: torch.dtype | str, device: str, plain: bool = False) -> Any:
    """Load the pipeline of a package; `plain` leaves the fast computations of ours off."""
    ours = package == "depthdiff"
    more = {"fast": not plain} if ours else {}
    pipeline = __import__(package).StableDiffusionDepth2ImgPipeline
    pipe = pipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **more).to(device)
    pipe.set_progress_bar_config(disable=True)
    if ours and not plain:
        for network in pipe.networks.values():
            fast.lay_out(network)  # as the pipeline does before a network's first work
    return pipe


def load_both(folder: Path, dtype: str, device: str, plain: bool) -> dict[str, Any]:
    """Load both at one dtype; for "auto" it is the one that our UNet gets."""
    ours = load("depthdiff", folder, dtype if dtype == "auto" else getattr(torch, dtype), device, plain)
    return {"depthdiff": ours, "diffusers": load("diffusers", folder, ours.unet.dtype, device)}


def actions_of(pipe: Any, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """List what each stage does, with the interface that both packages share."""
    ours = isinstance(pipe, DiffusionPipeline)
    device, dtype, size = pipe.device, pipe.unet.dtype, options.size
    latent = size // pipe.vae_scale_factor
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    sample = torch.cat([random(1, 5, latent, latent)] * 2)  # with guidance, each row is there twice
    prompt_embeds = random(2, 77, pipe.unet.config.cross_attention_dim)
    pixels, latents = (
        random(*shape, dtype=pipe.vae.dtype).clamp(-1, 1).contiguous(memory_format=torch.channels_last)
        for shape in ((1, 3, size, size), (1, 4, latent, latent))
    )  # channels last, as a call has them, since a photo's array does; the VAE of diffusers is twice as fast then
    side = pipe.depth_estimator.config.image_size
    values = random(1, 3, side, side, dtype=pipe.depth_estimator.dtype).clamp(-1, 1)
    timestep = torch.tensor(501, device=device)
    with Image.open(PHOTO) as file:
        photo = file.convert("RGB").resize((size, size))

    def call(**approximations: Any) -> Any:
        return pipe(
            "two tigers",
            photo,
            num_inference_steps=options.steps,
            strength=options.strength,
            guidance_scale=options.guidance,
            generator=torch.Generator().manual_seed(0),
            **approximations,
        )

    return {
        "text": lambda: pipe.encode_prompt("two tigers", device, 1, True, "bad anatomy"),
        "depth": lambda: pipe.depth_estimator(values),
        "encode": lambda: pipe.vae.encode(pixels),
        "unet": lambda: pipe.unet(sample, timestep, encoder_hidden_states=prompt_embeds),
        "decode": lambda: pipe.vae.decode(latents),
        "call": call,
        "preset": lambda: call(preset="fast") if ours else call(),
    }


def speed_up(pipes: dict[str, Any], options: argparse.Namespace) -> None:
    """Compile both, or capture ours, as the options say.

    diffusers gets its own best recipe. Source: its documentation, "Accelerate inference" and "Text-to-image speed":
    channels last, joint projections, and UNet and decoder compiled as one graph each.
    """
    ours, theirs = pipes["depthdiff"], pipes["diffusers"]
    if options.compile:
        for network in (theirs.unet, theirs.vae):
            network.to(memory_format=torch.channels_last)
            network.fuse_qkv_projections()
        theirs.unet.compile(mode=options.compile, fullgraph=True)
        theirs.vae.decode = torch.compile(theirs.vae.decode, mode=options.compile, fullgraph=True)
        fast.compile(ours, mode=options.compile)
    if options.capture:
        fast.capture(ours)


def label_of(stage: str, options: argparse.Namespace) -> str:
    """Name a stage in full."""
    call = f"{options.steps} steps, strength {options.strength:g}, guidance {options.guidance:g}"
    labels = {
        "text": "text, two prompts",
        "unet": "UNet, one picture with guidance",
        "call": f"whole call, {call}",
        "preset": f'whole call, preset="fast" beside all of diffusers\' work, {call}',
    }
    return labels.get(stage, stage)


def measure_warm(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Measure the chosen stages of those in `STAGES`."""
    stages = [stage for stage in STAGES if stage in options.stage]
    if not stages:
        return
    pipes = load_both(folder, options.dtype, options.device, options.plain)
    actions = {package: actions_of(pipes[package], options) for package in PACKAGES}
    # Counted before anything is compiled or captured, where no counter sees it; the first run also warms up.
    flops = {stage: {package: flops_of(actions[package][stage]) for package in PACKAGES} for stage in stages}
    speed_up(pipes, options)
    for stage in stages:
        here = {package: actions[package][stage] for package in PACKAGES}
        compiled = options.compile or options.capture
        first = {package: seconds_of(here[package]) for package in PACKAGES if compiled}
        gc.collect()
        timers = {package: (lambda action=action: seconds_of(action)) for package, action in here.items()}
        seconds = in_turns(timers, options.repeats, options.watch)
        peak = {package: float(peak_of(here[package], options.device)) for package in PACKAGES}
        remarks = []
        if compiled:
            remarks.append("first run {:.3g} s and {:.3g} s".format(*first.values()))
        ours, theirs = flops[stage].values()
        if abs(theirs - ours) > AGREED * max(ours, theirs):
            remarks.append(f"diffusers does {theirs / max(ours, 1):.2f} times the operations")
        yield Row(label_of(stage, options), seconds, "; ".join(remarks), peak, flops[stage])
