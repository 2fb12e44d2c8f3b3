"""A second device on a machine that has only a processor: it refuses the mixtures of devices that CUDA refuses.

    second_device.install()               # torch then knows the device "second", whose numbers are the processor's
    pipe.to("second")
    with second_device.counting() as waits:
        pipe(...)                         # waits: (what makes the host wait for the device, where) -> how often

A tensor of the device, a `SecondTensor`, wraps a plain one. Every operation goes through `run`, which checks what CUDA
checks: all tensors are on the device, but for one of the processor's without dimensions in arithmetic, and for indices;
generators are the device's. Copies cross. `Recorder` repeats work as CUDA graphs do: the host's numbers stay as they
were. The lists of operations were made by hand and not checked against a build for CUDA.

Not imitated: streams, memory, speed, kernels and digits of CUDA, autocast, operations that change a shape in place. A
parameter does not move while a graph of autograd holds it. `install` cannot be taken back: use a process of its own.
"""

import copy
import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache, wraps

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "second"
ARITHMETIC = (  # operations in which CUDA takes one tensor of the processor without dimensions
    "add sub rsub mul div true_divide floor_divide remainder fmod pow atan2 maximum minimum fmax fmin eq ne lt le gt "
    "ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor where masked_fill index_put fill"
)
SCALARS = set(ARITHMETIC.split())
INDEXING = {"index", "index_put", "_index_put_impl", "_unsafe_index"}  # the processor's indices do as well
COPIES = {"copy", "_to_copy", "to", "_foreach_copy"}
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "bincount"}
MAKERS = "empty.memory_format empty_strided arange arange.start arange.start_step linspace eye eye.m full zeros ones "
MAKERS += "randperm randperm.generator scalar_tensor tril_indices triu_indices"


class SecondTensor(torch.Tensor):
    """A tensor of the second device; `inner` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "device": torch.device(NAME, 0)}
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), dtype=inner.dtype, layout=inner.layout, requires_grad=requires_grad, **place
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy
    tolist = lambda self: self.cpu().tolist()  # noqa: E731
    data_ptr = lambda self: self.inner.data_ptr()  # noqa: E731  # by which code recognises weights
    untyped_storage = lambda self: self.inner.untyped_storage()  # noqa: E731  # and views
    __repr__ = lambda self, **_: f"SecondTensor({self.inner!r})"  # noqa: E731

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            twin = SecondTensor(copy.deepcopy(self.inner), self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(twin, self.requires_grad) if is_parameter(self) else twin
        return memo[id(self)]


def is_parameter(x):
    return isinstance(x, torch.nn.Parameter)


def is_ours(x):
    return isinstance(x, SecondTensor)


def leaves(values):
    """List values, and what is in those that are lists."""
    found = []
    for x in values:
        found.extend(x) if type(x) in (list, tuple) else found.append(x)
    return found


def mapped(change, x):
    """Change a value, or each of a list."""
    return type(x)([change(one) for one in x]) if type(x) in (list, tuple) else change(x)


def unwrapped(x):
    if type(x) is torch.device:
        return torch.device("cpu") if of_second(x) else x
    return x.inner if isinstance(x, SecondTensor) else x


def of_second(device):
    """Return whether a device is the second one; refuse numbers that it does not have."""
    device = torch.device(device)
    if device.type == NAME and device.index not in (None, 0):
        raise RuntimeError(f"{NAME} error: invalid device ordinal {device.index}")
    return device.type == NAME


@cache
def facts(function):
    """Return an operation's name without a final _, its arguments' names, those that it writes, and if it draws."""
    arguments = function._schema.arguments
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    names = [a.name for a in arguments]
    return function.overloadpacket.__name__.rstrip("_"), names, written, "generator" in names


def run(function, args, kwargs):
    """Do one operation on the inner tensors, if CUDA would; wrap what it returns."""
    base, names, written, draws = facts(function)
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = [x for x in leaves(named.values()) if isinstance(x, torch.Tensor)]
    targets = [x for x in leaves(named.get(name) for name in written) if isinstance(x, torch.Tensor)]
    device = next((x for x in named.values() if type(x) is torch.device), None)
    if base == "to" and len(tensors) == 2:
        device = tensors[1].device
    to_second = any(map(is_ours, tensors)) if device is None else of_second(device)
    check_devices(base, named, tensors, targets)
    look_for_waits(base, named, tensors, to_second)
    inside = [mapped(unwrapped, x) for x in args], {name: mapped(unwrapped, x) for name, x in kwargs.items()}
    if draws:
        inside[1]["generator"] = checked_generator(kwargs.get("generator") or default_generator())
    result = function(*inside[0], **inside[1])
    if Recorder.present is not None:
        Recorder.present.steps.append((function, *inside, result))
    known = {id(unwrapped(t)): t for t in targets}

    def wrapped(x):
        own = known.get(id(x))
        if own is not None and (own.shape, own.stride()) != (x.shape, x.stride()):
            raise NotImplementedError(f"{base} changes the shape of a tensor in place, which is not imitated")
        return own if own is not None else SecondTensor(x) if to_second and isinstance(x, torch.Tensor) else x

    return mapped(wrapped, result)


def check_devices(base, named, tensors, targets):
    """Refuse a mixture of devices that CUDA refuses."""
    theirs = [t for t in tensors if not is_ours(t)]
    if base in INDEXING and is_ours(named["self"]):
        theirs = [t for t in theirs if not any(t is i for i in named["indices"])]
    few = base in SCALARS and (len(theirs) == 1 or base == "where")
    fit = base in COPIES or not any(map(is_ours, tensors))
    if not fit and not all(few and t.dim() == 0 and not any(t is x for x in targets) for t in theirs):
        shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {shapes} (in {base})")


# What makes the host wait

waits = None


def look_for_waits(base, named, tensors, to_second):
    """Note an operation whose result the host reads, or that copies between the devices."""
    if base in READS:
        note(base)
    elif base in ("to", "_to_copy") and is_ours(tensors[0]) != to_second:
        note(f"copy to the {'device' if to_second else 'host'}")
    elif base in {*COPIES, "where"} and len({*map(is_ours, tensors)}) == 2:
        note(f"copy to the {'device' if base == 'where' or is_ours(tensors[0]) else 'host'}")
    elif base in INDEXING and any(
        i is not None and (not is_ours(i) or i.dtype in (torch.bool, torch.uint8)) for i in named["indices"]
    ):
        note("index by a mask or by the host's tensor")


def note(what):
    """Count a wait, with the file and line outside torch; within a recording refuse it, as CUDA does."""
    if Recorder.present is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
    if waits is not None:
        frame = sys._getframe(1)
        while frame.f_back and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
            frame = frame.f_back
        waits[what, f"{frame.f_code.co_filename}:{frame.f_lineno}"] += 1


@contextmanager
def counting():
    """Count what makes the host wait for the device: (what, where) -> how often."""
    global waits
    before, waits = waits, Counter()
    try:
        yield waits
    finally:
        waits = before


class Recorder:
    """Records the work that is done within; `replay` does it again into the same memory, as a CUDA graph does."""

    present = None

    def __init__(self):
        self.steps = []

    def __enter__(self):
        Recorder.present = self
        return self

    def __exit__(self, *_):
        Recorder.present = None

    def replay(self):
        for function, args, kwargs, result in self.steps:
            for old, new in zip(leaves([result]), leaves([function(*args, **kwargs)]), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


# Generators

PlainGenerator = torch._C.Generator
generators = {}  # address by which torch knows it -> generator of the device


class GeneratorKind(type(PlainGenerator)):
    """Lets every generator be an instance of the class that stands for torch's."""

    def __instancecheck__(cls, instance):
        return isinstance(instance, PlainGenerator)


