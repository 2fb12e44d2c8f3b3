"""What a caller may give up for speed: guidance at every step, the deep part of the UNet, tokens that are alike.

Nothing here is on unless it is asked for, and then the picture is another one, close to the full computation's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from depthdiff.checks import brief, check_number
from depthdiff.models.shortcuts import DeepFeatures, TokenMerging

MOST_MERGED = 0.75
"""Of 2x2 tokens one stays."""


@dataclass(frozen=True)
class Shortcuts:
    """What a run leaves out; the defaults leave out nothing.

    Attributes:
        guidance_interval: guidance is on while the share of the training timesteps, t / 1000 for Stable Diffusion, is
            in [low, high], of which 0 is a clean picture and 1 pure noise; elsewhere the prompt alone is run, as with a
            guidance scale of 1. The paper states noise levels sigma, which are other numbers: 0.28 and 5.42, which it
            uses for Stable Diffusion XL, are shares of 0.07 and 0.81 in Stable Diffusion's noise schedule.
            Source: arXiv:2404.07724, eq. 6.
        deep_cache: run the deeper part of the UNet at every N-th step. Source: arXiv:2312.00858.
        token_merging: share of tokens that self-attention of the finest level merges away, in [0, 0.75].
            Source: arXiv:2303.17604.
    """

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    deep_cache: int = 1
    token_merging: float = 0.0

    def __post_init__(self) -> None:
        interval = self.guidance_interval
        if not isinstance(interval, (tuple, list)) or len(interval) != 2:
            raise ValueError(f"guidance_interval must be two numbers, low and high, got {brief(interval)}")
        low, high = (float(check_number("guidance_interval", number, 0.0, 1.0)) for number in interval)
        if low > high:
            raise ValueError(f"guidance_interval must be (low, high) with low <= high, got {(low, high)}")
        object.__setattr__(self, "guidance_interval", (low, high))
        object.__setattr__(self, "deep_cache", check_number("deep_cache", self.deep_cache, 1, whole=True))
        merged = check_number("token_merging", self.token_merging, 0.0, MOST_MERGED)
        object.__setattr__(self, "token_merging", merged)

    def guides(self, share: float) -> bool:
        """Tell whether guidance is on at a share of the training timesteps; 0 and 1 as limits have no end."""
        low, high = self.guidance_interval
        return (low if low > 0 else -math.inf) <= share <= (high if high < 1 else math.inf)

    def deep_features(self) -> DeepFeatures | None:
        """Make the memory of the deeper part for one run."""
        return DeepFeatures(self.deep_cache) if self.deep_cache > 1 else None

    def merging(self) -> TokenMerging | None:
        """Make what merges tokens in one run."""
        return TokenMerging(self.token_merging) if self.token_merging > 0 else None


PRESETS: Mapping[str, Shortcuts] = {"fast": Shortcuts(guidance_interval=(0.2, 1.0), deep_cache=3)}
"""Shortcuts by name; what they cost in quality is measured by `scripts/mini/shortcuts.py`."""


def choose(preset: str | None, **options: Any) -> Shortcuts:
    """Combine a preset with options of `Shortcuts`, of which those that are not None count instead of the preset's.

    Raises:
        TypeError: an option of a wrong type.
        ValueError: an unknown preset, or an option out of range.
    """
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, or None, got {brief(preset)}")
    chosen = Shortcuts() if preset is None else PRESETS[preset]
    return dataclasses.replace(chosen, **{name: value for name, value in options.items() if value is not None})
