"""The second face of every op, `torch.ops.dsa_hal.<op>`, for compilers, graph capture and other
runtimes.

The schema is read off the reference's signature, the fake is the reference on meta tensors, mutated
arguments are annotated. `sparse_mla` can be differentiated. Our own model never goes through here:
the dispatcher costs microseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import Library, infer_schema, register_fake

from dsa_hal.errors import BadInput
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
    if op.name == "sparse_mla":
        _library.impl(op.name, _Attention.called, "Autograd")


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


class _Attention(torch.autograd.Function):
    """`torch.ops.dsa_hal.sparse_mla` and, where a gradient is wanted, its backward by way of
    `torch.ops.dsa_hal.sparse_mla_bwd`: what `torch.library.register_autograd` does for ops without
    tensors among their keyword arguments."""

    @staticmethod
    def called(
        q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
        attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wanted = any(t is not None and t.requires_grad for t in (q, kv, attn_sink))
        if wanted and torch.is_grad_enabled():
            if attn_sink is not None:
                raise BadInput(
                    "torch.ops.dsa_hal.sparse_mla: attn_sink was given and a gradient is wanted;"
                    " gradients know no sinks, so leave it out or call under torch.no_grad()"
                )
            results = _Attention.apply(  # type: ignore[no-untyped-call]
                q, kv, indices, topk_length, softmax_scale, dim_v
            )
            return results[0], results[1], results[2]
        return _Attention.computed(q, kv, indices, softmax_scale, dim_v, attn_sink, topk_length)

    @staticmethod
    def computed(
        q: Tensor, kv: Tensor, indices: Tensor, softmax_scale: float, dim_v: int,
        attn_sink: Tensor | None, topk_length: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            out, top, lse = torch.ops.dsa_hal.sparse_mla(
                q, kv, indices, softmax_scale=softmax_scale, dim_v=dim_v, attn_sink=attn_sink,
                topk_length=topk_length,
            )  # fmt: skip
        return out, top, lse

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, indices: Tensor, topk_length: Tensor | None,
        softmax_scale: float, dim_v: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        out, top, lse = _Attention.computed(q, kv, indices, softmax_scale, dim_v, None, topk_length)
        ctx.mark_non_differentiable(top, lse)
        ctx.save_for_backward(q, kv, indices, topk_length, out, lse)
        ctx.options = dict(softmax_scale=softmax_scale, dim_v=dim_v)
        return out, top, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, indices, topk_length, out, lse = ctx.saved_tensors
        dq, dkv = torch.ops.dsa_hal.sparse_mla_bwd(
            q, kv, indices, out, lse, dout, topk_length=topk_length, **ctx.options
        )
        return dq, dkv.to(kv.dtype), None, None, None, None
