"""What the emulated ops demand of a call, and how they say that it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

ARCHES = ("a2", "a3", "950")

_arch: ContextVar[str] = ContextVar("emulated_arch", default="a2")


class Misuse(RuntimeError):
    """A call that the documentation of the op does not allow, or that is not emulated."""


@contextmanager
def pretending(arch: str) -> Iterator[None]:
    """Within it, the ops take what they take on `arch`."""
    token = _arch.set(arch)
    try:
        yield
    finally:
        _arch.reset(token)


def is_950() -> bool:
    return _arch.get() == "950"


def need(condition: bool, rule: str) -> None:
    """Raises Misuse with `rule`, what should have been, where the condition does not hold."""
    if not condition:
        raise Misuse(f"on {_arch.get()}: {rule}")


HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def of(
    name: str, value: Tensor | None, dtypes: tuple[torch.dtype, ...], *shape: int | None
) -> None:
    """`value` must be given, of one of `dtypes`, and of `shape`, in which None is any size."""
    need(value is not None, f"{name} must be given")
    assert value is not None
    need(value.dtype in dtypes, f"{name} is {value.dtype}, must be among {dtypes}")
    fits = value.dim() == len(shape) and all(
        want is None or want == size for want, size in zip(shape, value.shape, strict=True)
    )
    need(fits, f"{name} is {list(value.shape)}, must be {list(shape)}")


def dense(**tensors: Tensor) -> None:
    """None may have gaps, or be empty."""
    for name, value in tensors.items():
        need(value.is_contiguous(), f"{name} has strides {value.stride()}, must be contiguous")
        need(value.numel() > 0, f"{name} is empty")


CODES = {
    int(code): dtype
    for code, dtype in (
        (1, torch.int8), (3, torch.int32), (5, torch.float16), (6, torch.float32),
        (15, torch.bfloat16), (24, torch.float8_e4m3fn),
    )
}  # fmt: skip
"""torch's own numbers for dtypes: a schema's `int` takes a dtype, a kernel gets its number."""


def dtype_of(code: int | None, default: torch.dtype) -> torch.dtype:
    """What an `int?` that means a dtype says."""
    if code is None:
        return default
    need(code in CODES, f"dtype number {code} is not emulated")
    return CODES[code]


def undefined(*shape: int, dtype: torch.dtype) -> Tensor:
    """What stands where the documentation promises nothing: NaN, or a number that is no result."""
    if dtype.is_floating_point:
        return torch.full(shape, torch.nan).to(dtype)
    return torch.full(shape, 77 if dtype == torch.int8 else 0x7F7F7F7F, dtype=dtype)
