"""Saving on disks that are full, read-only or mounted in odd places; `test_disks.py` runs this file by `unshare`.

It mounts file systems inside one folder of its own, which nobody else sees, and writes a line of JSON for each case.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from PIL import Image

from depthdiff import PNDMScheduler, StableDiffusionDepth2ImgPipeline, cli
from depthdiff.convert import to_folder, to_single_file
from depthdiff.image import contact_sheet, depth_image
from depthdiff.picture_files import save_image
from tests.killed import loaded, noise, small_pipeline

KIB = 1024


def mount(place, size):
    """Mount a disk of some KiB."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(place)], check=True)


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def contents(place):
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(place.rglob("*"))
    }


def picture(ending):
    def prepare(tools, disk):
        path = disk / f"a{ending}"
        image = Image.fromarray(noise(1, 150, 200, 3))
        save_image(image.resize((20, 15)), path)
        return lambda: save_image(image, path)

    return prepare


def sheet(tools, disk):
    image = contact_sheet([Image.fromarray(noise(1, 60, 80, 3))] * 3, ["photo", "depth", "x"])
    save_image(image.resize((8, 8)), disk / "sheet.png")
    return lambda: save_image(image, disk / "sheet.png")


def depth(tools, disk):
    image = depth_image(torch.rand(200, 300))
    save_image(image.crop((0, 0, 5, 5)), disk / "depth.png")
    return lambda: save_image(image, disk / "depth.png")


def pretrained(tools, disk):
    tools["old"].save_pretrained(disk / "checkpoint")
    return lambda: tools["new"].save_pretrained(disk / "checkpoint", max_shard_size="500KB")


def pretrained_new(tools, disk):
    return lambda: tools["new"].save_pretrained(disk / "deep" / "new")


def scheduler(tools, disk):
    PNDMScheduler().save_pretrained(disk / "scheduler")
    return lambda: PNDMScheduler(steps_offset=1).save_pretrained(disk / "scheduler")


def tokenizer(tools, disk):
    tools["old"].tokenizer.save_pretrained(disk / "tokenizer")
    return lambda: tools["new"].tokenizer.save_pretrained(disk / "tokenizer")


def lora(tools, disk):
    layers = {f"x.lora_{letter}.weight": torch.rand(100, 200) for letter in "AB"}
    save = StableDiffusionDepth2ImgPipeline.save_lora_weights
    save(disk, {key: tensor[:2] for key, tensor in layers.items()})
    return lambda: save(disk, layers)


def lora_new(tools, disk):
    layers = {f"x.lora_{letter}.weight": torch.rand(100, 200) for letter in "AB"}
    return lambda: StableDiffusionDepth2ImgPipeline.save_lora_weights(disk / "loras", layers)


def single_file(tools, disk):
    (disk / "model.safetensors").write_text("the old one")
    return lambda: to_single_file(tools["folder"], disk / "model.safetensors")


def folder(tools, disk):
    (disk / "checkpoint" / "unet").mkdir(parents=True)
    (disk / "checkpoint" / "unet" / "config.json").write_text("the old one")
    return lambda: to_folder(tools["file"], disk / "checkpoint", config=tools["folder"])


def command(tools, disk):
    photo = tools["place"] / "photo.png"
    Image.fromarray(noise(2, 96, 128, 3)).save(photo)
    paths = {"-o": disk / "a.bmp", "--sheet": disk / "sheet.png", "--save-depth": disk / "depth.tiff"}
    for path in paths.values():
        path.write_text("the old one")
    options = [str(one) for pair in paths.items() for one in pair]
    options = ["a cup", str(photo), "--model", str(tools["folder"]), "--steps", "1", *options]

    def run():
        status = cli.main(options)
        if status:
            error = tools["err"].read_text().splitlines()
            ours = [line for line in error if line.startswith("depthdiff: error: ")]
            assert status == 1
            assert len(ours) == 1
            assert not any("Traceback" in line for line in error)
            raise OSError(ours[0])

    return run


WORKS = {
    "picture .png": picture(".png"),
    "scheduler": scheduler,
    "save_pretrained": pretrained,
    "command": command,
    "save_lora_weights": lora,
    "to_folder": folder,
    "picture .bmp": picture(".bmp"),
    "picture .jpg": picture(".jpg"),
    "picture .tiff": picture(".tiff"),
    "picture .webp": picture(".webp"),
    "sheet": sheet,
    "depth": depth,
    "save_pretrained, new": pretrained_new,
    "tokenizer": tokenizer,
    "save_lora_weights, new": lora_new,
    "to_single_file": single_file,
}


