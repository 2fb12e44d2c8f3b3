"""Make a picture again: read how it was made, change what is asked for, and find the files that it was made of."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from depthdiff.adapters.formats import PICKLES
from depthdiff.checkpoint.hub import BUNDLED
from depthdiff.checkpoint.single_file import SUFFIXES
from depthdiff.checks import FLOATS, brief, check_device, check_number, nearest
from depthdiff.command_checks import FILES, split_option
from depthdiff.command_inputs import checksum, checksums
from depthdiff.infotext import find_infotext, read_infotext
from depthdiff.options import MAX_IMAGES, SHORTCUT_HELP, build_parser
from depthdiff.picture_files import SETTINGS, open_image
from depthdiff.registry import CLASSES
from depthdiff.settings import KEYS, OTHER_NAMES, STORED

NOT_SET = "help", "version", "completion"
"""Options of the command that belong to no picture."""
ADAPTERS = "lora", "embedding"
BELONG = {
    "hires": ("hires_strength",),
    "mask": ("mask_blur", "mask_content"),
    "depth": ("depth_invert", "depth_range"),
    "image": ("strength", "depth_keep_aspect"),
    "preview": ("preview_decoder",),
}
"""Option -> those that mean nothing without it."""
REPLACE = {
    "size": ("height", "width", "resize_mode"),
    "height": ("size",),
    "width": ("size",),
    "depth": ("depth_keep_aspect",),
    "preset": tuple(SHORTCUT_HELP),
    "dtype": ("dtypes",),
}
"""Option -> those that it takes the place of where it is set."""
WORDS = {"true": True, "false": False}


class Parser(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong.

        Raises:
            ValueError: always.
        """
        raise ValueError(message)


