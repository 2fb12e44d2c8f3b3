"""Resolve a name to a folder, read its JSON files, and recognise which kind of model they describe.

A folder is used as it is, a Hub id is downloaded as far as it is needed, and "mini" is the bundled model.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from depthdiff.checkpoint.transaction import settle
from depthdiff.checks import check_flag, check_path, check_text, nearest, plain
from depthdiff.config import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Unpack

Name = str | os.PathLike[str]

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
NO_HUB_ID = "is neither a folder nor a Hub id (owner/name, of letters, digits, '-', '_' and '.')"
BUNDLED = "mini"
"""The name of the small model that comes with the package; a folder of that name is reached as "./mini"."""

DIFFUSERS_VERSION = "0.42.1"
"""The version of diffusers that is written into configs; its loader requires one."""

MAX_JSON = 2**23
"""Bytes; the largest JSON file of a checkpoint, `tokenizer.json`, has 4 million."""

MAX_PARTS = 100_000
"""Lists and objects in a JSON file: in memory each takes some 100 bytes, in the file as few as 3."""

DEPTH_MODEL = "sd2-community/stable-diffusion-2-depth"
CHANNELS = 5
"""Of the UNet of a depth-to-image model: four of latents and one of depth."""

WITH_CONTROLNET = "diffusers' pipelines, with depth by a ControlNet"
BY_CHANNELS = {
    7: ("an upscaler (x4)", "diffusers' StableDiffusionUpscalePipeline"),
    8: ("a model that edits by instruction, or a latent upscaler", "the pipeline in diffusers that it was made for"),
    9: ("an inpainting model", "diffusers' StableDiffusionInpaintPipeline"),
}
BY_WIDTH = {
    768: ("Stable Diffusion 1 (text-to-image)", WITH_CONTROLNET),
    2048: ("Stable Diffusion XL (text-to-image)", WITH_CONTROLNET),
}
"""`in_channels` of a UNet, and `cross_attention_dim` of one with four -> what the model is, and what it is good for."""


class HubOptions(TypedDict, total=False):
    """Options of every loader that concern the Hub.

    Attributes:
        revision: branch, tag or commit.
        cache_dir: where downloads are stored; huggingface_hub's own cache if absent.
        token: for gated repositories.
        local_files_only: never ask the network.
        force_download: ignore the cache.
    """

    revision: str | None
    cache_dir: Name | None
    token: str | bool | None
    local_files_only: bool
    force_download: bool


HUB_ARGUMENTS = tuple(HubOptions.__annotations__)


def check_places(**places: object) -> None:
    """Refuse options of loading of a wrong type; see `fetch` for what they mean.

    Raises:
        TypeError: an unknown option, or a value of a wrong type.
        ValueError: a name that no file system can hold.
    """
    known = ("subfolder", *HUB_ARGUMENTS)
    for name, value in places.items():
        if name not in known:
            raise TypeError(f"{name!r} is not an option of loading{nearest(name, known)}")
        if name in ("local_files_only", "force_download"):
            check_flag(name, value)
        elif name == "cache_dir" and value is not None:
            check_path(name, value)
        elif name in ("subfolder", "revision") or (name == "token" and not isinstance(plain(value), bool)):
            check_text(name, value)


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
    **hub: Unpack[HubOptions],
) -> Path:
    """Find the folder that holds some files, and download those that are missing.

    Args:
        name_or_path: a folder, a Hub id such as "owner/name", or "mini".
        filenames: that must be there.
        subfolder: of the folder or repository in which they are.
        optional: files, or patterns with `*`, that may be there.
        **hub: see `HubOptions`.

    Returns:
        The local folder, `subfolder` included.

    Raises:
        TypeError: an argument of a wrong type.
        CheckpointError: neither folder nor repository, not reachable, or a file is missing.
    """
    check_path("the model's name", name_or_path)
    check_places(subfolder=subfolder, **hub)
    steps = re.split(r"[/\\]", subfolder.rstrip("/")) if subfolder else []
    if subfolder and (subfolder.startswith("/") or {"..", ""} & set(steps)):
        raise CheckpointError(f"subfolder must name a folder inside of {name_or_path}, got {subfolder!r}")
    token = hub.get("token")
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):  # else it would be in the error of a header
        raise CheckpointError("token holds a space, a line break or another character that no token has")
    root = bundled() if name_or_path == BUNDLED else Path(name_or_path)
    if not str(name_or_path) or not root.is_dir():
        _refuse_paths(str(name_or_path))
        prefix = f"{subfolder}/" if subfolder else ""
        from depthdiff.checkpoint.download import download  # deferred: what it needs takes 0.2 s to import

        root = download(str(name_or_path), [prefix + name for name in (*filenames, *optional)], **hub)
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


def _refuse_paths(name: str) -> None:
    """Refuse a file, or a mistyped path, that is not a Hub id."""
    if Path(name).is_file():
        raise CheckpointError(
            f"{name} is a file, expected a folder in the layout of diffusers or a Hub id; from_single_file loads files"
        )
    is_path = name.startswith((".", "~", os.sep)) or "\\" in name
    if is_path or not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name[:80]!r} {NO_HUB_ID}")


def fetch_config(name_or_path: Name, filename: str, **where: Any) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; `where` is as in `fetch`, and so are the errors."""
    return read_json(fetch(name_or_path, [filename], **where) / filename)


