"""Training through the ops: sparse attention and the indexer's loss as functions that torch can
differentiate. Which implementation computes a gradient is chosen when the forward runs, so by the
selection that is in force there."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa_hal.ops.attention import sparse_mla as attend
from dsa_hal.ops.training import indexer_kl as divergence
from dsa_hal.ops.training import sparse_mla_bwd


def sparse_mla(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int = 512,
    topk_length: Tensor | None = None, deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sparse_mla`, differentiable in q and kv.

    q            [tokens, heads, dim] bf16, fp16 or fp32
    kv           [context, dim] q's dtype
    indices      [tokens, k] int32 rows of kv, none twice; -1 = no key
    softmax_scale  multiplies q . k
    dim_v        columns of a key that are its value
    topk_length  [tokens] int32 or None: entries of `indices` from here on are never looked at
    deterministic  True: the backward repeats to the bit, or is refused now
    -> out       [tokens, heads, dim_v] q's dtype
    -> lse       [tokens, heads] fp32, natural logarithm, +inf without keys; takes no gradient
    """
    options = topk_length, softmax_scale, dim_v, deterministic
    out, lse = _SparseMla.apply(q, kv, indices, *options)  # type: ignore[no-untyped-call]
    return out, lse


def indexer_kl(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
    ks: Tensor | None = None, ke: Tensor | None = None, indices: Tensor | None = None,
    row_weight: Tensor | None = None, *, softmax_scale: float,
) -> Tensor:  # fmt: skip
    """The sum of `indexer_kl` over the queries, differentiable in q_index, k_index and weights.

    Arguments as of the op: q_index [tokens, index_heads, index_dim], k_index [context, index_dim],
    weights [tokens, index_heads] fp32, q [tokens, heads, dim], kv [context, dim]; ks and ke
    [tokens] int32, or indices [tokens, k] int32; row_weight [tokens] fp32 or None.
    -> loss  [] fp32, sum of row_weight * KL. q and kv are the target and take no gradient.
    """
    loss: Tensor = _IndexerKl.apply(  # type: ignore[no-untyped-call]
        q_index, k_index, weights, q, kv, ks, ke, indices, row_weight, softmax_scale
    )
    return loss


class _SparseMla(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, indices: Tensor, topk_length: Tensor | None,
        softmax_scale: float, dim_v: int, deterministic: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, _, lse = attend(
            q, kv, indices, softmax_scale=softmax_scale, dim_v=dim_v, topk_length=topk_length
        )
        ctx.mark_non_differentiable(lse)
        if any(ctx.needs_input_grad):
            ctx.options = dict(
                softmax_scale=softmax_scale, dim_v=dim_v, deterministic=deterministic
            )
            ctx.gradients = sparse_mla_bwd.bind(
                q, kv, indices, out, lse, out, topk_length=topk_length, **ctx.options
            )
            ctx.save_for_backward(q, kv, indices, topk_length, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, indices, topk_length, out, lse = ctx.saved_tensors
        dq, dkv = ctx.gradients(
            q, kv, indices, out, lse, dout, topk_length=topk_length, **ctx.options
        )
        return dq, dkv.to(kv.dtype), None, None, None, None, None


class _IndexerKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor,
        ks: Tensor | None, ke: Tensor | None, indices: Tensor | None, row_weight: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:  # fmt: skip
        loss, *gradients = divergence(
            q_index, k_index, weights, q, kv, ks, ke, indices, row_weight,
            softmax_scale=softmax_scale,
        )  # fmt: skip
        ctx.dtypes = q_index.dtype, k_index.dtype, weights.dtype
        ctx.save_for_backward(*gradients)
        return (loss if row_weight is None else loss * row_weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((part * upstream).to(dtype) for part, dtype in parts), *(None,) * 7