def read_redo(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line of `depthdiff redo`; wrong usage ends with status 2.

    Returns:
        Options as those of the command, and lines to print. Beyond the options they say the `picture` that is made
        again, its `index` in a batch of which it alone is written, the `dtypes` of its networks, and what is stored as
        it was `typed`, since its files may now lie elsewhere.

    Raises:
        OSError: the picture, or a file that it was made of, is missing.
        ValueError: the picture does not say how it was made, or a change that cannot be.
    """
    given = build_redo_parser().parse_args(arguments)
    picture: Path = given.picture
    changes = read_changes(given.set)
    stored = read_stored(picture)
    if isinstance(stored, str):
        values, notes = read_infotext(stored)
        sums: Mapping[str, str] = {}
    else:
        values, notes = read_settings(stored, picture)
        sums = check_kind("sha256", stored.get("sha256", {}), dict)
    notes = [f"{picture}: {note}" for note in notes]
    blur = values.get("mask_blur")
    notes += change(values, changes)
    if isinstance(stored, str) and blur is not None and values.get("mask") is None:
        notes.append(f"{picture}: Mask blur: {blur} has no counterpart without the mask; name it with --set mask=PATH")
    typed = {name: values[name] for name in (*ADAPTERS, "model") if name in values and name not in changes}
    find_files(values, changes, sums, picture)
    if values.get("image") is None and values.get("depth") is None:
        raise ValueError(
            f"{picture} does not say what photo it was made of; name one with --set image=PATH, or a depth map alone "
            "with --set depth=PATH"
        )
    values["output"] = given.output or values.get("output") or picture.with_name(f"{picture.stem}-redo.png")
    options = to_options(values, given.verbose)
    options.picture, options.typed = picture, {} if isinstance(stored, str) else typed
    found = checksums(options)
    for name in sums:
        if name in found and name.split()[0] not in changes and sums[name] != found[name]:
            notes.append(f"{name} {_path(options, name)} is not what {picture} was made of: its SHA-256 has changed")
    return options, notes


def build_redo_parser() -> argparse.ArgumentParser:
    """Describe the command line of `depthdiff redo`."""
    parser = argparse.ArgumentParser(
        prog="depthdiff redo",
        description="Make a picture again by what the command stored in it, with some options changed if you like. On "
        "the same machine and version the file becomes the same to the last byte. The files that it was made of are "
        "looked for beside the picture, then in the working folder. A picture of AUTOMATIC1111's web UI is made as "
        "nearly the same as its settings have a counterpart here.",
        epilog="examples: depthdiff redo scene-depthdiff.png. "
        "depthdiff redo a.png --set strength=0.6 --set image=photos/scene.png -o b.png. "
        "Where redo is a prompt: depthdiff -- redo IMAGE",
    )
    parser.add_argument(
        "picture", metavar="PICTURE", type=Path, help="a PNG that the command wrote, or one of the web UI"
    )
    set_help = (
        "change an option of the command, by its long name, or prompt or image; true or false for a flag, none for "
        "absent, two numbers with a comma between them; may be given several times"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=set_help)
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, help="file to write (default: PICTURE-redo.png)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done; show tracebacks")
    return parser


def read_stored(picture: Path) -> dict[str, Any] | str:
    """Return the settings that the command stored in a picture, or AUTOMATIC1111's text.

    Raises:
        FileNotFoundError: no file.
        ValueError: not a picture, or one that holds neither.
    """
    if not picture.is_file():
        raise FileNotFoundError(f"PICTURE {picture} is not a file")
    image = open_image(picture, "PICTURE")
    text = image.info.get(SETTINGS)
    if text is None:
        infotext = find_infotext(image)
        if infotext is None:
            raise ValueError(
                f"PICTURE {picture} does not say how it was made; name a PNG that depthdiff wrote, or a picture of "
                "AUTOMATIC1111's web UI, as it was written: other programs may drop the text"
            )
        return infotext
    try:
        stored = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"PICTURE {picture}: its settings are damaged: {error}") from error
    return check_kind("text depthdiff", stored, dict)


def read_settings(stored: Mapping[str, Any], picture: Path) -> tuple[dict[str, Any], list[str]]:
    """Translate stored settings into options of the command.

    Returns:
        Option -> value, with `index` and `dtypes`, and lines about what the picture does not say.

    Raises:
        ValueError: settings that cannot be.
    """
    notes = []
    names = (*FILES, *STORED, *SHORTCUT_HELP)
    values = {name: stored[name] for name in names if name in stored}
    values |= {name: stored.get(key) for name, key in OTHER_NAMES.items()}
    if "solver" not in stored:  # in pictures of older versions, the class that was used
        values["scheduler"] = stored.get("scheduler")
    for name in FILES:
        if values.get(name) is not None:
            values[name] = Path(check_kind(name, values[name], str)).name
    count = check_number("num_images", stored.get("num_images", 1), 1, MAX_IMAGES, whole=True)
    index = stored.get("index")
    if count == 1 or index is None:
        values["num_images"], index = 1, None
    else:
        check_number("index", index, 0, count - 1, whole=True)
    if stored.get("seed") is not None:
        values["seed"] = check_number("seed", stored["seed"], index or 0, 2**64 - 1, whole=True) - (index or 0)
    values |= {"index": index, "dtypes": read_dtypes(stored.get("dtypes")), "device": stored.get("device")}
    if values["dtypes"] is None:
        values["dtype"] = stored.get("dtype")
    if values["device"] is not None:
        try:
            check_device("device", values["device"])
        except ValueError as error:
            notes.append(f"made on another device ({error}); the picture will differ a little")
            values["device"] = None
    if "interrupted_after" in stored:
        notes.append(f"was interrupted after {stored['interrupted_after']} steps; the whole picture is made")
    if missing := [key for key in KEYS if key not in stored]:
        version = stored.get("version", "an unknown version")
        notes.append(f"of {version}, does not say {', '.join(missing)}; today's defaults are used")
    if unknown := sorted(stored.keys() - {*KEYS, "scheduler", "dtype", "size", "interrupted_after"}):
        notes.append(f"says what this version does not know, and leaves out: {', '.join(unknown)}")
    return values, notes


def read_dtypes(stored: Any) -> dict[str, Any] | Any:
    """Read the dtypes of the networks: one for all where they are equal; None where they are not stored."""
    if stored is None:
        return None
    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    for name, dtype in check_kind("dtypes", stored, dict).items():
        if name not in CLASSES or dtype not in known:
            raise ValueError(f"dtypes must name networks and {', '.join(known)}, got {brief(name)}: {brief(dtype)}")
    dtypes = {name: known[dtype] for name, dtype in stored.items()}
    return dtypes if len(set(dtypes.values())) > 1 else next(iter(dtypes.values()), None)


def actions() -> dict[str, argparse.Action]:
    """Return the options of the command that a picture can have, by name."""
    return {action.dest: action for action in build_parser(Parser)._actions if action.dest not in NOT_SET}


def read_changes(texts: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE`, one by one, as values that `to_options` takes.

    Raises:
        ValueError: an unknown key, or no value.
    """
    known, changes = actions(), dict[str, Any]()
    for text in texts:
        key, equals, value = text.partition("=")
        name = key.strip().lstrip("-").replace("-", "_")
        if not equals or not name:
            raise ValueError(f"--set must be KEY=VALUE, such as strength=0.6, got {text!r}")
        if name not in known:
            raise ValueError(f"--set {text}: the command has no option {key!r}{nearest(name, known)}")
        action, word = known[name], value.strip().lower()
        flag = action.const is True
        if word == "none":
            changes[name] = None
        elif flag and word in WORDS:
            changes[name] = WORDS[word]
        elif flag and action.nargs == 0:
            raise ValueError(f"--set {text}: {name} must be true or false, got {value!r}")
        elif action.nargs == 2:
            changes[name] = value.replace(",", " ").split()
        elif name in ADAPTERS:
            changes[name] = [*(changes.get(name) or []), value]
        else:
            changes[name] = value
    return changes


def change(values: dict[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Put changes into the options of a picture, and take out what then means nothing; return lines to print."""
    notes = []
    if values.get("index") is not None and ("seed" in changes or "num_images" in changes):
        values |= {"seed": values["seed"] + values["index"], "num_images": 1, "index": None}
        notes.append("with --set of seed or num_images, the picture is made without the others of its batch")
    values |= changes
    for name, others in REPLACE.items():
        if changes.get(name) is not None:
            values |= dict.fromkeys(set(others) - changes.keys())
    for name, others in BELONG.items():
        if values.get(name) is None and (name != "depth" or name in changes):
            values |= dict.fromkeys(set(others) - changes.keys())
    if values.get("height") is None and values.get("width") is None and "resize_mode" not in changes:
        values["resize_mode"] = None
    return notes


def find_files(values: dict[str, Any], changes: Mapping[str, Any], sums: Mapping[str, str], picture: Path) -> None:
    """Replace the names of files in options, but for those that are changed, by where they are.

    Raises:
        FileNotFoundError: names all that are neither beside the picture nor in the working folder.
    """
    folders, missing = (picture.parent, Path()), dict[str, str]()
    for name in FILES:
        if values.get(name) is not None and name not in changes:
            places = [folder / values[name] for folder in folders]
            values[name] = _choose(places, sums.get(name), Path.is_file)
            if values[name] is None:
                missing[f"{places[0].name} ({name})"] = f"--set {name}=PATH"
    for name in ADAPTERS:
        texts = check_kind(name, values.get(name) or [], list)
        if name in changes:
            continue
        values[name] = []
        for number, text in enumerate(texts, 1):
            key = f"{name} {number}"
            found = _find_adapter(check_kind(name, text, str), folders, sums.get(key))
            file = split_option(text)[0]
            if found is None and (key in sums or Path(file).suffix in (".safetensors", *PICKLES)):
                missing[f"{file} ({key})"] = f"--set {name}={text.replace(file, 'PATH')}"
            values[name].append(found or text)
    model = values.get("model")
    if model not in (None, BUNDLED) and "model" not in changes:
        place = _choose([folder / check_kind("model", model, str) for folder in folders], None, Path.exists)
        if place is not None:
            values["model"] = str(place)
        elif Path(model).is_absolute() or model.endswith(SUFFIXES):
            missing[f"{model} (model)"] = "--set model=PATH"
    if missing:
        raise FileNotFoundError(
            f"{picture} was made of files that are neither beside it nor in the working folder: {', '.join(missing)}; "
            f"say where they are: {' '.join(missing.values())}"
        )


def _choose(places: Iterable[Path], wanted: str | None, there: Callable[[Path], bool]) -> Path | None:
    """Return the place with a checksum, else the first at which something is; None where there is nothing."""
    found = [place for place in places if there(place)]
    same = [place for place in found if wanted is not None and checksum(place) == wanted]
    return next(iter([*same, *found]), None)


def _find_adapter(text: str, folders: Sequence[Path], wanted: str | None) -> str | None:
    """Return `FILE:MORE` with the place at which FILE is, by its path, else by its name; None where it is nowhere."""
    names = text, text[len(split_option(text)[0]) - len(Path(split_option(text)[0]).name) :]
    found: dict[Path, str] = {}
    for name in names:
        for folder in folders:
            file, more = split_option(str(folder / name))
            if Path(file).exists():
                found.setdefault(Path(file), file if more is None else f"{file}:{more}")
    place = _choose([path for path in found if path.is_file()], wanted, Path.is_file) or next(iter(found), None)
    return None if place is None else found[place]


def to_options(values: Mapping[str, Any], verbose: bool) -> argparse.Namespace:
    """Let the parser of the command read options, so that each has its type and is refused where it cannot be.

    Raises:
        ValueError: a value that an option cannot have.
    """
    prompt = values.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text, got {brief(prompt)}")
    known, words = actions(), [""]
    for name, value in values.items():
        if name in known and known[name].option_strings:
            words += _words(known[name], value)
    options = build_parser(Parser).parse_args(words)
    options.prompt, options.image = prompt, None if values.get("image") is None else Path(values["image"])
    options.index, options.dtypes = values.get("index"), values.get("dtypes")
    options.verbose |= verbose
    return options


def _words(action: argparse.Action, value: Any) -> list[str]:
    """Write an option as on a command line; nothing where it is absent."""
    option = action.option_strings[-1]
    if value is None or value is False or value == []:
        return []
    if value is True:
        return [option]
    if isinstance(value, list):
        return [option, *map(_number, value)] if action.nargs == 2 else [f"{option}={one}" for one in value]
    return [f"{option}={value}"]


def _number(value: Any) -> str:
    """Write a number without an exponent, which the parser would take for an option behind a minus."""
    return np.format_float_positional(value, trim="-") if isinstance(value, float) else str(value)


def _path(options: argparse.Namespace, name: str) -> Path:
    """Return the file of an entry of the checksums, such as "image" or "lora 2"."""
    option, _, number = name.partition(" ")
    value = getattr(options, option)
    return Path(split_option(value[int(number) - 1])[0]) if number else value


def check_kind(name: str, value: Any, kind: type) -> Any:
    """Return a stored value of the kind that it must be.

    Raises:
        ValueError: another one.
    """
    if not isinstance(value, kind):
        kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
        raise ValueError(f"the stored {name} must be {kinds[kind]}, got {brief(value)}; the settings are damaged")
    return value
