"""torch_npu's ops on the processor, in plain torch: `register()` puts them behind `torch.ops.npu`,
under the schemas of the torch_npu that is imported, or where none is under those of
ci/ascend/schemas. `emulated("a2")` is the target in whose place they stand.

They are written from the documentation, not from the backend, and take no more than it grants: what
it forbids raises Misuse, and where it promises nothing they return NaN or numbers that are none.
What the closed kernels do beyond it, accuracy above all, is not known here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ci.ascend.emulated import attention, products, prolog, routing, rows, shapes
from ci.ascend.emulated._need import ARCHES, Misuse, need, pretending
from ci.ascend.schemas import CURRENT, schemas
from dsa_hal import use
from dsa_hal.selection import Selection
from dsa_hal.target import stand_in

__all__ = ["ARCHES", "KERNELS", "Misuse", "emulated", "register"]

Kernel = Callable[..., Any]

KERNELS: dict[str, Kernel] = {
    name: kernel
    for room in (attention, products, prolog, routing, rows)
    for name, kernel in vars(room).items()
    if name.startswith("npu_")
}
"""Every op there is, by name. A kernel names the arguments that it knows; the others have to be
what the schema says where they are not given."""


@cache
def register() -> torch.library.Library:
    """Put the kernels behind `torch.ops.npu`, for tensors of the processor, and outlines for "meta"
    if there is no torch_npu to give them. Once per process, and after `import torch_npu` where that
    is to be imported at all."""
    library = torch.library.Library("npu", "FRAGMENT")
    if "torch_npu" not in sys.modules:
        for name in KERNELS:
            library.define(schemas(CURRENT)[name])
            library.impl(name, _by_schema(name, getattr(shapes, name), strict=False), "Meta")
    for name, kernel in KERNELS.items():
        library.impl(name, _by_schema(name, kernel), "CPU")
    return library


def _by_schema(name: str, kernel: Kernel, strict: bool = True) -> Kernel:
    """The kernel with every argument that it knows, by name: the dispatcher leaves out those that
    are as the schema has them by default. `strict` refuses those that it does not know."""
    declared = getattr(torch.ops.npu, name).default._schema.arguments
    known = signature(kernel).parameters

    @wraps(kernel)
    def called(*args: Any, **kwargs: Any) -> Any:
        given = {a.name: value for a, value in zip(declared, args, strict=False)} | kwargs
        every = {a.name: given.get(a.name, a.default_value) for a in declared}
        for argument in declared:
            if strict and argument.name not in known:
                unused = every[argument.name] == argument.default_value
                need(unused, f"{name}: {argument.name} is not emulated")
        return kernel(**{key: value for key, value in every.items() if key in known})

    return called


class _WideProducts(TorchFunctionMode):
    """Products of bf16 matrices by way of fp32, which rounds once, as the device does; torch's own
    take many times as long on processors without an instruction for them."""

    PRODUCTS = frozenset({
        torch.bmm, torch.mm, torch.matmul, torch.nn.functional.linear, torch.Tensor.matmul,
        torch.Tensor.__matmul__, torch.Tensor.bmm, torch.Tensor.mm,
    })  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS and args[0].dtype == torch.bfloat16 and not kwargs:
            wide = (arg.float() if isinstance(arg, Tensor) else arg for arg in args)
            return func(*wide).to(torch.bfloat16)
        return func(*args, **(kwargs or {}))


@contextmanager
def emulated(arch: str, **wishes: Any) -> Iterator[Selection]:
    """Choose within a `with` block: the npu backend for `arch` on tensors of the processor, and
    what `dsa_hal.use` takes besides."""
    register()
    target = stand_in(f"npu:{arch}", "cpu")
    with pretending(arch), _WideProducts(), use(target=target, **wishes) as chosen:
        yield chosen
