"""Triton's interpreter, which runs programs on host tensors, corrected and made strict.

As it comes (3.6, 3.7) it is wrong in silence: bf16 is multiplied, added and compared as the
integers that hold it; conversions to bf16 cut off, those to FP8 round wrongly, and FP8's NaN is a
number. Here every dtype is what torch makes of it. What devices disagree on is made to show:

- masked loads without `other` give NaN or a huge integer where they load nothing
- FP8 conversions that overflow give NaN
- an address outside the tensors that a launch was given is an error
- programs can run backwards, so that what depends on their order differs

It cannot show races, barriers, layouts, a matrix unit's rounding, or what a compiler does.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_hal.errors import Absent, ConfigError
from dsa_hal.registry import Impl
from dsa_hal.selection import COMPOSITE

VARIABLE = "TRITON_INTERPRET"

_HELD = {
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
"""Triton's name -> torch's dtype, for those that the interpreter holds as integers."""

_backwards = False


def can_run(impl: Impl[..., Any]) -> bool:
    """Whether an implementation runs on host tensors here: one of Triton's programs, or of torch's
    operations alone. Gluon is not interpreted."""
    return impl.name not in ("gluon", COMPOSITE) and all(
        alternative.strip().startswith("triton")
        for need in impl.needs
        for alternative in need.split("|")
    )


def start() -> None:
    """Make this process one whose Triton programs are interpreted; once is enough.

    Raises ConfigError where Triton is imported already and compiles: its language is made of
    functions that were marked for one or the other when they were imported. Raises Absent where
    there is no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        raise Absent("Triton is not installed, which interprets its programs; install triton>=3.6")
    if "triton" in sys.modules and os.environ.get(VARIABLE) != "1":
        raise ConfigError(
            f"Triton is imported and compiles; interpreting wants a process of its own, or"
            f" {VARIABLE}=1 before it starts"
        )
    os.environ[VARIABLE] = "1"
    from triton.runtime import interpreter

    if not hasattr(interpreter, "dsa_hal_corrected"):
        interpreter.dsa_hal_corrected = True
        np.seterr(all="ignore")  # arithmetic of a device does not complain
        _correct(interpreter)


@contextmanager
def backwards() -> Iterator[None]:
    """Inside the block the last program of a launch runs first."""
    global _backwards
    kept, _backwards = _backwards, True
    try:
        yield
    finally:
        _backwards = kept


def _correct(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder
    _patch_once(interpreter)
    _remember_forms(interpreter)
    _correct_arithmetic(interpreter, builder)
    _correct_conversions(interpreter, builder)
    _correct_loads(interpreter, builder)
    _order_programs(builder)
    interpreter.tl.extra.cuda.gdc_launch_dependents = lambda: None  # no launch waits here


# -- numbers -----------------------------------------------------------------------------------


def decoded(data: Any, dtype: Any) -> Any:
    """The numbers that an array of the interpreter means, fp32 where it holds them as integers."""
    held = _HELD.get(dtype.scalar.name)
    if held is None:
        return data
    bits = np.ascontiguousarray(data)
    as_torch = torch.from_numpy(bits.view(np.int16 if bits.itemsize == 2 else np.uint8))
    return as_torch.view(held).float().numpy()


def encoded(numbers: Any, dtype: Any, form: Any) -> Any:
    """Numbers as the interpreter holds them: rounded to nearest, ties to even; `form` is numpy's
    dtype for `dtype`."""
    held = _HELD.get(dtype.scalar.name)
    if held is None:
        return numbers.astype(form)
    made = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32)).to(held)
    return made.view(torch.int16 if made.element_size() == 2 else torch.uint8).numpy().view(form)


