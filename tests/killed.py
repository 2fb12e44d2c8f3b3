"""Work that is interrupted at random moments; `test_kills.py` starts this file in a process of its own.

That process imports everything and forks one child for each interruption, so that one costs milliseconds. It reads a
line of JSON for each kind of work, and answers with one.
"""

import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from random_checkpoint import GEOMETRIES, build_pipeline, randomize, vae

from depthdiff import AutoencoderKL, StableDiffusionDepth2ImgPipeline, UNet2DConditionModel, cli
from depthdiff.__main__ import leave
from depthdiff.__main__ import main as entry
from depthdiff.convert import to_folder, to_single_file
from depthdiff.image import contact_sheet, depth_image
from depthdiff.picture_files import save_image

UNET = {
    **GEOMETRIES["tiny"]["unet"],
    "block_out_channels": [32, 48],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 3],
}
VERSIONS = (0, 1)
OVERDUE = 60  # seconds that no work here takes


def small_pipeline(seed):
    """Build a pipeline that is smaller still than the tiny one."""
    pipe = build_pipeline("tiny", seed)
    pipe.unet = UNet2DConditionModel.from_config(UNET)
    pipe.vae = AutoencoderKL.from_config(vae([8, 16], 1, 4, 16))
    for network in (pipe.unet, pipe.vae):
        randomize(network, seed)
        network.eval()
    return pipe


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def files(*paths):
    """Say what every file holds."""
    return {path.name: path.read_bytes() for path in paths}


def loaded(folder):
    """Say what a checkpoint holds, as it is loaded."""
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(folder)
    whole = hashlib.sha256(json.dumps(pipe.scheduler.config, default=str, sort_keys=True).encode())
    for network in pipe.networks.values():
        for tensor in network.state_dict().values():
            whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"checkpoint": whole.digest()}


def picture(place):
    path = place / "out" / "a.png"
    made = [Image.fromarray(noise(n, 60, 80, 3)) for n in VERSIONS]
    return lambda n: save_image(made[n], path, {"seed": n}), lambda: files(path)


def sheet(place):
    path = place / "out" / "sheet.jpg"
    made = [contact_sheet([Image.fromarray(noise(n, 60, 80, 3))] * 3, ["photo", "depth", "x"]) for n in VERSIONS]
    return lambda n: save_image(made[n], path), lambda: files(path)


def depth(place):
    path = place / "out" / "depth.tiff"
    made = [depth_image(torch.rand(60, 80, generator=torch.Generator().manual_seed(n))) for n in VERSIONS]
    return lambda n: save_image(made[n], path), lambda: files(path)


def save_pretrained(place):
    folder = place / "out" / "checkpoint"
    pipes = [small_pipeline(100 * n) for n in VERSIONS]
    sizes = ("300KB", "500KB")
    return lambda n: pipes[n].save_pretrained(folder, max_shard_size=sizes[n]), lambda: loaded(folder)


def convert_to_folder(place):
    sources = []
    for n in VERSIONS:
        small_pipeline(100 * n).save_pretrained(place / f"source-{n}")
        sources.append(place / f"{n}.safetensors")
        to_single_file(place / f"source-{n}", sources[n])
    folder = place / "out" / "checkpoint"
    return lambda n: to_folder(sources[n], folder, config=place / f"source-{n}"), lambda: loaded(folder)


def convert_to_single_file(place):
    for n in VERSIONS:
        small_pipeline(100 * n).save_pretrained(place / f"source-{n}")
    path = place / "out" / "model.safetensors"
    return lambda n: to_single_file(place / f"source-{n}", path), lambda: files(path)


def lora(place):
    folder, name = place / "out", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layers = [{f"{name}.lora_A.weight": torch.full((64, 320), n), f"{name}.lora_B.weight": torch.full((320, 64), n)}
              for n in (1.0, 2.0)]  # fmt: skip
    save = StableDiffusionDepth2ImgPipeline.save_lora_weights
    return lambda n: save(folder, layers[n]), lambda: files(folder / "pytorch_lora_weights.safetensors")


