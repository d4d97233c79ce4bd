"""What torch_npu's C++ code hands to CANN, as Python values in the documented order (aclnn.yaml),
and functions in the place of CANN's kernels. The operator library of `libraries` tells it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import yaml
from torch import Tensor

from ci.ascend.wheel import libraries

RANK = 12
TENSOR, TENSORS, INTS = 1, 2, 5
"""Kinds of objects in opapi.c."""

DTYPES = {
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8,
    9: torch.int64, 12: torch.bool, 27: torch.bfloat16, 36: torch.float8_e4m3fn,
}  # fmt: skip
"""aclDataType of acl/acl_base_rt.h."""


class Misfit(Exception):
    """What was handed over is not what is documented."""


class Object(ctypes.Structure):
    """As in opapi.c."""

    _fields_ = (
        ("next", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "dtype", "rank", "offset", "format", "wide")),
        *((name, ctypes.c_int64 * RANK) for name in ("sizes", "strides", "storage")),
        ("data", ctypes.c_void_p),
        ("count", ctypes.c_uint64),
        ("values", ctypes.c_void_p),
    )


# -- the documented order -----------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One line of aclnn.yaml: what CANN calls it, and what it must be."""

    kind: str
    name: str
    wanted: str
    dtype: str

    _LINE = re.compile(r"(?P<kind>\w+) (?P<name>\w+)(?: = (?P<wanted>.+?))?(?: of (?P<dtype>\w+))?")

    @classmethod
    def parse(cls, line: str) -> Parameter:
        match = cls._LINE.fullmatch(line)
        assert match is not None, line
        kind, name, wanted, dtype = match.groups()
        plain = re.sub("(?<!^)(?=[A-Z])", "_", name.removesuffix("Optional")).lower()
        return cls(kind, name, wanted or plain, dtype or "")


@dataclass(frozen=True)
class Order:
    """What an op of torch_npu calls, and its parameters in their order."""

    calls: str
    parameters: tuple[Parameter, ...]


@cache
def orders() -> dict[str, Order]:
    """By the name of torch_npu's op."""
    return {
        op: Order(entry["calls"], tuple(map(Parameter.parse, entry["arguments"])))
        for op, entry in yaml.safe_load(libraries.ORDER.read_text()).items()
    }


# -- values out of registers and memory ---------------------------------------------------------


@cache
def _library() -> ctypes.CDLL:
    library = libraries.load()
    library.object_at.restype = ctypes.POINTER(Object)
    library.object_at.argtypes = (ctypes.c_uint64,)
    return library


def _object(address: int) -> Object | None:
    found = _library().object_at(address)
    return found.contents if found else None


def _bytes(address: int, count: int) -> bytes:
    """Memory at an address that may be none: the kernel is asked to copy it, and refuses."""
    ours, theirs = os.pipe()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        written = libc.write(theirs, ctypes.c_void_p(address), ctypes.c_size_t(count))
        if written <= 0:
            raise Misfit(f"{address:#x} is not an address of memory")
        return os.read(ours, written)
    finally:
        os.close(ours)
        os.close(theirs)


def tensor_of(found: Object) -> Tensor:
    """The memory that a tensor object speaks of, as a tensor of the processor."""
    dtype = DTYPES[found.dtype]
    sizes, strides = found.sizes[: found.rank], found.strides[: found.rank]
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if not found.data or 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    item = dtype.itemsize
    room = (ctypes.c_uint8 * ((last + 1) * item)).from_address(found.data + found.offset * item)
    return torch.frombuffer(room, dtype=torch.uint8).view(dtype).as_strided(sizes, strides)


def _decoded(kind: str, value: int) -> Any:
    """One integer argument as what it is documented to be."""
    found = _object(value)
    if kind in ("tensor", "out"):
        if value and (found is None or found.kind != TENSOR):
            raise Misfit(f"{value:#x} is no tensor")
        return tensor_of(found) if found else None
    if kind in ("tensors", "outs"):
        if value and (found is None or found.kind != TENSORS):
            raise Misfit(f"{value:#x} is no list of tensors")
        if found is None:
            return None
        handles = (ctypes.c_uint64 * found.count).from_address(found.values)
        return [_decoded("tensor", handle) for handle in handles]
    if kind == "ints":
        if value and (found is None or found.kind != INTS):
            raise Misfit(f"{value:#x} is no array of integers")
        return list((ctypes.c_int64 * found.count).from_address(found.values)) if found else None
    if found is not None:
        raise Misfit(f"an object was given where {kind} is documented")
    if kind == "str":
        return _bytes(value, 64).partition(b"\0")[0].decode("ascii", "replace")
    if kind == "bool":
        if value & 0xFF > 1:
            raise Misfit(f"{value:#x} is no bool")
        return bool(value & 1)
    assert kind == "int", kind
    return ctypes.c_int64(value).value


def decode(order: Order, integers: Any, floats: Any) -> dict[str, Any]:
    """Every parameter by its documented name; the two results that end each call are written.

    Raises Misfit for a value that is not of the documented kind.
    """
    values: dict[str, Any] = {}
    taken = Counter()
    for parameter in order.parameters:
        if parameter.kind == "double":
            values[parameter.name] = floats[taken.float()]
            continue
        try:
            values[parameter.name] = _decoded(parameter.kind, integers[taken.integer()])
        except Misfit as misfit:
            raise Misfit(f"{order.calls}: {parameter.name}: {misfit}") from None
    size, executor = integers[taken.integer()], integers[taken.integer()]
    for what, address in (("workspaceSize", size), ("executor", executor)):
        if _object(address) is not None:
            raise Misfit(f"{order.calls}: {what}: there are more arguments than documented")
        _bytes(address, 8)
        ctypes.c_uint64.from_address(address).value = 0
    return values | {"executor": executor}