def _correct_arithmetic(interpreter: Any, builder: Any) -> None:
    handle, form_of = interpreter.TensorHandle, interpreter._get_np_dtype

    def is_held(*operands: Any) -> bool:
        return any(x.dtype.scalar.name in _HELD for x in operands)

    def result(numbers: Any, dtype: Any) -> Any:
        if numbers.dtype == np.bool_:  # of a comparison
            return handle(numbers, dtype.scalar)
        return handle(encoded(numbers, dtype, form_of(dtype.scalar)), dtype.scalar)

    def in_numbers(name: str) -> Callable[..., Any]:
        """An operation on floats that computes with what its operands mean."""
        plain = getattr(builder, name)

        def operation(self: Any, *operands: Any) -> Any:
            if not is_held(*operands):
                return plain(self, *operands)
            wide = interpreter.tl.float32
            widened = [handle(decoded(x.data, x.dtype), wide) for x in operands]
            return result(plain(self, *widened).data, operands[-1].dtype)

        return operation

    names = [n for n in dir(builder) if n.startswith("create_f") and not n.startswith("create_fp_")]
    extra = ("create_minimumf", "create_maximumf", "create_minnumf", "create_maxnumf",
             "create_precise_divf", "create_exp", "create_exp2", "create_log", "create_log2",
             "create_sqrt", "create_precise_sqrt", "create_rsqrt", "create_floor", "create_ceil",
             "create_sin", "create_cos", "create_erf")  # fmt: skip
    # The number beats NaN, as in the hardware's minimum and maximum.
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    for name in {*names, *extra} - {"create_fabs"}:  # which clears a bit
        setattr(builder, name, in_numbers(name))

    def create_clampf(self: Any, x: Any, low: Any, high: Any, propagate: Any) -> Any:
        numbers, *bounds = (decoded(h.data, h.dtype) for h in (x, low, high))
        found = np.fmin(np.fmax(numbers, bounds[0]), bounds[1])
        if propagate == interpreter._ir.PROPAGATE_NAN.ALL:
            found = np.where(np.isnan(numbers), numbers, found)
        return result(found, x.dtype)

    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        if not is_held(a, b, d):
            return dot(self, a, b, d, *how)
        left, right = (decoded(x.data, x.dtype).astype(np.float32) for x in (a, b))
        total = np.matmul(left, right) + decoded(d.data, d.dtype)
        return result(total.astype(np.float32), d.dtype)

    builder.create_clampf, builder.create_dot = create_clampf, create_dot


def _correct_conversions(interpreter: Any, builder: Any) -> None:
    handle, form_of = interpreter.TensorHandle, interpreter._get_np_dtype
    nearest = (None, interpreter._ir.ROUNDING_MODE.RTNE)
    plain = builder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if not {source.dtype.scalar.name, to.scalar.name} & _HELD.keys():
            return plain(self, source, to)
        numbers = decoded(source.data, source.dtype)
        return handle(encoded(numbers, to, form_of(to.scalar)), to.scalar)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if rounding not in nearest:
            raise NotImplementedError(f"rounding {rounding} is not interpreted; to nearest is")
        return self.cast_impl(source, to)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


# -- memory ------------------------------------------------------------------------------------


class Regions:
    """The memory of the tensors that a launch was given, as [first, end) of addresses, overlapping
    ones made one."""

    def __init__(self, tensors: list[Tensor]) -> None:
        found: list[tuple[int, int]] = []
        for first, end in sorted(_extent(t) for t in tensors if t.numel()):
            if found and first <= found[-1][1]:
                first, end = found[-1][0], max(end, found.pop()[1])
            found.append((first, end))
        self.firsts = np.array([first for first, _ in found], dtype=np.uint64)
        self.ends = np.array([end for _, end in found], dtype=np.uint64)

    def check(self, addresses: Any, size: int, what: str) -> None:
        """Raises IndexError for an address whose `size` bytes lie in no tensor."""
        if not addresses.size:
            return
        at = np.searchsorted(self.firsts, addresses, side="right").astype(np.int64) - 1
        inside = at >= 0
        if len(self.ends):
            inside &= addresses + np.uint64(size) <= self.ends[at.clip(0)]
        if not inside.all():
            count = int((~inside).sum())
            raise IndexError(f"{what} {count} addresses outside the tensors of this launch")


def _extent(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for item in value for t in _tensors(item)]
    return _tensors(value.base) if hasattr(value, "base") else []


