"""A step of the UNet as a CUDA graph: recorded once, replayed for every step, so that launching kernels costs nothing.

What is recorded is the network proper, `UNet2DConditionModel.predict`. Guidance stays outside: it is three kernels, its
scale remains a number that may change from step to step, and half precision rounds as it does without a graph.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from depthdiff.models.attention import KeysValues, MultiHeadAttention
from depthdiff.models.base import Body, Model, hooked, layers_of

logger = logging.getLogger(__name__)

WARM_UPS = 3
"""Runs before recording, in which libraries choose their kernels and take their memory."""
SETTINGS = {bool, int, float, str, tuple, FunctionType, MethodType, partial}
"""Types of a layer's attributes that its work may depend on, such as `eps`, or a `forward` of the user's own."""


class Backend(Protocol):
    """What records."""

    def reason_against(self, device: torch.device) -> str | None:
        """Say why nothing can be recorded on a device; None if it can."""

    def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        """Record work on fixed tensors; returns what repeats it, and the tensor that each repetition writes."""


class CudaGraphs:
    """Records by torch's CUDA graphs, after warming up on a stream of its own. Source: torch's notes on CUDA graphs."""

    def reason_against(self, device: torch.device) -> str | None:
        """Only CUDA devices have graphs."""
        return None if device.type == "cuda" else f"it is on {device}, and only CUDA devices have graphs"

    def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        """Each graph has memory of its own: no replay can write where another's result lies.

        The stream is named, as torch's own choice is one of the device that recorded first in the process. Where a
        recording fails, torch leaves its stream the current one; so the present one is put back here.
        """
        with torch.cuda.device(device):
            present, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(present)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    work()
            present.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(present), torch.cuda.graph(graph, stream=aside):
                output = work()
        return graph.replay, output


class Recording:
    """One graph and the tensors that it reads and writes.

    Args:
        backend: records.
        body: `UNet2DConditionModel.predict`, plain or compiled.
        inputs: of the call that is recorded; copied.
    """

    def __init__(self, backend: Backend, body: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode could not be written later
            self.inputs = [tensor.clone() for tensor in inputs]
            sample, time, *rest = self.inputs
            context = [KeysValues(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
            self.replay, self.output = backend.record(lambda: body(sample, time, context), sample.device)

    def run(self, inputs: list[Tensor]) -> Tensor:
        """Replay it on inputs; the result is the caller's."""
        torch._foreach_copy_(self.inputs, inputs)
        self.replay()
        return self.output.clone()


class StepGraph(Body):
    """Stands in the place of a UNet's `predict`: records it for each kind of input, and replays it.

    A recording reads the weights where they lie. So it holds as long as every weight stays at its address (what is
    written into it there is seen) and modules, their settings and forms of attention, and torch's switches of kernels
    and precision stay the same; all this is compared before each replay, and what has changed is recorded again. Where
    recording is impossible, the UNet runs as without it, and the reason is logged once.

    Args:
        network: the UNet.
        body: its `predict`, plain or compiled.
        blocked: says why the pipeline does not allow recording, or None.
        size: how many recordings are kept, the latest used ones; each holds the memory of one step.

    Attributes:
        backend: records; CUDA graphs.
        recordings: kind of input -> recording.
        reason: why the latest call was not replayed; None if it was.
    """

    backend: ClassVar[Backend] = CudaGraphs()

    def __init__(
        self, network: Model, body: Callable[..., Tensor], blocked: Callable[[], str | None], size: int
    ) -> None:
        self.network, self.body, self.blocked, self.size = network, body, blocked, size
        self.recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self.reason: str | None = None
        self._failed: set[Hashable] = set()
        self._lock = threading.Lock()
        self._state: tuple[Any, ...] = ()

    def __call__(self, sample: Tensor, time: Tensor, context: Sequence[KeysValues], *more: Any, **named: Any) -> Tensor:
        """Do what `UNet2DConditionModel.predict` does."""
        if torch.compiler.is_compiling():
            return self.body(sample, time, context, *more, **named)
        inputs = [sample, time, *(tensor for pair in context for tensor in pair)]
        unknown = any(argument is not None for argument in (*more, *named.values()))
        reason = "it has arguments that no recording knows" if unknown else self._reason_against(inputs)
        with self._lock:  # recordings are made, replayed and dropped by one thread at a time
            recording = self._recording(inputs) if reason is None else None
            if recording is not None:
                self.reason = None
                return recording.run(inputs)
        self._note(reason)
        return self.body(sample, time, context, *more, **named)

    def _reason_against(self, inputs: list[Tensor]) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are on"
        if torch.is_autocast_enabled(inputs[0].device.type):
            return "autocast is on"
        if hooked(self.network):
            return "it has hooks, and nobody knows what they do"
        if any(tensor.device != self.network.device for tensor in inputs):
            return "its weights and its inputs are on different devices"
        return self.blocked() or self.backend.reason_against(inputs[0].device)

    def _recording(self, inputs: list[Tensor]) -> Recording | None:
        """Find the recording for inputs of this kind, or make it; None where that fails."""
        state = state_of_graph(self.network)
        if state != self._state:
            self.recordings.clear()
            self._failed.clear()
            self._state = state
        kind = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        if kind in self._failed:
            return None
        if kind not in self.recordings:
            while len(self.recordings) >= self.size:
                self.recordings.popitem(last=False)
            try:
                self.recordings[kind] = Recording(self.backend, self.body, inputs)
            except RuntimeError as error:  # out of memory, or an operation that cannot be recorded
                self._failed.add(kind)
                self.reason = None
                self._note(f"recording fails: {' '.join(str(error).split())}")
                return None
            logger.info("recorded a step of the unet for %s in %s", tuple(inputs[0].shape), inputs[0].dtype)
        self.recordings.move_to_end(kind)
        return self.recordings[kind]

    def _note(self, reason: str | None) -> None:
        """Keep and log why the UNet runs without a recording; None repeats that of a recording that failed before."""
        reason = reason or self.reason or "recording failed before"
        if reason != self.reason:
            logger.warning("the unet runs without a CUDA graph: %s", reason)
        self.reason = reason


def state_of_graph(network: nn.Module) -> tuple[Any, ...]:
    """List what a recording has taken for granted: layers and their settings, where the weights are, and switches."""
    layers = layers_of(network)
    forms = [layer.attn_fn for layer in layers if isinstance(layer, MultiHeadAttention)]
    weights = [
        (weight.data_ptr(), weight.stride(), weight.dtype)
        for layer in layers
        for weight in (*layer._parameters.values(), *layer._buffers.values())
        if weight is not None
    ]
    settings = [value for layer in layers for value in vars(layer).values() if type(value) in SETTINGS]
    return layers, forms, weights, settings, switches()


def switches() -> tuple[Any, ...]:
    """List torch's own switches that choose a kernel or its precision."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    kernels = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    parts = cuda.matmul, getattr(cudnn, "conv", cudnn)
    precision = [getattr(part, "fp32_precision", None) or part.allow_tf32 for part in parts]
    return *kernels, *precision, cudnn.enabled, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
