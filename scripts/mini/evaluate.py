"""Measure the bundled model on scenes and captions it was never trained on, and draw a sheet of results to look at.

    python scripts/mini/evaluate.py MODEL [--scenes 200] [--sheet sheet.png]

Every scene is shown in one look and repainted by a caption of another look of the same geometry; only the prompt says
how that one is. Depth is judged by what the objects add: floor and wall alone correlate 0.93 between any two scenes, so
the disparity of the empty room is subtracted first. Two controls: a wrong caption, and another scene's depth map.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from scenes import COLOURS, Rendered, Scene, Skin, describe, random_scene, render, repaint, to_pictures
from torch import Tensor

from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline

FIRST_SEED = 5_000_000
"""Training uses 0 to some ten thousand, and looks from ten million on."""

STEPS, BATCH, GUIDANCE = 20, 8, 2.0
FEWEST_PIXELS = 60
"""Objects that show less are neither named nor judged."""

RISE = 0.012
"""Disparity above the empty room from which on a pixel counts as part of an object."""


def whole_caption(scene: Scene, seed: int, seen: list[int]) -> str:
    """Name every object that can be seen with its colour and shape, and the light."""
    rng = random.Random(f"test {seed}")
    names = [describe(scene, k, seen, rng, vague=False) for k in seen]
    return " and ".join(names) + {"sunset": " at sunset", "night": " at night"}.get(scene.light, "")


def visible(scene: Scene, mask: Tensor) -> list[int]:
    """List the objects that show enough pixels in the mask (H, W)."""
    return [k for k in range(len(scene.bodies)) if (mask == k + 1).sum() >= FEWEST_PIXELS]


def fitted(reading: Tensor, truth: Tensor) -> Tensor:
    """Bring a depth net's reading (H, W) to the scale and shift of the truth, by least squares."""
    columns = torch.stack([reading.flatten(), torch.ones(reading.numel())], 1).double()
    solution = torch.linalg.lstsq(columns, truth.flatten().double()[:, None]).solution
    return (columns @ solution).view_as(truth).float()


def geometry_scores(reading: Tensor, scene: Rendered, s: int) -> tuple[float, float]:
    """Correlate what the objects add in a reading and in truth, and overlap their outlines."""
    residual = fitted(reading, scene.disparity[s]) - scene.empty[s]
    truth = scene.disparity[s] - scene.empty[s]
    correlation = torch.corrcoef(torch.stack([residual.flatten(), truth.flatten()]))[0, 1].item()
    mine, true = residual > RISE, truth > RISE
    return correlation, ((mine & true).sum() / (mine | true).sum().clamp(min=1)).item()


def colour_table(scene: Scene, shown: Rendered, s: int) -> dict[int, Tensor]:
    """Render a scene with all its objects in each colour; object -> mean pixel of each colour (9, 3)."""
    looks = [replace(scene, skins=tuple(Skin(c, skin.material) for skin in scene.skins)) for c in COLOURS]
    images = torch.cat([render([look]).image for look in looks])  # (9, 3, H, W)
    return {k: images[:, :, shown.mask[s] == k + 1].mean(2) for k in visible(scene, shown.mask[s])}


def right_colours(image: Tensor, table: dict[int, Tensor], scene: Scene, mask: Tensor) -> list[bool]:
    """Tell for each visible object whether its mean pixel is nearest to its own colour's."""
    right = []
    for k, means in table.items():
        mean = image[:, mask == k + 1].mean(1)
        nearest = (means - mean).norm(dim=1).argmin().item()
        right.append(list(COLOURS)[nearest] == scene.skins[k].colour)
    return right