def _nothing(form: Any, dtype: Any) -> Any:
    """What a masked load leaves where it loads nothing and was not told what instead."""
    if dtype.scalar.name in _HELD:
        return encoded(np.full(1, np.nan, dtype=np.float32), dtype, form)[0]
    if form.kind == "f":
        return np.array(np.nan, dtype=form)
    return np.array(True) if form.kind == "b" else np.array(np.iinfo(form).max, dtype=form)


def _correct_loads(interpreter: Any, builder: Any) -> None:
    handle, form_of = interpreter.TensorHandle, interpreter._get_np_dtype
    load, store = builder.create_masked_load, builder.create_masked_store
    executor = interpreter.GridExecutor
    to_host = executor._init_args_hst
    regions = Regions([])

    def _init_args_hst(self: Any, given: Any, named: Any) -> Any:
        nonlocal regions
        arguments, keywords = to_host(self, given, named)
        regions = Regions(_tensors([*arguments, *keywords.values()]))
        return arguments, keywords

    def check(pointers: Any, mask: Any, what: str) -> None:
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        regions.check(addresses, size, what)

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *how: Any) -> Any:
        check(pointers, mask, "loads from")
        # Of a single element, `other=0` arrives as None: the interpreter takes it for false.
        if other is None and pointers.data.size > 1:
            dtype = pointers.get_element_ty()
            form = form_of(dtype)
            nothing = np.full(pointers.data.shape, _nothing(form, dtype), dtype=form)
            other = handle(nothing, dtype)
        return load(self, pointers, mask, other, *how)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        check(pointers, mask, "stores to")
        return store(self, pointers, value, mask, *how)

    executor._init_args_hst = _init_args_hst
    builder.create_masked_load, builder.create_masked_store = (
        create_masked_load,
        create_masked_store,
    )

    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def create_atomic_rmw(
        self: Any, op: Any, pointers: Any, value: Any, mask: Any, *how: Any
    ) -> Any:
        check(pointers, mask, "changes")
        if value.dtype.scalar.name in _HELD:
            raise NotImplementedError(f"atomics of {value.dtype.scalar} are not interpreted")
        return rmw(self, op, pointers, value, mask, *how)

    def create_atomic_cas(self: Any, pointers: Any, *how: Any) -> Any:
        check(pointers, SimpleNamespace(data=np.ones_like(pointers.data, dtype=bool)), "changes")
        return cas(self, pointers, *how)

    builder.create_atomic_rmw, builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas


# -- programs ----------------------------------------------------------------------------------


def _order_programs(builder: Any) -> None:
    place = builder.set_grid_idx

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        if _backwards:
            x, y, z = (size - 1 - at for size, at in zip(self.grid_dim, (x, y, z), strict=True))
        place(self, x, y, z)

    builder.set_grid_idx = set_grid_idx


def _patch_once(interpreter: Any) -> None:
    """Exchange the language's functions for interpreted ones once and for good: each call of a
    device function would do it again, which is most of the time it takes."""
    tl, patch = interpreter.tl, interpreter._patch_lang
    done: list[bool] = []

    def _patch_lang(_: Any) -> Any:
        if not done:
            patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            # Triton 3.6 fails on a bound in an array of one, which numpy 2.4 takes for no number.
            tl.tensor.__index__ = lambda self: int(self.handle.data.item())
            to_ir = tl.dtype.to_ir
            fnuz = {"fp8e4b8": "get_fp8e4b8_ty", "fp8e5b16": "get_fp8e5b16_ty"}
            tl.dtype.to_ir = lambda self, builder: (
                getattr(builder, fnuz[self.name])() if self.name in fnuz else to_ir(self, builder)
            )
            done.append(True)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _patch_lang


def _remember_forms(interpreter: Any) -> None:
    """numpy's dtype of each of Triton's, kept: it is asked for several times in every operation."""
    find = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def _get_np_dtype(dtype: Any) -> Any:
        form = known.get(dtype.name)
        return known.setdefault(dtype.name, find(dtype)) if form is None else form

    interpreter._get_np_dtype = _get_np_dtype