class Generator(PlainGenerator, metaclass=GeneratorKind):
    """torch.Generator, which may be of the second device; it draws what the processor's of that seed draws."""

    def __new__(cls, device="cpu"):
        if not of_second(device):
            return PlainGenerator(device)
        self = super().__new__(cls, "cpu")
        generators[self._cdata] = self  # and so it stays
        return self

    device = property(lambda self: torch.device(NAME, 0))


@cache
def default_generator():
    return Generator(NAME)


def checked_generator(generator):
    """Refuse the processor's generator for a tensor of the device."""
    if generator._cdata not in generators:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    return generator


def checking_generators(draw):
    """Let a function of torch refuse the device's generator for the processor's tensors."""

    @wraps(draw)
    def checked(*args, generator=None, device=None, **kwargs):
        where = torch.get_default_device() if device is None else torch.device(device)
        if type(generator) is Generator and where.type != NAME:
            raise RuntimeError(f"Expected a '{where.type}' device type for generator but found '{NAME}'")
        return draw(*args, generator=generator, device=device, **kwargs)

    return checked


# What torch must be told


class Module(_DummyBackendModule):
    """`torch.second`."""

    manual_seed = manual_seed_all = lambda self, seed: default_generator().manual_seed(seed)


def set_data(self, new, plain=torch._C.TensorBase.data):
    """Set `tensor.data`, also to a tensor of the other device: torch does that for CUDA, but not for wrappers."""
    if is_ours(self) == is_ours(new):
        plain.__set__(self, new)
        if is_ours(self):
            self.inner = new.inner
        return
    other, grad = new.detach(), self.grad
    torch.utils.swap_tensors(self, torch.nn.Parameter(other, self.requires_grad) if is_parameter(self) else other)
    if grad is not None:
        self.grad = grad.to(new.device, new.dtype)


def copied(source, target, non_blocking=False):
    """Copy a tensor into another, as `torch.tensor(..., device="second")` does."""
    return run(torch.ops.aten.copy_.default, (target, source), {})


def install():
    """Let torch know the device, once."""
    if hasattr(torch, NAME):
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    install.kept = library = torch.library.Library("aten", "IMPL")  # what it registers is gone when it is
    for maker in MAKERS.split():
        packet, _, overload = maker.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(maker, lambda *args, _of=operation, **kwargs: run(_of, args, kwargs), "PrivateUse1")
    library.impl("_copy_from", copied, "PrivateUse1")
    torch.Tensor.data = property(torch._C.TensorBase.data.__get__, set_data)
    plain_answer = torch._has_compatible_shallow_copy_type

    def takes_data_of(input: torch.Tensor, from_: torch.Tensor) -> bool:  # torch's compiler compares this signature
        return plain_answer(input, from_) or is_ours(input) != is_ours(from_)

    torch._has_compatible_shallow_copy_type = takes_data_of
    torch.Generator = Generator
    for draw in ("randn", "rand", "randint", "randperm"):
        setattr(torch, draw, checking_generators(getattr(torch, draw)))
