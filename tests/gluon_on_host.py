"""Gluon kernels on the processor: their language is made of Triton's, whose interpreter runs it.

A tensor of Gluon is a tensor of Triton with a layout, on which what is computed does not depend: so
layouts are dropped, shared memory is an array, and a matrix instruction is a product of tiles. What
is checked are indices, masks and arithmetic. What is not: that layouts fit (the compiler refuses
those that do not), barriers, and the machine's own rounding.

As a program: judges the implementations called "gluon" of `rocm:gfx950` on small cases; prints a
line for each, and exits with 1 if one is wrong.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from dsa_hal import matrix
from dsa_hal.backends.portable import interpreter
from dsa_hal.case import copied, dirty_memory, poisoned, run
from dsa_hal.selection import OPS, use
from dsa_hal.target import stand_in


class Shared:
    """An array in shared memory, or a part of one."""

    def __init__(self, data: Any, dtype: Any) -> None:
        self.data, self.dtype = data, dtype

    def index(self, at: Any) -> Shared:
        return Shared(self.data[int(at)], self.dtype)

    def slice(self, start: Any, length: Any, dim: Any = 0) -> Shared:
        where = [slice(None)] * self.data.ndim
        where[int(dim)] = slice(int(start), int(start) + int(length))
        return Shared(self.data[tuple(where)], self.dtype)

    def permute(self, order: Any) -> Shared:
        return Shared(self.data.transpose(tuple(int(axis) for axis in order)), self.dtype)

    def store(self, value: Any) -> None:
        assert value.handle.data.shape == self.data.shape
        self.data[...] = value.handle.data

    def load(self, layout: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        shape = [int(size) for size in self.data.shape]
        handle = TensorHandle(self.data.copy(), self.dtype)
        return tl.tensor(handle, tl.block_type(self.dtype, shape))


def install() -> None:
    """Put the language in the place of Gluon's. Triton must be interpreting by now."""
    import numpy as np
    import triton
    import triton.language as tl
    from triton.experimental import gluon as real
    from triton.experimental.gluon import nvidia  # noqa: F401  which a launch imports
    from triton.runtime import jit
    from triton.runtime.interpreter import _get_np_dtype

    class Layout:
        def __init__(self, *parts: Any) -> None:
            self.parts = parts

    def allocate(dtype: Any, shape: Any, layout: Any) -> Shared:
        form = _get_np_dtype(dtype)
        rubbish = np.full([int(size) for size in shape], 0x7F, dtype=np.uint8)
        return Shared(np.repeat(rubbish[..., None], form.itemsize, -1).view(form)[..., 0], dtype)

    class Language(ModuleType):
        def __getattr__(self, name: str) -> Any:  # a launch exchanges the functions of `tl`
            return getattr(tl, name)

    language, amd, cdna4 = Language("language"), ModuleType("amd"), ModuleType("cdna4")
    vars(language).update(
        arange=lambda first, end, layout=None: tl.arange(first, end),
        full=lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype),
        convert_layout=lambda value, layout: value,
        allocate_shared_memory=allocate,
        BlockedLayout=Layout, SliceLayout=Layout,
        DotOperandLayout=Layout, SwizzledSharedLayout=Layout, amd=amd,
    )  # fmt: skip
    amd.AMDMFMALayout, amd.cdna4 = Layout, cdna4  # type: ignore[attr-defined]
    vars(cdna4).update(
        buffer_load=lambda pointer, offsets, mask=None, other=None: tl.load(
            pointer + offsets, mask=mask, other=other
        ),
        mfma=lambda a, b, acc: tl.dot(a, b, acc),
        mfma_scaled=lambda a, sa, fa, b, sb, fb, acc: tl.dot(a, b, acc),
    )
    name_of = jit._normalize_ty
    jit._normalize_ty = lambda ty: name_of(ty.removeprefix("gl.") if isinstance(ty, str) else ty)
    home = "triton.experimental.gluon"
    real.jit, real.language = triton.jit, language
    sys.modules.update({f"{home}.language": language, f"{home}.language.amd": amd})


def judge() -> bool:
    """Judge every small case of every such implementation."""
    good = True
    with use(target=stand_in("rocm:gfx950", "cpu")) as chosen:
        for op in OPS.values():
            for impl in op.implementations(chosen.target):
                if impl.name != "gluon":
                    continue
                for case in op.cases:
                    inputs = None if case.model else case.make(op.inputs, "cpu")
                    if inputs is None or impl.why_not(**inputs) is not None:
                        continue
                    want = matrix.wanted(op, inputs)
                    first = op.check(run(impl.fn, copied(inputs), op.mutates), want, inputs)
                    given = inputs if op.unread is None else poisoned(inputs, op.unread(**inputs))
                    with interpreter.backwards(), dirty_memory():
                        second = op.check(run(impl.fn, given, op.mutates), want, inputs)
                    right = first.ok and second.ok
                    good &= right
                    print(
                        op.name, case.name, "ok" if right else f"wrong {first} {second}", flush=True
                    )
    return good


if __name__ == "__main__":
    interpreter.start()
    install()
    import dsa_hal.ops.attention
    import dsa_hal.ops.indexer  # noqa: F401

    sys.exit(0 if judge() else 1)