class Counter:
    """How many arguments of either sort have been taken."""

    def __init__(self) -> None:
        self._integers = self._floats = -1

    def integer(self) -> int:
        self._integers += 1
        return self._integers

    def float(self) -> int:
        self._floats += 1
        return self._floats


# -- calls --------------------------------------------------------------------------------------


@dataclass
class Handed:
    """One call: the op of torch_npu that makes it, and the values by documented name."""

    op: str
    order: Order
    values: dict[str, Any]
    executed: bool = False


@dataclass
class Device:
    """What was handed over while it is open, and what computes.

    kernels  by torch_npu's op: takes its keyword arguments, gives its results
    """

    kernels: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    handed: list[Handed] = field(default_factory=list)
    error: Exception | None = None

    def first(self, name: str, integers: Any, floats: Any) -> None:
        called = [(op, order) for op, order in orders().items() if order.calls == name]
        if not called:
            raise Misfit(f"{name} was called, for which no op of torch_npu is documented here")
        ((op, order),) = called
        values = decode(order, integers, floats)
        executor = values.pop("executor")
        self.handed.append(Handed(op, order, values))
        ctypes.c_uint64.from_address(executor).value = len(self.handed)

    def second(self, executor: int) -> None:
        handed = self.handed[executor - 1]
        handed.executed = True
        if handed.op in self.kernels:
            fill(handed, self.kernels[handed.op](**arguments_of(handed)))


@contextmanager
def opened(kernels: Mapping[str, Callable[..., Any]] | None = None) -> Iterator[Device]:
    """Inside the block, ops on tensors of "npu:0" arrive here. What is wrong with a call is raised
    at the end of the block, in the place of what torch_npu makes of it."""
    device = Device(kernels or {})
    signature = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_double),
        ctypes.c_uint64,
    )

    def hear(name: bytes, integers: Any, floats: Any, executor: int) -> int:
        try:
            if executor:
                device.second(executor)
            else:
                device.first(name.decode(), integers, floats)
        except Exception as error:
            device.error = device.error or error
            return 1
        return 0

    listener = signature(hear)
    _library().hear(listener)
    try:
        yield device
    except RuntimeError:
        if device.error is None:
            raise
    finally:
        _library().hear(None)
    if device.error is not None:
        raise device.error


def arguments_of(handed: Handed) -> dict[str, Any]:
    """What CANN was handed, as the keyword arguments of torch_npu's op."""
    arguments: dict[str, Any] = {}
    for parameter in handed.order.parameters:
        value, wanted = handed.values[parameter.name], parameter.wanted
        if value == [] and parameter.name.endswith("Optional"):
            continue  # left out
        if parameter.dtype:
            arguments[parameter.dtype] = (value if isinstance(value, Tensor) else value[0]).dtype
        if " in " in wanted:
            argument, _, names = wanted.partition(" in ")
            arguments[argument] = names.split()[value]
        elif wanted.isidentifier() and wanted != "results":
            arguments[wanted] = value
    return arguments


def fill(handed: Handed, results: Any) -> None:
    """Write a kernel's results where the call wants them."""
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    for parameter in handed.order.parameters:
        value = handed.values[parameter.name]
        if parameter.wanted == "results":
            for out, result in zip(value, results, strict=True):
                out.copy_(result)
        elif parameter.wanted.startswith("result "):
            result = results[int(parameter.wanted.removeprefix("result "))]
            if value.numel():
                value.copy_(result)


def misfits(handed: Handed, arguments: Mapping[str, Any], results: Any) -> list[str]:
    """What differs between what CANN was handed and the call of torch_npu's op, sentence by
    sentence. `arguments` are all of the op's, defaults included; `results` what it returned."""
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    found = [] if handed.executed else [f"{handed.order.calls} was never executed"]
    for parameter in handed.order.parameters:
        wanted: Any = parameter.wanted
        if wanted == "?":
            continue
        if wanted == "results":
            wanted = list(results)
        elif wanted.startswith("result "):
            wanted = results[int(wanted.removeprefix("result "))]
        elif wanted.startswith("("):
            wanted = int(wanted.strip("()"))
        elif " in " in wanted:
            argument, _, names = wanted.partition(" in ")
            wanted = names.split().index(arguments[argument])
        else:
            wanted = arguments[wanted]
        value = handed.values[parameter.name]
        if not same(value, wanted):
            found.append(
                f"{handed.order.calls}: {parameter.name} is {told(value)}, and"
                f" {parameter.wanted} is {told(wanted)}"
            )
    return found


def same(value: Any, wanted: Any) -> bool:
    """Whether two values are the same: of tensors, the same memory seen in the same way."""
    if isinstance(wanted, Tensor):
        if not isinstance(value, Tensor):
            return wanted.numel() == 0 and value is None
        return (
            (value.shape, value.dtype) == (wanted.shape, wanted.dtype)
            and (not value.numel() or value.data_ptr() == wanted.data_ptr())
            and (not value.numel() or value.stride() == wanted.stride())
        )
    if isinstance(wanted, list | tuple):
        if value is None:
            return not wanted
        return len(value) == len(wanted) and all(map(same, value, wanted))
    if wanted is None:
        return value is None or value == []
    if isinstance(wanted, float):
        return bool(value == wanted)
    return type(value) is type(wanted) and bool(value == wanted)


def told(value: Any) -> str:
    if isinstance(value, Tensor):
        return (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} at {value.data_ptr():#x}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(told, value))}]"
    return repr(value)
