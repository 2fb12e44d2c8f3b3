"""Speed and memory from outside: the same result, sooner.

`enable` gives modules a faster computation, `disable` takes it away, `report` says what applies. A module stays what it
is: its class, name, weights, hooks and `forward` do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def enable(target: Any) -> None:
    """Put the fast computations on a network, or on all networks of a pipeline."""


def disable(target: Any) -> None:
    """Take the fast computations off a network, or off all networks of a pipeline."""


def lay_out(network: nn.Module, device: torch.device) -> None:
    """Lay the weights of convolutions out as they are fastest on a device."""
