"""The second face of every op, `torch.ops.dsa_hal.<op>`, for compilers, graph capture and other
runtimes.

The schema is read off the reference's signature, the fake is the reference on meta tensors, mutated
arguments are annotated. Our own model never goes through here: the dispatcher costs microseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import Library, infer_schema, register_fake

from dsa_hal.registry import Op
from dsa_hal.selection import OPS

NAMESPACE = "dsa_hal"

_library = Library(NAMESPACE, "FRAGMENT")
_published: set[str] = set()


def publish_all() -> None:
    """Define `torch.ops.dsa_hal.*` for every op declared so far and not yet published."""
    for op in OPS.values():
        if op.name not in _published:
            _publish(op)
            _published.add(op.name)


def _publish(op: Op[..., Any]) -> None:
    schema = infer_schema(op.reference, mutates_args=op.mutates)
    _library.define(op.name + schema)
    _library.impl(op.name, _own_memory(op, op.__call__), "CompositeExplicitAutograd")
    register_fake(f"{NAMESPACE}::{op.name}", _own_memory(op, op.reference), lib=_library)


def _own_memory(op: Op[..., Any], fn: Any) -> Any:
    """torch forbids results that share memory with arguments, which `pack_weight` and `rope` of an
    already fitting tensor may return; copy those. A mutating op returns nothing."""
    if op.mutates:
        return fn

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list) else [a])]
        owned = {t.untyped_storage()._cdata for t in given if isinstance(t, torch.Tensor)}

        def own(result: torch.Tensor) -> torch.Tensor:
            return result.clone() if result.untyped_storage()._cdata in owned else result

        answer = fn(*args, **kwargs)
        if isinstance(answer, torch.Tensor):
            return own(answer)
        return type(answer)(map(own, answer))

    return call
