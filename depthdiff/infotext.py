"""What AUTOMATIC1111's web UI writes into its pictures, as options of the command.

Source: AUTOMATIC1111/stable-diffusion-webui, wiki, "Features": "PNG info", and the texts of its version 1.10.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from PIL import Image

from depthdiff.call_options import LARGEST_FACTOR
from depthdiff.registry import make_scheduler

PNG_KEY = "parameters"
EXIF_FOLDER, USER_COMMENT = 0x8769, 0x9286
"""Tags of EXIF 2.32."""
FIRST = "Steps: "
"""Begins the line of settings, which prompt and negative prompt precede."""
NEGATIVE = "Negative prompt:"
EXTRA = re.compile(r"<(\w+):([^<>:]+)(?::([^<>]*))?>")
"""A network that a prompt asks for, as in `<lora:style:0.8>`."""
SAME_NAMES = {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Denoising strength": "strength"}


def find_infotext(image: Image.Image) -> str | None:
    """Return the text in a PNG, or in the EXIF tags of another picture; None where there is none."""
    text = image.info.get(PNG_KEY)
    if text is None:
        comment = image.getexif().get_ifd(EXIF_FOLDER).get(USER_COMMENT, b"")
        text = _decode(comment) if isinstance(comment, bytes) else comment
    return text if isinstance(text, str) and FIRST in text else None


def _decode(comment: bytes) -> str:
    """Decode an EXIF comment, whose first 8 bytes name its encoding."""
    code, content = comment[:8].rstrip(b"\0"), comment[8:]
    if code != b"UNICODE":
        return content.decode("utf-8", "replace")
    big, little = (content.decode(f"utf-16-{end}e", "replace") for end in "bl")
    return little if FIRST in little else big


def read_infotext(text: str) -> tuple[dict[str, Any], list[str]]:
    """Translate a text into options of the command.

    Args:
        text: prompt, negative prompt, and a line of settings.

    Returns:
        The options, some still as text, and a line about each setting that has no counterpart.
    """
    prompts, settings = _split(text)
    values: dict[str, Any] = {"prompt_syntax": "a1111"}
    notes: list[str] = []
    for name, prompt in prompts.items():
        for network in EXTRA.finditer(prompt):
            kind, weight = network[1], f":{network[3]}" if network[3] else ""
            remedy = f"; name its file with --set lora=FILE{weight}" if kind in ("lora", "lyco") else ""
            notes.append(f"{network[0]} in the prompt has no counterpart{remedy}")
        values[name] = EXTRA.sub("", prompt).strip()
    for theirs, ours in SAME_NAMES.items():
        if theirs in settings:
            values[ours] = settings.pop(theirs)
    for theirs, read in READERS.items():
        if theirs in settings and (found := read(settings[theirs])) is not None:
            values |= found
            del settings[theirs]
    notes += _read_sampler(values, settings)
    if "strength" not in values or "hires" in values:  # text to image
        if "strength" in values:
            values["hires_strength"] = values["strength"]
        values |= {"strength": "1", "start": "noise"}
        notes.append("it was made of noise alone; so start=noise, with the depth of a photo that you name")
    for theirs, value in settings.items():
        notes.append(f"{theirs}: {value} has no counterpart{REMEDIES.get(theirs, '')}")
    notes.append("the picture will not be the same: other random numbers, another program, and depth that is kept")
    return values, notes


def _split(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the prompts and the settings of a text, the settings in their own words."""
    head, _, line = text.rpartition(FIRST)
    prompt, _, negative = f"\n{head}".partition(f"\n{NEGATIVE}")
    prompts = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    parts, quoted, before = [""], False, ""
    for letter in (FIRST + line).splitlines()[0]:
        quoted ^= letter == '"' and before != "\\"
        if letter == "," and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
        before = letter
    pairs = (part.partition(":") for part in parts if ":" in part)
    return prompts, {name.strip(): value.strip() for name, _, value in pairs}


def _read_sampler(values: dict[str, Any], settings: dict[str, str]) -> list[str]:
    """Move sampler and schedule into the options; return a line about each that is not there."""
    notes = []
    sampler, schedule = settings.pop("Sampler", None), settings.pop("Schedule type", None)
    if sampler is not None:
        try:
            make_scheduler(sampler, {}, "Sampler")
            values["scheduler"] = sampler
        except ValueError:
            notes.append(
                f"Sampler: {sampler} has no counterpart; the checkpoint's own is used; see --set scheduler=NAME"
            )
    if schedule == "Karras":
        try:
            make_scheduler(values.get("scheduler", ""), {}, "Sampler", karras=True)
            values["karras"] = True
        except ValueError:
            notes.append(f"Schedule type: {schedule} has no counterpart with this sampler")
    elif schedule is not None:
        notes.append(f"Schedule type: {schedule} has no counterpart; the checkpoint's own is used")
    return notes


def _size(text: str) -> dict[str, Any] | None:
    """Read "768x512", width first."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    return None if found is None else {"width": found[1], "height": found[2]}


def _clip_skip(text: str) -> dict[str, Any] | None:
    """Read which layer from the end is used, of which 1 is the last; ours is how many are left out."""
    if not text.isdecimal() or text == "0":
        return None
    return {"clip_skip": None if text == "1" else str(int(text) - 1)}


def _hires(text: str) -> dict[str, Any] | None:
    """Read the factor of a second pass."""
    try:
        return {"hires": text} if 1 <= float(text) <= LARGEST_FACTOR else None
    except ValueError:
        return None


def _blur(text: str) -> dict[str, Any] | None:
    """Read the feather of a mask, which counts where a mask is named."""
    return {"mask_blur": text}


READERS: dict[str, Callable[[str], dict[str, Any] | None]] = {
    "Size": _size,
    "Clip skip": _clip_skip,
    "Hires upscale": _hires,
    "Mask blur": _blur,
}
"""Setting -> what reads it; None where there is no counterpart."""
REMEDIES = {"Model": "; name a checkpoint with --set model=PATH"}
