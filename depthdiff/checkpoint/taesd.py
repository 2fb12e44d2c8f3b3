"""The two files in which TAESD is published: the layers of one sequence each, under their numbers.

The decoder's sequence begins with the function that squashes the latents, so that its numbers are one higher than in
diffusers' layout. Source: madebyollin/taesd, taesd.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from depthdiff.checkpoint.ldm import Table
from depthdiff.checkpoint.loading import DType, build, fill, read_dtype
from depthdiff.checkpoint.weights import Source, is_pickle, open_pickle, open_safetensors, read_start

LAYERS = 19
"""Of the decoder's sequence in diffusers' layout."""

TABLE = Table(
    {
        "encoder.{i}": "encoder.layers.{i}",
        "encoder.{i}.conv.{j}": "encoder.layers.{i}.conv.{j}",
        **{f"decoder.{layer + 1}": f"decoder.layers.{layer}" for layer in range(LAYERS)},
        **{f"decoder.{layer + 1}.conv.{{j}}": f"decoder.layers.{layer}.conv.{{j}}" for layer in range(LAYERS)},
    }
)


@torch.inference_mode(False)
def load_taesd(
    cls: type[Any], encoder: str | os.PathLike[str], decoder: str | os.PathLike[str], torch_dtype: DType = None
) -> Any:
    """Load a tiny autoencoder; see `depthdiff.AutoencoderTiny.from_taesd`."""
    dtype = read_dtype(torch_dtype)
    sources: dict[str, Source] = {}
    for part, path in (("encoder", Path(encoder)), ("decoder", Path(decoder))):
        sources |= {f"{part}.{key}": source for key, source in _open(path).items()}
    return fill(build(cls, {}, "TAESD"), f"{encoder} and {decoder}", sources, TABLE, dtype)


def _open(path: Path) -> dict[str, Source]:
    return open_pickle(path) if is_pickle(read_start(path)) else open_safetensors(path)
