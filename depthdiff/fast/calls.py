"""Install fast computations as a module's call, in the attribute that `module.compile()` uses too.

torch calls `module._compiled_call_impl` instead of hooks and `forward`, leaves it out when a module is copied or
pickled, and does not see it when it traces, compiles or exports the module. Several calls can be chained: a captured
graph around a compiled network around a fast computation, each of which passes on what it does not take.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

Computation = Callable[..., Tensor]

CALL_ATTRIBUTE = "_compiled_call_impl"


class ModuleCall:
    """Base of what is put in the place of a module's call.

    Args:
        module: whose call it is. It is not kept alive by this object.

    Attributes:
        rank: the place in a chain; higher ones are called first.
        inner: the next call of the chain; None for the module's own.
    """

    rank: ClassVar[int] = 0
    inner: Callable[..., Any] | None = None

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        """The module."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this call no longer exists")
        return module

    def pass_on(self, *args: Any, **kwargs: Any) -> Any:
        """Do what is done without this call."""
        return (self.inner or self.module._call_impl)(*args, **kwargs)


class FastCall(ModuleCall):
    """The call of a module with a fast computation on it.

    Args:
        module: whose call it is.
        compute: its fast computation, (module, *arguments of its call) -> the result, or NotImplemented. It names the
            arguments as the module's `forward` does; a call with others is passed on.
    """

    def __init__(self, module: nn.Module, compute: Computation) -> None:
        super().__init__(module)
        self.kind, self.compute = type(module), compute
        parameters = list(inspect.signature(compute).parameters.values())[1:]
        self.positional = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        self.keywords = {one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
        self.required = sum(one.default is inspect.Parameter.empty for one in parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the fast way, or the plain way where that may differ."""
        module = self.module
        first = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(first, Tensor) or not first.is_cpu:  # other devices are not delayed by what follows
            return module._call_impl(*args, **kwargs)
        if type(module) is self.kind and is_bare(module) and self._takes(args, kwargs):
            result = self.compute(module, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return module._call_impl(*args, **kwargs)

    def _takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether the fast computation has all arguments of a call."""
        given, others = len(args), self.positional[len(args) :]
        if given > len(self.positional) or not all(name in self.keywords or name in others for name in kwargs):
            return False
        return all(name in kwargs for name in self.positional[given : self.required])


def is_bare(layer: nn.Module) -> bool:
    """Return whether a layer's call is its class's own `forward` and nothing else: no hook, no replaced `forward`."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return False
    if hooks_of_all._global_backward_hooks or hooks_of_all._global_backward_pre_hooks:
        return False
    call = layer._compiled_call_impl
    if "forward" in vars(layer) or not (call is None or isinstance(call, ModuleCall)):
        return False
    kind = type(layer)
    return kind.forward is FORWARDS.get(kind, kind.forward)


FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {}
"""Methods of the layers in fast computations, as imported; a program may replace those of a class later."""

Kind = TypeVar("Kind", bound=ModuleCall)


def chain(module: nn.Module) -> list[Any]:
    """List the calls that are put on a module, the first to be called first; the last may be `module.compile()`'s."""
    calls: list[Any] = []
    call: Any = module._compiled_call_impl
    while call is not None:
        calls.append(call)
        call = call.inner if isinstance(call, ModuleCall) else None
    return calls


def find(module: nn.Module, kind: type[Kind]) -> Kind | None:
    """Return the call of a kind that is on a module, or None."""
    return next((call for call in chain(module) if isinstance(call, kind)), None)


def put_on(module: nn.Module, call: ModuleCall) -> None:
    """Put a call on a module, in the place of one of its kind."""
    calls = [one for one in chain(module) if type(one) is not type(call)]
    _link(module, sorted([*calls, call], key=lambda one: -getattr(one, "rank", -1)))


def take_off(module: nn.Module, kind: type[ModuleCall]) -> None:
    """Take the call of a kind off a module."""
    calls = chain(module)
    if any(isinstance(call, kind) for call in calls):
        _link(module, [call for call in calls if not isinstance(call, kind)])


def _link(module: nn.Module, calls: list[Any]) -> None:
    """Chain calls; nothing of the chain is left in the module where there are none."""
    for call, inner in zip(calls, [*calls[1:], None], strict=False):
        if isinstance(call, ModuleCall):
            call.inner = inner
    if calls:
        vars(module)[CALL_ATTRIBUTE] = calls[0]
    else:
        vars(module).pop(CALL_ATTRIBUTE, None)
