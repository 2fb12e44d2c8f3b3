"""Devices and dtypes of a pipeline's networks: moving, offloading, and locking them against changes during a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

import depthdiff.fast as fast
from depthdiff.checks import FLOATS, check_device, check_number, show
from depthdiff.forks import Workers
from depthdiff.hooks import WeightHook, own_tensors
from depthdiff.parts import MEMORY_FORMATS, parse_move
from depthdiff.turns import Turns

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
R = TypeVar("R")


def uses_weights(method: Callable[P, R]) -> Callable[P, R]:
    """Keep other threads from changing the weights while a method of a pipeline runs."""

    @wraps(method)
    def using(*args: P.args, **kwargs: P.kwargs) -> R:
        with args[0]._in_use():  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return using


class DeviceMixin:
    """Moves, casts and offloads the networks of a pipeline."""

    _fast: bool

    def __init__(self) -> None:
        self._turns = Turns()
        self._offload_device: torch.device | None = None
        self._offload_whole = False
        self._hooks: list[RemovableHandle] = []
        self._workers = Workers()

    @property
    def networks(self) -> dict[str, Any]:
        """Those components that have weights; a pipeline knows its own."""
        return {}

    def _need(self, *names: str) -> None:
        """Refuse to begin work without these components; a pipeline knows its own."""

    @property
    def device(self) -> torch.device:
        """Return the device of the networks."""
        return next((device_of(network) for network in self.networks.values()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the networks compute in."""
        return next((dtype_of(network) for network in self.networks.values()), torch.float32)

    @property
    def _execution_device(self) -> torch.device:
        return self.execution_device

    @property
    def execution_device(self) -> torch.device:
        """Return the device of the computation: that of offloading, ours or accelerate's, else that of the networks."""
        hooked = (hook_device(network) for network in self.networks.values())
        return self._offload_device or next(filter(None, hooked), None) or self.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast all networks, as `torch.nn.Module.to` does: a device, a dtype, or both.

        Raises:
            TypeError: neither a device nor a dtype.
            ValueError: a device that is not here, or on which nothing is computed ("meta" would drop the weights); a
                dtype in which nothing is; or the networks are being offloaded, which a plain move would undo.
        """
        kwargs.pop("silence_dtype_warnings", None)
        names = {"torch_device": "device", "torch_dtype": "dtype"}  # of diffusers 0.26
        kwargs = {names.get(name, name): value for name, value in kwargs.items()}
        device, dtype, _, memory_format = parse_move(args, kwargs)
        if dtype not in (None, *FLOATS):
            raise ValueError(f"dtype must be a floating-point torch dtype, got {dtype}")
        if memory_format not in MEMORY_FORMATS:
            raise ValueError(f"memory_format must be one of {MEMORY_FORMATS[1:]}, got {memory_format}")
        if self._offload_device is not None and device is not None and device.type != "cpu":
            raise ValueError(f"device {device} clashes with CPU offloading, which is on; call remove_all_hooks() first")
        if device is not None:
            check_device("device", device)
        with self._turns.change("to"):
            for network in self.networks.values():
                with torch.inference_mode(is_inference(network)):  # an assignment must not change the kind of tensor
                    network.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Keep the networks on the CPU and bring each to `device` only while it works: the memory of the largest one.

        Args:
            gpu_id: which of several devices of that type.
            device: where to work.

        Raises:
            TypeError: not a device, or a `gpu_id` that is not a number.
            ValueError: a device that does not exist, or two different ones.
        """
        with self._turns.change("enable_model_cpu_offload"):
            self._start_offloading(gpu_id, device)
            self._offload_whole = True

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Keep the weights on the CPU and bring each layer's to `device` only while it works: least memory, slow.

        Args:
            gpu_id: which of several devices of that type.
            device: where to work.

        Raises:
            TypeError: not a device, or a `gpu_id` that is not a number.
            ValueError: a device that does not exist, or two different ones.
        """
        with self._turns.change("enable_sequential_cpu_offload"):
            self._start_offloading(gpu_id, device)
            target = self.execution_device
            for network in self.networks.values():
                for layer in network.modules():
                    if own_tensors(layer):
                        self._hooks += WeightHook(device=target).attach(layer)

    def remove_all_hooks(self) -> None:
        """End offloading; the networks stay on the CPU until `to` moves them."""
        with self._turns.change("remove_all_hooks"):
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self.maybe_free_model_hooks()
            self._offload_device, self._offload_whole = None, False

    def maybe_free_model_hooks(self) -> None:
        """Move a network that is still on the offloading device back to the CPU."""
        if self._offload_whole:
            for network in self.networks.values():
                network.to("cpu")

    def _start_offloading(self, gpu_id: int | None, device: torch.device | str) -> None:
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"device must be a device such as 'cuda', got {show(device)}")
        if gpu_id is not None:
            kind, _, index = str(device).partition(":")
            gpu_id = check_number("gpu_id", gpu_id, 0, 127, whole=True)
            if index not in ("", str(gpu_id)):
                raise ValueError(f"gpu_id {gpu_id} and device {device} name different devices; give one of them")
            device = f"{kind}:{gpu_id}"
        device = check_device("device", device)
        self.remove_all_hooks()
        for network in self.networks.values():
            network.to("cpu")
        self._offload_device = device

    def _in_use(self, ends_by_itself: bool = True) -> AbstractContextManager[None]:
        """Within, no other thread changes the weights; where layers move or cast theirs at work, calls take turns."""
        moving = self._offload_device is not None
        moving = moving or any(getattr(part, "storage_dtype", None) is not None for part in self.networks.values())
        if moving and ends_by_itself:
            return self._turns.change("a call with offloading or layerwise casting")
        return self._turns.use(ends_by_itself)

    def _at_work(self, name: str) -> Any:
        """Return a network, brought to the device where it is to work; with whole offloading the others leave it."""
        self._need(name)
        self._workers.enter()
        network = getattr(self, name)
        if self._offload_whole:
            for other in self.networks.values():
                if other is not network:
                    other.to("cpu")
            network.to(self.execution_device)
        if self._fast:
            fast.lay_out(network, self.execution_device)
        return network


def is_inference(network: torch.nn.Module) -> bool:
    """Return whether the weights of a network were made in inference mode."""
    return any(parameter.is_inference() for parameter in network.parameters())


def device_of(network: torch.nn.Module) -> torch.device:
    """Return the device of a network's weights."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def hook_device(network: torch.nn.Module) -> torch.device | None:
    """Return the device to which accelerate's hooks bring a network's weights for its work; None without hooks."""
    hooks = [getattr(layer, "_hf_hook", None) for layer in network.modules()] if hasattr(network, "_hf_hook") else []
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(device) for device in devices if device is not None), None)


def dtype_of(network: torch.nn.Module) -> torch.dtype:
    """Return the dtype in which a network computes: its own word for it, or that of its first weight."""
    dtype = getattr(network, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    weights = (parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    return next(weights, torch.float32)
