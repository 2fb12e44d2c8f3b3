"""In the manner of a batch tool: a folder of photos, prompts from a file, a seed a picture, settings in EXIF."""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image, ImageOps

SEED = 0


def parse(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, default=0.7)
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args(arguments)


def write_inputs(photo, folder):
    folder.mkdir()
    image, exif = Image.open(photo).convert("RGB").resize((96, 64)), Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "a.png")
    ImageOps.mirror(image).save(folder / "b.png")
    image.rotate(90, expand=True).save(folder / "c.png", exif=exif)
    lines = [{"prompt": "a castle", "negative": "people"}, {"prompt": "a desert"}, {"prompt": "snow"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))


def batch(args):
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(args.model, use_safetensors=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    paths = sorted(args.folder.glob("*.png"))
    lines = [json.loads(line) for line in (args.folder / "prompts.jsonl").read_text().splitlines()]
    images = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(paths))]
    outputs = pipe(
        [line["prompt"] for line in lines], images, negative_prompt=[line.get("negative", "") for line in lines],
        strength=args.strength, num_inference_steps=5, generator=generators, eta=0.4, output_type="np",
    ).images  # fmt: skip
    args.out.mkdir(exist_ok=True)
    for i, (path, picture) in enumerate(zip(paths, pipe.numpy_to_pil(outputs))):
        exif = Image.Exif()
        exif[0x010E] = json.dumps({**lines[i], "seed": args.seed + i, "strength": args.strength})
        picture.save(args.out / f"{path.stem}.jpg", exif=exif, quality=95)
    return outputs


def main(checkpoint, photo):
    write_inputs(photo, Path("photos"))
    arguments = ["photos", "--model", checkpoint, "--seed", str(SEED)]
    outputs = batch(parse(arguments))
    seeds = [json.loads(Image.open(path).getexif()[0x010E])["seed"] for path in sorted(Path("out").iterdir())]
    assert seeds == [SEED, SEED + 1, SEED + 2]
    return outputs, batch(parse([*arguments, "--strength", "0.45"]))