class Evaluation:
    """The scenes of an evaluation, rendered once, and the pipeline that is judged."""

    def __init__(self, folder: Path, count: int) -> None:
        self.pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        seeds = range(FIRST_SEED, FIRST_SEED + count)
        self.sources = [random_scene(seed) for seed in seeds]
        self.targets = [repaint(scene, seed + 1) for seed, scene in zip(seeds, self.sources, strict=True)]
        self.shown, self.wanted = (self.render(scenes) for scenes in (self.sources, self.targets))
        self.captions = [
            whole_caption(scene, seed, visible(scene, mask))
            for seed, scene, mask in zip(seeds, self.targets, self.wanted.mask, strict=True)
        ]
        self.tables = [colour_table(scene, self.wanted, s) for s, scene in enumerate(self.targets)]

    @staticmethod
    def render(scenes: list[Scene]) -> Rendered:
        """Render in pieces that fit into the cache."""
        parts = [render(scenes[i : i + 4]) for i in range(0, len(scenes), 4)]
        names = ("image", "disparity", "mask", "empty")
        return Rendered(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def photos(self, rendered: Rendered) -> list[Image.Image]:
        """Return pictures as photographs of 8 bits."""
        return [Image.fromarray(picture) for picture in to_pictures(rendered.image)]

    def paint(
        self,
        strength: float,
        guidance: float,
        captions: list[str],
        depth: Tensor | None = None,
        output_type: Literal["pt", "latent"] = "pt",
        with_photos: bool = True,
        **options: Any,
    ) -> Tensor:
        """Repaint every scene, with more options of a call: (S, 3, H, W) in 0..1, or latents (S, 4, h, w)."""
        photos, results = self.photos(self.shown), []
        for i in range(0, len(photos), BATCH):
            part = slice(i, i + BATCH)
            images = self.pipe(
                captions[part],
                photos[part] if with_photos else None,
                None if depth is None else depth[part],
                strength=strength,
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(i),
                output_type=output_type,
                **options,
            ).images
            results.append(images)
        return torch.cat(results)

    def read_depth(self, images: Tensor) -> Tensor:
        """Let the depth net read pictures: (S, H, W)."""
        return torch.cat([self.pipe.estimate_depth(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])

    def scores(self, images: Tensor) -> dict[str, float]:
        """Judge repainted pictures: geometry against the source's, colours against the target's."""
        readings = self.read_depth(images)
        geometry = [geometry_scores(readings[s], self.shown, s) for s in range(len(images))]
        right = [
            one
            for s, scene in enumerate(self.targets)
            for one in right_colours(images[s], self.tables[s], scene, self.wanted.mask[s])
        ]
        correlation, overlap = np.mean(geometry, axis=0)
        return {"geometry": float(correlation), "outline": float(overlap), "colours": float(np.mean(right))}

    @torch.no_grad()
    def parts(self) -> dict[str, float]:
        """Judge the autoencoder and the depth net alone."""
        psnr = []
        for image in self.shown.image.split(BATCH):
            y = self.pipe.vae(image * 2 - 1).sample.clamp(-1, 1) / 2 + 0.5
            psnr += (-10 * ((y - image) ** 2).mean((1, 2, 3)).log10()).tolist()
        return {"psnr": float(np.mean(psnr)), "depth": self.scores(self.shown.image)["geometry"]}

    def run(self, guidance: float) -> dict[str, dict[str, float]]:
        """Measure everything."""
        other = torch.roll(self.shown.disparity, 1, 0)
        wrong = self.captions[1:] + self.captions[:1]
        return {
            "parts": self.parts(),
            "ceiling: the target itself": self.scores(self.wanted.image),
            "strength 1.0": self.scores(self.paint(1.0, guidance, self.captions)),
            "strength 1.0, from noise": self.scores(self.paint(1.0, guidance, self.captions, start="noise")),
            "depth without photos": self.scores(
                self.paint(1.0, guidance, self.captions, self.read_depth(self.shown.image), with_photos=False)
            ),
            "strength 0.8": self.scores(self.paint(0.8, guidance, self.captions)),
            "control: wrong caption": self.scores(self.paint(1.0, guidance, wrong)),
            "control: another scene's depth": self.scores(self.paint(1.0, guidance, self.captions, other)),
        }

    def sheet(self, path: Path, guidance: float, count: int = 32) -> None:
        """Draw source, result and target of some scenes; the prompts are printed."""
        images = self.paint(1.0, guidance, self.captions)[:count]
        tiles = [
            torch.cat(row, 1) for row in zip(self.shown.image[:count], images, self.wanted.image[:count], strict=True)
        ]
        rows = [torch.cat(tiles[i : i + 8], 2) for i in range(0, len(tiles), 8)]
        Image.fromarray(to_pictures(torch.cat(rows, 1)[None])[0]).save(path)
        for i, text in enumerate(self.captions[:count]):
            print(f"{i // 8 + 1}.{i % 8 + 1} {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    evaluation = Evaluation(options.model, options.scenes)
    if options.sheet is not None:
        evaluation.sheet(options.sheet, options.guidance)
    figures = evaluation.run(options.guidance)
    print(json.dumps({name: {k: round(v, 3) for k, v in row.items()} for name, row in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
