"""The UNet as a CUDA graph: captured once, replayed for every step, so that launching kernels costs nothing.

Guidance stays outside: it is three kernels, its scale remains a number that may change from step to step, and half
precision rounds as it does without a graph.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from depthdiff.checks import check_number
from depthdiff.fast.calls import ModuleCall, find, put_on, take_off
from depthdiff.fast.compile import OWN_GRAPHS, CompiledCall, has_hooks
from depthdiff.models.attention import STANDARD

logger = logging.getLogger(__name__)

WARM_UPS = 3
"""Runs before capturing, in which libraries choose their kernels and take their memory."""

DEVICES = ("cuda",)
"""Types of the devices that have graphs."""

OF_EVERY_MODULE = set(vars(nn.Module())) - {"training"}
"""Attributes of a layer that are not its settings."""


class CUDAGraphRunner(ModuleCall):
    """The call of a UNet, captured for each kind of input and replayed.

    A graph reads the weights where they are stored. So it holds as long as every weight stays at its address (what is
    written into it there is seen) and modules, their settings and processors, and torch's switches of kernels and
    precision stay the same. All this is compared before each replay, and what has changed is captured again. Where
    capturing is impossible, the UNet runs without a graph, and the reason is logged once.

    Args:
        network: the UNet.
        max_graphs: how many graphs are kept, the latest used ones; each holds the memory of one step.
        blocked: returns why the pipeline does not allow graphs, or None.

    Attributes:
        graphs: kind of input -> graph.
        reason: why the latest call was not replayed; None if it was.
    """

    rank = 2

    def __init__(self, network: nn.Module, max_graphs: int, blocked: Callable[[], str | None]) -> None:
        super().__init__(network)
        self.max_graphs, self.blocked = max_graphs, blocked
        self.graphs: OrderedDict[Hashable, CapturedGraph] = OrderedDict()
        self.reason: str | None = None
        self._failed: set[Hashable] = set()
        self._lock = threading.Lock()
        self._state: list[Any] = []

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Do what the UNet does."""
        if torch.compiler.is_compiling():
            return self.module._call_impl(
                sample, timestep, encoder_hidden_states, *args, return_dict=return_dict, **kwargs
            )
        reason = self._reason_against(sample, encoder_hidden_states)
        if return_dict or any(value is not None for value in (*args, *kwargs.values())):
            reason = "arguments are given that no graph takes"
        with self._lock:  # graphs are captured, replayed and dropped by one thread at a time
            if reason is None:
                inputs = [sample, torch.as_tensor(timestep, device=sample.device), encoder_hidden_states]
                graph = self._graph(inputs)
                if graph is not None:
                    self.reason = None
                    return (graph.run(inputs),)
        self._note(reason)
        return self.pass_on(sample, timestep, encoder_hidden_states, *args, return_dict=return_dict, **kwargs)

    def _reason_against(self, sample: Any, context: Any) -> str | None:
        """Return why a call cannot be captured, or None."""
        if torch.is_grad_enabled():
            return "gradients are on"
        if type(sample) is not Tensor or type(context) is not Tensor:
            return "its inputs are not plain tensors"
        if sample.device.type not in DEVICES:
            return f"it is on {sample.device}, and only CUDA devices have graphs"
        if torch.is_autocast_enabled(sample.device.type):
            return "autocast is on"
        if has_hooks(self.module) or any("forward" in vars(layer) for layer in self.module.modules()):
            return "it has hooks or another forward, which may do more than compute"
        if not all(type(one) in STANDARD for one in processors(self.module)):
            return "it has attention processors of another kind, which may do more than compute"
        if any(tensor.device != sample.device for tensor in (context, *self.module.parameters())):
            return "its weights and its inputs are on different devices"
        compiled = find(self.module, CompiledCall)
        if compiled is not None and compiled.mode in OWN_GRAPHS:
            return f"torch.compile captures it itself in mode {compiled.mode!r}"
        return self.blocked()

    def _graph(self, inputs: list[Tensor]) -> CapturedGraph | None:
        """Find the graph for inputs of this kind, or capture it; None where that fails."""
        state = state_of(self.module)
        state.append(self.inner)
        if state != self._state:
            self.graphs.clear()
            self._failed.clear()
            self._state = state
        kind = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        if kind in self._failed:
            return None
        if kind not in self.graphs:
            while len(self.graphs) >= self.max_graphs:
                self.graphs.popitem(last=False)
            try:
                self.graphs[kind] = CapturedGraph(self.pass_on, inputs)
            except RuntimeError as error:  # out of memory, or an operation that cannot be captured
                self._failed.add(kind)
                self.reason = None
                self._note(f"capturing fails: {' '.join(str(error).split())}")
                return None
            logger.info("captured a step of the unet for %s in %s", tuple(inputs[0].shape), inputs[0].dtype)
        self.graphs.move_to_end(kind)
        return self.graphs[kind]

    def _note(self, reason: str | None) -> None:
        """Keep and log why the UNet runs without a graph; None repeats that of a capture that failed before."""
        reason = reason or self.reason or "capturing failed before"
        if reason != self.reason:
            logger.warning("the unet runs without a CUDA graph: %s", reason)
        self.reason = reason


