"""Convert a checkpoint between the layout of a folder and that of a single file, in either direction.

    python scripts/convert.py FOLDER FILE.safetensors [--dtype fp16]
    python scripts/convert.py FILE.safetensors|FILE.ckpt FOLDER [--dtype fp16]

Tensors are copied one by one: the memory needed is that of the largest, and the target is there whole or not at all.
Without --dtype every weight keeps its bits: a folder that became a file and a folder again is the same, bit for bit.

A folder has no place for some tensors of Stability's file, which nothing needs: the text tower's last layer (the model
reads the one before it), text_projection, logit_scale, the vision transformer's head, the constants of the noise
schedule, a second, averaged UNet (model_ema). They are left out, and not made up again when a folder becomes a file.
A single file has no place for configs, tokenizer and scheduler, nor for position_ids, which are constants: back in a
folder they are the published ones, or those of --config.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from depthdiff.checkpoint.single_file import lost_settings, open_single_file
from depthdiff.convert import to_folder, to_single_file
from depthdiff.registry import CLASSES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder with model_index.json, or a file")
    parser.add_argument("target", type=Path, help="a file that ends in .safetensors, or a folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the source's own)")
    parser.add_argument("--variant", help="of a folder's weight files, such as fp16")
    parser.add_argument("--config", help="folder or Hub id that has a file's configs, tokenizer and scheduler")
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction", "sample"), help="of a file's UNet")
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype] if options.dtype else None
    try:
        if options.source.is_dir():
            if options.target.suffix != ".safetensors":
                raise ValueError(f"{options.target} must end in .safetensors; pickles are not written")
            to_single_file(options.source, options.target, dtype=dtype, variant=options.variant)
            warn_of_lost_settings(options.source, options.target)
        else:
            how = {"config": options.config, "prediction_type": options.prediction_type}
            to_folder(options.source, options.target, dtype=dtype, **how)
    except (OSError, ValueError) as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.target}")
    return 0


def warn_of_lost_settings(folder: Path, file: Path) -> None:
    """Say what of the folder's configs a reader of the file alone would guess wrongly."""
    lost = lost_settings(open_single_file(file), folder, CLASSES)
    if lost:
        print(
            f"convert: warning: no shape in {file} tells {', '.join(lost)}; load it with config={str(folder)!r}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
