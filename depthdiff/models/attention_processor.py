"""Attention and its processors under the module name that published code imports them from."""

from __future__ import annotations

from depthdiff.models.attention import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

__all__ = ["Attention", "AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"]