class CapturedGraph:
    """One graph, and the tensors that it reads and writes.

    Args:
        unet: the UNet's call without graphs, plain or compiled.
        inputs: sample, timestep and prompts of the call that is captured; copied.
    """

    def __init__(self, unet: Callable[..., tuple[Tensor]], inputs: list[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode could not be written later
            self.inputs = [tensor.clone() for tensor in inputs]
            sample, timestep, context = self.inputs

            def step() -> Tensor:
                return unet(sample, timestep, encoder_hidden_states=context, return_dict=False)[0]

            self.replay, self.output = record(step, sample.device)

    def run(self, inputs: list[Tensor]) -> Tensor:
        """Replay the graph on inputs; the result is the caller's own."""
        torch._foreach_copy_(self.inputs, inputs)
        self.replay()
        return self.output.clone()


def record(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture work on fixed tensors, after warming up on a stream of its own. Source: torch's notes on CUDA graphs.

    Each graph has memory of its own: no replay can write where another's result is stored. The stream is named, as
    torch's own choice is one of the device that captured first in the process. Where capturing fails, torch leaves its
    stream the current one; so the present one is set again here.

    Returns:
        What repeats the work, and the tensor that each repetition writes.
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


def capture(pipe: Any, max_graphs: int = 4) -> None:
    """Capture the UNet's work on a CUDA device as a graph, once for each batch, size and dtype, and replay it.

    The same kernels run, so pictures stay the same. After a weight has moved or was replaced, as by adapters, the graph
    is captured again. On other devices, with offloading, hooks or gradients the UNet runs without graphs, and the log
    says why. Copies of a pipeline, and a UNet that it is assigned later, have none.

    Args:
        pipe: a pipeline, or its UNet.
        max_graphs: how many graphs are kept, the latest used ones; each holds the memory of one step.

    Raises:
        TypeError: `pipe` has no UNet, or `max_graphs` is not a number.
        ValueError: `max_graphs` is below 1.
    """
    unet, max_graphs = _unet_of(pipe), check_number("max_graphs", max_graphs, 1, whole=True)
    put_on(unet, CUDAGraphRunner(unet, max_graphs, _no_block if pipe is unet else _Blocked(pipe)))


def release(pipe: Any) -> None:
    """Drop the graphs of a pipeline or of its UNet with their memory, and capture no more."""
    take_off(_unet_of(pipe), CUDAGraphRunner)


def _unet_of(pipe: Any) -> nn.Module:
    unet = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        raise TypeError(f"pipe must be a pipeline with a UNet, or the UNet itself, got {type(pipe).__name__}")
    return unet


def _no_block() -> None:
    return None


class _Blocked:
    """Returns why a pipeline does not allow graphs, or None; does not keep the pipeline alive."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = weakref.ref(pipe)

    def __call__(self) -> str | None:
        offloads = getattr(self.pipe(), "_offload_device", None) is not None
        return "offloading moves its weights" if offloads else None


def processors(network: nn.Module) -> list[Any]:
    """List the attention processors of a network."""
    layers: list[Any] = list(network.modules())
    return [layer.processor for layer in layers if "processor" in vars(layer) or "processor" in layer._modules]


def state_of(network: nn.Module) -> list[Any]:
    """List what a graph has taken for granted: layers and their settings, where the weights are, and switches."""
    layers = list(network.modules())
    weights = [
        (weight.data_ptr(), weight.stride(), weight.dtype)
        for layer in layers
        for weight in (*layer._parameters.values(), *layer._buffers.values())
        if weight is not None
    ]
    chosen = processors(network)
    settings = [setting(value) for one in chosen for value in vars(one).values()]
    settings += [
        setting(value) for layer in layers for name, value in vars(layer).items() if name not in OF_EVERY_MODULE
    ]
    return [layers, weights, chosen, settings, switches()]


def setting(value: Any) -> Any:
    """Return a value that work may depend on in a form that can be compared; None for what is compared otherwise."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if type(value) in (tuple, list):
        return [setting(one) for one in value]
    if type(value) is dict:
        return [(name, setting(one)) for name, one in value.items()]
    return None


def switches() -> list[Any]:
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
    return [*kernels, *precision, cudnn.enabled, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()]