def full(work, tools, disk, rng):
    """Leave some room, from none to not quite enough."""
    mount(disk, 64 * KIB)
    save = WORKS[work](tools, disk)
    room = rng.choice([0, 100, 400, 900] if work == "save_pretrained" else [0, 4, 8, 24])
    filling = shutil.disk_usage(disk).free - room * KIB
    (disk / "filling").write_bytes(b"x" * filling)
    return save


def read_only(work, tools, disk, rng):
    mount(disk, 64 * KIB)
    save = WORKS[work](tools, disk)
    remount(disk, "ro")
    return save


def try_one(how, work, tools, disk, rng):
    """Save, see what it says and what is left; return faults in words, and whether it was refused."""
    save = (full if how == "full" else read_only)(work, tools, disk, rng)
    before, faults, refused = contents(disk), [], False
    tools["err"].write_text("")
    try:
        save()
    except OSError:
        refused = True
    except BaseException:
        faults.append(traceback.format_exc())
    after = contents(disk)
    if refused:
        allowed = {"a.bmp", "sheet.png", "depth.tiff"} if work == "command" else set()  # each is whole, old or new
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        if changed - allowed:
            faults.append(f"changed {sorted(changed)}")
        for name in changed & allowed:
            with Image.open(disk / name) as image:
                image.load()
    elif how == "read-only":
        faults.append("no error")
    if any(".depthdiff-" in name for name in after):
        faults.append(f"left {sorted(after)}")
    subprocess.run(["umount", str(disk)], check=True)
    return faults, refused


def mounted_inside(tools, disk, rng):
    """Save into a folder a part of which is another disk."""
    target = disk / "checkpoint"
    tools["old"].save_pretrained(target)
    (target / "theirs.txt").write_text("theirs")
    mount(target / "unet", 64 * KIB)
    (target / "unet" / "notes.txt").write_text("on the other disk")
    return check_saved(tools, target, ["theirs.txt", "unet/notes.txt"], [target / "unet"])


def mounted_itself(tools, disk, rng):
    """Save into a folder that is a disk."""
    mount(disk, 64 * KIB)
    (disk / "theirs.txt").write_text("theirs")
    tools["old"].save_pretrained(disk)
    return check_saved(tools, disk, ["theirs.txt"], [disk])


def check_saved(tools, target, theirs, mounts):
    before = {name: contents(target)[name] for name in theirs}
    devices = [place.stat().st_dev for place in mounts]
    tools["new"].save_pretrained(target)
    after, faults = contents(target), []
    if loaded(target) != tools["new state"]:
        faults.append("it is not the new one")
    if {name: after[name] for name in theirs} != before:
        faults.append("what is theirs has changed")
    if [place.stat().st_dev for place in mounts] != devices:
        faults.append("a mount is gone")
    if any(".depthdiff-" in name for name in after):
        faults.append(f"left {sorted(after)}")
    for place in mounts:
        subprocess.run(["umount", str(place)], check=True)
    return faults, False


def main():
    torch.set_num_threads(1)
    place, count = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    err = place / "err"
    err.touch()
    for stream in (1, 2):
        os.dup2(os.open(err if stream == 2 else os.devnull, os.O_WRONLY | os.O_APPEND), stream)
    tools = {"place": place, "err": err, "old": small_pipeline(0), "new": small_pipeline(100)}
    tools |= {"folder": place / "source", "file": place / "source.safetensors"}
    tools["new"].save_pretrained(tools["folder"])
    tools["new state"] = loaded(tools["folder"])
    to_single_file(tools["folder"], tools["file"])
    rng = random.Random(0)
    hows = itertools.cycle(("full", "full", "read-only")) if count < len(WORKS) else ("full", "read-only")
    pairs = zip(hows, WORKS) if count < len(WORKS) else itertools.product(hows, WORKS)  # noqa: B905 - endless
    cases = list(itertools.islice(pairs, count - 2))
    for index, (how, work) in enumerate(cases):
        faults, refused = try_one(how, work, tools, place / f"disk-{index}", rng)
        print(json.dumps([f"{how}: {work}", faults, refused]), file=answers, flush=True)
    for case in (mounted_inside, mounted_itself):
        faults, refused = case(tools, place / case.__name__, rng)
        print(json.dumps([case.__name__, faults, refused]), file=answers, flush=True)


if __name__ == "__main__":
    main()
