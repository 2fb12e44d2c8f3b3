"""From a name to files: a folder is used as it is, a Hub id is downloaded, only as far as it is needed.

The bundled model goes by the name "mini".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthdiff.checkpoint.transaction import settle
from depthdiff.checks import check_path, check_places
from depthdiff.config import CheckpointError

Name = str | os.PathLike[str]

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
BUNDLED = "mini"
"""The name of the small model that comes with the package; a folder of that name is reached as "./mini"."""


def bundled() -> Path:
    """Find the bundled model: inside the installed package, or beside it in its repository."""
    package = Path(__file__).parent.parent
    places = [root / "weights" / BUNDLED for root in (package, package.parent)]
    for place in places:
        if place.is_dir():
            return place
    raise CheckpointError(f"this installation lacks the bundled model, expected at {places[0]}; reinstall depthdiff")


def fetch(
    name_or_path: Name,
    filenames: Sequence[str],
    *,
    subfolder: str | None = None,
    optional: Sequence[str] = (),
    revision: str | None = None,
    cache_dir: Name | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Find the folder that holds some files, and download those that are missing.

    Args:
        name_or_path: a folder, a Hub id such as "owner/name", or "mini".
        filenames: that must be there.
        subfolder: of the folder or repository in which they are.
        optional: files, or patterns with `*`, that may be there.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are stored; huggingface_hub's own cache if absent.
        token: for gated repositories.
        local_files_only: never ask the network.
        force_download: ignore the cache.

    Returns:
        The local folder, `subfolder` included.

    Raises:
        TypeError: an argument of a wrong type.
        CheckpointError: neither folder nor repository, not reachable, or a file is missing.
    """
    check_path("the model's name", name_or_path)
    check_places(
        subfolder=subfolder,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    steps = re.split(r"[/\\]", subfolder.rstrip("/")) if subfolder else []
    if subfolder and (subfolder.startswith("/") or {"..", ""} & set(steps)):
        raise CheckpointError(f"subfolder must name a folder inside of {name_or_path}, got {subfolder!r}")
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):  # else it would stand in the error of a header
        raise CheckpointError("token holds a space, a line break or another character that no token has")
    root = bundled() if name_or_path == BUNDLED else Path(name_or_path)
    if not str(name_or_path) or not root.is_dir():
        _refuse_paths(name_or_path)
        prefix = f"{subfolder}/" if subfolder else ""
        from depthdiff.checkpoint.download import download  # deferred: what it needs takes 0.2 s to import

        root = download(
            str(name_or_path),
            allow_patterns=[prefix + name for name in (*filenames, *optional)],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    else:
        settle(root)
        if subfolder and (root / subfolder).is_dir():
            settle(root / subfolder)
    folder = root / subfolder if subfolder else root
    missing = [name for name in filenames if not (folder / name).is_file()]
    if missing:
        place = f"{name_or_path}/{subfolder}" if subfolder else name_or_path
        raise CheckpointError(f"{place} has no {', '.join(missing)}; is it a checkpoint in the layout of diffusers?")
    return folder


def commit_of(folder: Path) -> str | None:
    """Tell which commit of a repository a folder of the cache holds; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) else None


@contextmanager
def naming_the_cache(folder: Path) -> Iterator[None]:
    """Let errors about files in the cache of the Hub say how its entry is made whole again."""
    entry = next((p.parent.parent for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    try:
        yield
    except CheckpointError as error:
        if entry is None or not entry.name.startswith("models--") or "force_download" in str(error):
            raise
        message = f"{error}. If the cache is damaged, pass force_download=True, or delete {entry}"
        raise CheckpointError(message) from error


def fetch_config(name_or_path: Name, filename: str, **where: Any) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; `where` is as in `fetch`, and so are the errors."""
    return read_json(fetch(name_or_path, [filename], **where) / filename)


def _refuse_paths(name: Name) -> None:
    """Tell a mistyped path, or a file, from a Hub id."""
    text = str(name)
    if Path(text).is_file():
        raise CheckpointError(
            f"{text} is a file, expected a folder in the layout of diffusers or a Hub id; from_single_file loads files"
        )
    if text.startswith((".", "~", os.sep)) or text.count("/") > 1 or "\\" in text or not text.strip():
        raise CheckpointError(f"{text!r} is no folder, and no Hub id either, which reads owner/name")
    if not HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text[:80]!r} is no folder, and no Hub id either: these hold letters, digits and -_.")


DIFFUSERS_VERSION = "0.42.1"
"""Whose layout is written; their loader wants to read some version."""

MAX_JSON = 2**23
"""Bytes; the largest JSON file of a checkpoint, `tokenizer.json`, has 4 million."""

MAX_PARTS = 100_000
"""Lists and objects in a JSON file: in memory each takes some 100 bytes, in the file as few as 3."""


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; is the file missing or damaged?") from error
    if len(content) > MAX_JSON:
        raise CheckpointError(f"{path} has {size:,} bytes, at most {MAX_JSON:,} of JSON are read; is the file damaged?")
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git-LFS pointer; run `git lfs pull` in that folder")
    if content.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{path} cannot be read: it is a web page saved under this name; download the file itself"
        )
    return parse_json(content, path)


