"""Weights that are something else while their layer works: on another device, or in a wider dtype than they lie in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from depthdiff.models.base import Model

if TYPE_CHECKING:
    from typing_extensions import Self

CASTABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)
"""Layers whose weights may lie in a narrow dtype; norms are small, and need their digits."""

SKIPPED = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
"""Names of layers that keep their dtype unless others are named. Source: diffusers, hooks/layerwise_casting.py."""

STORAGE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16)
COMPUTE = (torch.float16, torch.bfloat16, torch.float32)


class Visit:
    """Makes a layer's own weights what `Tensor.to` makes of them before it works, and what they were after it.

    Args:
        target: arguments of `torch.Tensor.to`.
    """

    def __init__(self, **target: Any) -> None:
        self.target = target
        self.at_home: dict[str, Tensor] = {}

    def attach(self, layer: nn.Module) -> list[RemovableHandle]:
        """Set the hooks; of several visits of one layer, the last to go is the first to come back."""
        come_back = layer.register_forward_hook(self.come_back, prepend=True, always_call=True)
        return [layer.register_forward_pre_hook(self.go), come_back]

    def go(self, layer: nn.Module, args: object) -> None:
        """Change the weights."""
        for name, parameter in layer.named_parameters(recurse=False):
            self.at_home[name] = parameter.data
            parameter.data = parameter.data.to(**self.target)

    def come_back(self, layer: nn.Module, args: object, output: object) -> None:
        """Put the weights back."""
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.data = self.at_home.pop(name)


class LayerwiseCasting(Model):
    """A network whose weights may lie in fewer bits than they work in.

    Attributes:
        storage_dtype: in which they lie, if that is so.
    """

    storage_dtype: torch.dtype | None = None
    _compute_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights while they work."""
        return self._compute_dtype or super().dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        stored = self.storage_dtype
        if stored is not None and fn(torch.empty(0, dtype=stored)).dtype != stored:
            raise ValueError(f"weights lie in {stored} and cannot be cast again; load the network anew")
        return super()._apply(fn, recurse)

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: str | tuple[str, ...] | None = None,
        skip_modules_classes: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Let the weights lie in fewer bits than they work in, layer by layer: float8 takes half of float16's memory.

        It cannot be taken back, as the digits are gone. From then on the network is cast no more, and runs uncompiled
        and unrecorded; adapters are rounded to what they are merged into. For inference alone.

        Args:
            storage_dtype: in which they lie, one of STORAGE.
            compute_dtype: in which they work, one of COMPUTE; what they are now if absent.
            skip_modules_pattern: patterns, searched in the published names of layers and of what they are in, of what
                stays as it is; SKIPPED if absent.
            skip_modules_classes: classes of what stays as it is.
            non_blocking: see `torch.Tensor.to`.

        Raises:
            ValueError: a dtype is not one of those, or none would be narrower; it is on already; or no layer is cast.
        """
        from depthdiff.checkpoint.tables import TABLES  # deferred, as in base.py

        compute = self.dtype if compute_dtype is None else compute_dtype
        for name, dtype, known in (("storage_dtype", storage_dtype, STORAGE), ("compute_dtype", compute, COMPUTE)):
            if dtype not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {dtype!r}")
        if storage_dtype.itemsize >= compute.itemsize:
            raise ValueError(f"storage_dtype must be narrower than compute_dtype, got {storage_dtype} and {compute}")
        if self.storage_dtype is not None:
            raise ValueError(f"weights lie in {self.storage_dtype} already; load the network anew to choose another")
        names = (skip_modules_pattern,) if isinstance(skip_modules_pattern, str) else skip_modules_pattern
        table = TABLES[type(self).__name__]
        layers = list(
            castable(
                self,
                lambda name: table.published(f"{name}.weight").removesuffix(".weight"),
                SKIPPED if names is None else tuple(names),
                skip_modules_classes or (),
            )
        )
        if not layers:
            raise ValueError("skip_modules_pattern and skip_modules_classes leave no layer to cast; name fewer")
        self.to(compute)
        for layer in layers:
            layer.to(storage_dtype)
            Visit(dtype=compute, non_blocking=non_blocking).attach(layer)
        self.storage_dtype, self._compute_dtype, self.mark = storage_dtype, compute, object()


def castable(
    network: nn.Module,
    name_of: Callable[[str], str],
    names: tuple[str, ...],
    classes: type[nn.Module] | tuple[type[nn.Module], ...],
) -> Iterator[nn.Module]:
    """List the layers whose weights may lie in a narrow dtype.

    Args:
        network: whose layers.
        name_of: our name of a layer -> its published name.
        names: patterns of what is left out, searched in the names of layers and of all that they are in.
        classes: likewise.
    """
    left_out: set[nn.Module] = set()
    for name, layer in network.named_modules():
        if layer in left_out or isinstance(layer, classes):
            left_out.update(layer.children())
        elif isinstance(layer, CASTABLE):
            inside = accumulate(name_of(name).split("."), "{}.{}".format)
            if not any(re.search(pattern, place) for place in inside for pattern in names):
                yield layer