def command(place):
    model, photo = place / "model", place / "photo.png"
    small_pipeline(0).save_pretrained(model)
    Image.fromarray(noise(2, 24, 32, 3)).save(photo)
    paths = [place / "out" / name for name in ("a.png", "sheet.png", "depth.png")]
    options = ["a cup", str(photo), "--model", str(model), "--steps", "2", "--dtype", "float32"]
    for option, path in zip(("-o", "--sheet", "--save-depth"), paths, strict=True):
        options += [option, str(path)]

    def save(n):
        sys.argv = ["depthdiff", *options, "--seed", str(n)]
        status = entry()
        if status:
            os._exit(status)

    return save, lambda: files(*paths)


WORKS = {
    "picture": picture,
    "sheet": sheet,
    "depth": depth,
    "save_pretrained": save_pretrained,
    "to_folder": convert_to_folder,
    "to_single_file": convert_to_single_file,
    "save_lora_weights": lora,
    "command": command,
}


def report_writing(save, pipe):
    """Write to a pipe when the first unfinished file is opened; the command tries its places before."""
    real, begun = cli.save_all, []

    def begin(works):
        os.write(pipe, b"x")
        real(works)

    def watch(event, arguments):
        if event == "open" and not begun and ".depthdiff-" in str(arguments[0]):
            begun.append(True)
            os.write(pipe, b"x")

    if save.__qualname__.startswith("command"):
        cli.save_all = begin
    else:
        sys.addaudithook(watch)


def fork(save, err, when):
    """Let a child save one version after the other; return its number when it begins to, or begins to write."""
    ours, theirs = os.pipe()
    number = os.fork()
    if number:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
        return number
    status = 99
    try:
        signal.signal(signal.SIGINT, leave)  # as it is while the command is imported
        os.dup2(os.open(err, os.O_WRONLY), 2)
        if when == "any":
            os.write(theirs, b"x")
        else:
            report_writing(save, theirs)
        for n in itertools.cycle(VERSIONS[::-1]):
            save(n)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def ended(number):
    """Wait for a child; return its exit status, or minus its signal."""
    for _ in range(OVERDUE * 100):
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return "hangs"


def unfinished(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(".depthdiff-*"))


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def interrupt(work, place, count, number):
    """Interrupt a kind of work many times.

    Returns:
        Counts: tried, how often the old or the new version was found, and how often the interruption met the writing;
        faults in words; exit statuses; what was written to stderr.
    """
    place = Path(place)
    (place / "out").mkdir(parents=True)
    save, read = WORKS[work](place)
    known, names, took = [], [], []
    for n in VERSIONS:
        start = time.perf_counter()
        save(n)
        took.append(time.perf_counter() - start)
        known.append(read())
        names.append(below(place / "out"))
    rng, faults, statuses, errors = random.Random(work), [], Counter(), Counter()
    found, met = Counter(), 0
    for index in range(count):
        when = "any" if index % 3 == 2 else "writing"
        (place / "err").write_text("")
        child = fork(save, place / "err", when)
        time.sleep(rng.uniform(0, 0.01 if when == "writing" else took[1]))
        os.kill(child, number)
        statuses[ended(child)] += 1
        if number != signal.SIGKILL:
            errors[(place / "err").read_text()] += 1
        left = unfinished(place / "out")
        now = read()
        versions = [{n for n in VERSIONS if known[n][name] == content} for name, content in now.items()]
        met += bool(left) or len({tuple(v) for v in versions}) > 1
        for name, version in zip(now, versions, strict=True):
            if not version:
                faults.append(f"{name} is neither the old nor the new one")
            found.update("old" if n == 0 else "new" for n in version)
        if number != signal.SIGKILL and left:
            faults.append(f"left {left}")
        if left:
            n = rng.choice(VERSIONS)
            save(n)
            if below(place / "out") != names[n] or read() != known[n]:
                faults.append(f"after the next save: {below(place / 'out')}")
    answer = {"tried": count, "found": found, "met": met, "faults": faults}
    return answer | {"statuses": statuses, "errors": errors}


def main():
    """Answer questions.

    Nothing is flushed to disk, which takes most of the time of saving: what is written outlives a kill anyway.
    """
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: time.sleep(0.001)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        print(json.dumps(interrupt(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