def commit_of(folder: Path) -> str | None:
    """Return which commit of a repository a folder of the cache holds; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) else None


@contextmanager
def naming_the_cache(folder: Path) -> Iterator[None]:
    """Add to errors about files in the cache of the Hub how its entry is repaired."""
    entry = next((p.parent.parent for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    try:
        yield
    except CheckpointError as error:
        if entry is None or not entry.name.startswith("models--") or "force_download" in str(error):
            raise
        message = f"{error}. If the cache is damaged, pass force_download=True, or delete {entry}"
        raise CheckpointError(message) from error


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
        raise CheckpointError(f"{path} is a web page saved under this name; download the file itself")
    return parse_json(content, path)


def parse_json(content: bytes, path: Path, part: str = "") -> dict[str, Any]:
    """Parse a JSON object; `path` and `part` of the file are for errors, which are those of `read_json`."""
    name = f"{path}: its {part}" if part else str(path)
    if content.count(b"[") + content.count(b"{") > MAX_PARTS:
        raise CheckpointError(f"{name} cannot be read: it has more than {MAX_PARTS:,} parts; is the file damaged?")
    try:
        values = json.loads(content, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} cannot be read: {error}; is the file missing or damaged?") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} must hold a JSON object, got {type(values).__name__}; is the file damaged?")
    return values


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of the pairs of an object; refuse a name that stands in it twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name[:80]!r} stands twice in one object")
    return values


def refuse_other_unet(source: object, unet: Mapping[str, Any], prediction_type: str) -> None:
    """Refuse a latent diffusion model whose UNet does not take depth.

    Args:
        source: name of the checkpoint, for errors.
        unet: the config of its UNet.
        prediction_type: of its scheduler.

    Raises:
        CheckpointError: names what it is, what it is good for, and what to load instead.
    """
    channels, width = unet.get("in_channels", 4), unet.get("cross_attention_dim")
    if channels == CHANNELS or not isinstance(channels, int):
        return
    kind, useful = "a model of another kind", "the pipeline that it was made for"
    if channels in BY_CHANNELS:
        kind, useful = BY_CHANNELS[channels]
    elif channels == 4 and width == 1024:
        kind = "Stable Diffusion 2 or 2.1 base (text-to-image)"
        if prediction_type == "v_prediction":
            kind = "Stable Diffusion 2 or 2.1 at 768 pixels (text-to-image, v-prediction)"
        useful = "diffusers' StableDiffusionPipeline; its text encoder and LoRAs fit the depth model as well"
    elif channels == 4 and isinstance(width, int):
        kind, useful = BY_WIDTH.get(width, ("a text-to-image model", "diffusers' text-to-image pipelines"))
    raise CheckpointError(
        f"{source} is {kind}: its UNet takes {channels} channels, depth-to-image needs {CHANNELS}, the last being "
        f"depth. It is good for {useful}. Use a depth-to-image checkpoint such as {DEPTH_MODEL}, or pass the UNet of "
        "one as unet=..."
    )


def refuse_other_kinds(source: object, index: Mapping[str, Any], folder: Path) -> None:
    """Refuse a pipeline with this `model_index.json` whose UNet does not take depth, as `refuse_other_unet` does."""
    unet, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    if "unet" in index and unet.is_file():
        settings = read_json(scheduler) if scheduler.is_file() else {}
        name = f"{source}, saved as {index.get('_class_name', 'a pipeline of unknown class')},"
        refuse_other_unet(name, read_json(unet), str(settings.get("prediction_type", "epsilon")))


def describe_folder(name_or_path: Name) -> None:
    """Refuse a folder that is not a pipeline, and name what is there instead of `model_index.json`."""
    check_path("the model's name", name_or_path)
    folder = Path(name_or_path)
    is_name = name_or_path == BUNDLED or not str(name_or_path) or not folder.is_dir()
    if is_name or (folder / "model_index.json").is_file():
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
