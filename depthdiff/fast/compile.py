"""Compiled networks and recorded steps: switches of the pipeline that change how fast it is, and not what it does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from depthdiff.capture import StepGraph
from depthdiff.components import Components
from depthdiff.models.base import Body, Model, hooked

logger = logging.getLogger(__name__)

COMPILED = ("unet", "vae", "text_encoder")
"""The depth net is left out: it works once a picture, and compiling it costs more than it will ever save."""
OWN_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which torch's compiler records CUDA graphs itself."""


class Compiled(Body):
    """Stands in the place of a network's method: torch.compile's form of it, or the plain one where layers have hooks.

    Args:
        network: whose method it is.
        body: the method.
        options: of torch.compile.
    """

    def __init__(self, network: Model, body: Callable[..., Any], options: dict[str, Any]) -> None:
        self.network, self.body = network, body
        self.compiled: Callable[..., Any] = torch.compile(body, **options)
        self._reuses_memory = options["mode"] in OWN_GRAPHS
        self._hooked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the method does."""
        if torch.compiler.is_compiling():
            return self.body(*args, **kwargs)
        before, self._hooked = self._hooked, hooked(self.network)
        if not self._hooked:
            result = self.compiled(*args, **kwargs)
            return result.clone() if self._reuses_memory and isinstance(result, torch.Tensor) else result
        if not before:
            logger.warning(
                "%s runs uncompiled: it has hooks, as sequential offloading or layerwise casting sets",
                type(self.network).__name__,
            )
        return self.body(*args, **kwargs)


class Acceleration(Components):
    """Adds what makes a pipeline faster to the components.

    The networks themselves stay what they are, and so do their weights' names: only methods of these very objects are
    replaced, and a network that is put in the place of another gets them when it first works.
    """

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self._compile_options: dict[str, Any] | None = None
        self._recordings = 0

    def compile(
        self,
        mode: str | None = None,
        fullgraph: bool = True,
        dynamic: bool | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        """Run UNet, autoencoder and text encoder through torch.compile; the work is done when each first runs.

        Adapters may come and go, and `to` may move the networks. A second size of picture compiles once more, for any
        size if `dynamic` is None. Networks with hooks (of sequential offloading or layerwise
        casting) run uncompiled, and so does a call with `cross_attention_kwargs={"scale": ...}`, which works on a
        copy of the UNet; `set_adapters` with other weights does not.

        Args:
            mode: None, "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs".
            fullgraph: raise an error rather than compile in parts.
            dynamic: True for any size from the start, False for each size anew.
            backend: of torch.compile.
        """
        self._compile_options = {"mode": mode, "fullgraph": fullgraph, "dynamic": dynamic, "backend": backend}
        self._accelerate_all()

    def uncompile(self) -> None:
        """Run the networks as they are again."""
        self._compile_options = None
        self._accelerate_all()

    def capture(self, size: int = 4) -> None:
        """Record the UNet's work on a CUDA device as a graph, once for each batch, size and dtype, and replay it.

        The same kernels run, so pictures stay the same. A weight that moves or is replaced, as adapters do, has it
        recorded anew; on other devices, with offloading, hooks or gradients the UNet runs as without it, and the log
        says why.

        Args:
            size: how many recordings are kept, the latest used ones; each holds the memory of one step.

        Raises:
            ValueError: `size` is below 1.
        """
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"size must be a whole number from 1, got {size!r}")
        self._recordings = size
        self._accelerate_all()

    def release_capture(self) -> None:
        """Drop the recordings and their memory, and record no more."""
        self._recordings = 0
        self._accelerate_all()

    def _at_work(self, name: str) -> Any:
        network = super()._at_work(name)
        asked = (name in COMPILED and self._compile_options is not None) or (name == "unet" and self._recordings > 0)
        if asked and not all(isinstance(getattr(network, body), Body) for body in network.bodies):
            self._accelerate(name)
        return network

    def _accelerate_all(self) -> None:
        self.cache.clear()  # what compiled networks encode may differ in the last bits
        for name in COMPILED:
            if getattr(self, name) is not None:
                self._accelerate(name)

    def _accelerate(self, name: str) -> None:
        """Put a network's methods into the form that the switches ask for."""
        network: Model = getattr(self, name)
        for name_of_body in network.bodies:
            work = getattr(network, name_of_body)
            while isinstance(work, Body):
                work = work.body
            vars(network).pop(name_of_body, None)
            if self._compile_options is not None:
                work = Compiled(network, work, self._compile_options)
            if name == "unet" and self._recordings:
                work = StepGraph(network, work, self._no_capture, self._recordings)
            if work != getattr(network, name_of_body):
                vars(network)[name_of_body] = work

    def _no_capture(self) -> str | None:
        """Say why the pipeline's state does not allow recordings, or None."""
        if self._offload_device is not None:
            return "offloading moves its weights"
        if self._compile_options is not None and self._compile_options["mode"] in OWN_GRAPHS:
            return f"torch.compile records it itself in mode {self._compile_options['mode']!r}"
        return None
