"""The gradients of sparse_mla in plain torch, some queries at a time."""

import torch
from torch import Tensor

from dsa_hal.backends.portable.chunks import Limits, of_selection, resolved
from dsa_hal.backends.portable.keys import Selection


def backward(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int, topk_length: Tensor | None, limits: Limits,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq and dkv of `sparse_mla_bwd`.

    With p = exp(softmax_scale * q . k - lse) and ds = softmax_scale * p * (dout . v - dout . out),
    dq is the sum of ds times k, and dkv that of ds times q and p times dout.
    """
    (_, heads, dim), context, factors = q.shape, kv.shape[0], limits.factors(q.dtype)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.zeros(context + 1, dim, device=q.device)
    ids = resolved(indices, topk_length)
    chunks = of_selection(
        ids, context, heads=heads, score=2 * heads * (4 + factors.itemsize), limits=limits,
        picked=dim * (4 + factors.itemsize) + 2 * heads * (4 + factors.itemsize),
        asked="sparse_mla_bwd: indices",
    )  # fmt: skip
    selection = Selection(ids, context, limits)
    kept = selection.readable(kv) if chunks else kv
    for chunk in chunks:
        keys, allowed, rows = selection.keys(kept, chunk), selection.allowed(chunk), chunk.rows
        query, upstream = q[rows].to(factors), dout[rows].to(factors)
        share, slope = keys.against(query, upstream)
        torch.add(-lse[rows, :, None], share, alpha=softmax_scale, out=share).exp_()
        if allowed is not None:
            share.masked_fill_(~allowed[:, None], 0)
        mean = (dout[rows].float() * out[rows].float()).sum(-1, keepdim=True)
        torch.add(mean * -softmax_scale, slope, alpha=softmax_scale, out=slope)
        steps = torch.mul(slope, share, out=torch.empty_like(share, dtype=factors))
        dq[rows] = keys.mixed(steps)
        keys.spread(dkv, (steps, query), (share.to(factors), upstream))
        del share, slope, steps, keys  # before the next chunk's exist
    return dq, dkv[:context]