def parse_json(content: bytes, path: Path, part: str = "") -> dict[str, Any]:
    """Parse a JSON object in which no name stands twice.

    Args:
        content: to parse.
        path: of the file, for errors.
        part: of the file, for errors.

    Raises:
        CheckpointError: damaged, or something else.
    """
    name = f"{path}: its {part}" if part else str(path)
    if content.count(b"[") + content.count(b"{") > MAX_PARTS:
        raise CheckpointError(f"{name} cannot be read: it has more than {MAX_PARTS:,} parts; is the file damaged?")
    try:
        values = json.loads(content, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise CheckpointError(f"{name} cannot be read: it is nested too deeply; is the file damaged?") from error
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be read: {error}; is the file missing or damaged?") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} must hold a JSON object, got {type(values).__name__}; is the file damaged?")
    return values


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{repeated[:80]!r} stands twice in one object")
    return values


DEPTH_MODEL = "sd2-community/stable-diffusion-2-depth"
CHANNELS = 5
"""Of the UNet of a depth-to-image model: four of latents and one of depth."""

BY_CHANNELS = {
    7: ("an upscaler (x4)", "diffusers' StableDiffusionUpscalePipeline"),
    8: ("a model that edits by instruction, or a latent upscaler", "the pipeline in diffusers that it was made for"),
    9: ("an inpainting model", "diffusers' StableDiffusionInpaintPipeline"),
}
"""Input channels of a UNet -> what it is, and what it is good for."""


def name_kind(unet: Mapping[str, Any], prediction_type: str) -> tuple[str, str]:
    """Name a latent diffusion model whose UNet does not take depth, and what it is good for.

    Args:
        unet: its parsed `config.json`.
        prediction_type: of its scheduler, such as "epsilon".
    """
    if unet.get("in_channels") in BY_CHANNELS:
        return BY_CHANNELS[unet["in_channels"]]
    width = unet.get("cross_attention_dim")
    if unet.get("in_channels") != 4 or not isinstance(width, int):
        return "a model of another kind", "the pipeline that it was made for"
    if width == 768:
        return "Stable Diffusion 1 (text-to-image)", "diffusers' pipelines, with depth by a ControlNet"
    if width == 2048:
        return "Stable Diffusion XL (text-to-image)", "diffusers' pipelines, with depth by a ControlNet"
    if width != 1024:
        return "a text-to-image model", "diffusers' text-to-image pipelines"
    useful = "diffusers' StableDiffusionPipeline; its text encoder and LoRAs fit the depth model as well"
    if prediction_type == "v_prediction":
        return "Stable Diffusion 2 or 2.1 at 768 pixels (text-to-image, v-prediction)", useful
    return "Stable Diffusion 2 or 2.1 base (text-to-image)", useful


def refuse_other_kinds(
    source: object, index: Mapping[str, Any], unet_config: Path | None = None, scheduler_config: Path | None = None
) -> None:
    """Refuse a pipeline whose UNet does not take depth.

    Args:
        source: name of the checkpoint, for errors.
        index: its parsed `model_index.json`.
        unet_config: where its UNet's config would be.
        scheduler_config: where its scheduler's config would be.

    Raises:
        CheckpointError: names what it is, and what would do.
    """
    if unet_config is None or not unet_config.is_file():
        return
    unet = read_json(unet_config)
    channels = unet.get("in_channels", 4)
    if channels == CHANNELS or "unet" not in index or not isinstance(channels, int):
        return
    scheduler = read_json(scheduler_config) if scheduler_config is not None and scheduler_config.is_file() else {}
    kind, useful = name_kind({**unet, "in_channels": channels}, str(scheduler.get("prediction_type", "epsilon")))
    raise CheckpointError(
        f"{source} is {kind}, saved as {index.get('_class_name', 'a pipeline of unknown class')}: its UNet takes "
        f"{channels} channels, depth-to-image needs {CHANNELS}, the last being depth. It is good for {useful}. "
        f"Use a depth-to-image checkpoint such as {DEPTH_MODEL}, or pass the UNet of one as unet=..."
    )


def describe_folder(name_or_path: str | os.PathLike[str]) -> None:
    """Refuse a folder that is no pipeline, and say what it is where that is plain.

    Raises:
        CheckpointError: names what is there instead of `model_index.json`.
    """
    check_path("the model's name", name_or_path)
    folder = Path(name_or_path)
    if (
        name_or_path == BUNDLED
        or not str(name_or_path)
        or not folder.is_dir()
        or (folder / "model_index.json").is_file()
    ):
        return
    single = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt"))
    inside = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    snapshots = sorted(path.parent for path in folder.glob("snapshots/*/model_index.json"))
    if snapshots:
        remedy = f"it is a repository of the cache; name {snapshots[-1]}"
    elif inside:
        remedy = f"did you mean the folder {inside[0]} in it?"
    elif (folder / "config.json").is_file():
        remedy = "it holds one component; load that with from_pretrained of its own class"
    elif single:
        remedy = f"it holds {single[0]}; from_single_file loads files"
    else:
        remedy = "is it a checkpoint in the layout of diffusers?"
    raise CheckpointError(f"{folder} has no model_index.json: {remedy}")
