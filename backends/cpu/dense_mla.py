"""dense_mla on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._ranges import bounds, hull
from dsa_hal.ops.dense import dense_mla

SCORES = 16 << 20
"""Bytes of fp32 scores at a time; at least those of one query and head are held."""

STEP = 2048
"""Keys that are widened to fp32 at a time."""


@dense_mla.impl("cpu", "torch", contract=1, promises=("deterministic", "lse=natural"))
def dense(
    q: Tensor, kv: Tensor, ks: Tensor, ke: Tensor, *, softmax_scale: float, dim_v: int = 512
) -> tuple[Tensor, Tensor]:
    """All heads of some queries are the rows of one product with the keys that any of them sees."""
    tokens, heads, _ = q.shape
    out = q.new_zeros(tokens, heads, dim_v)
    lse = torch.full((tokens, heads), torch.inf)
    starts, ends = bounds("dense_mla", ks, ke, kv.shape[0])
    widest = max((e - s for s, e in zip(starts, ends, strict=True)), default=0)
    rows = max(1, SCORES // (4 * max(1, widest)))
    group = min(heads, rows)
    chunk = max(1, rows // heads)
    for first in range(0, tokens, chunk):
        last = min(tokens, first + chunk)
        low, high = hull(starts, ends, first, last)
        if low == high:
            continue
        column = torch.arange(low, high)
        own = slice(first, last)
        hidden = (column < ks[own, None]) | (column >= ke[own, None])
        for head in range(0, heads, group):
            part = own, slice(head, head + group)
            mean, log = _attend(q[part].float() * softmax_scale, kv[low:high], hidden, dim_v)
            out[part], lse[part] = mean, log
    return out, lse


def _attend(q: Tensor, kv: Tensor, hidden: Tensor, dim_v: int) -> tuple[Tensor, Tensor]:
    """Scaled queries [n, heads, dim] on keys [m, dim], without the hidden [n, m]."""
    n, heads, dim = q.shape
    flat = q.reshape(-1, dim)
    scores = torch.empty(flat.shape[0], kv.shape[0])
    steps = [slice(at, at + STEP) for at in range(0, kv.shape[0], STEP)]
    unseen = hidden.all(0)
    some_unseen = bool(unseen.any())
    for step in steps:
        torch.mm(flat, kv[step].float().t(), out=scores[:, step])
    by_query = scores.view(n, heads, -1)
    by_query.masked_fill_(hidden[:, None], -torch.inf)
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
    mean = torch.zeros(flat.shape[0], dim_v)
    for step in steps:
        values = kv[step, :dim_v].float()
        if some_unseen:  # 0 times a NaN that nobody may read would be NaN
            values = values.masked_fill(unseen[step, None], 0)
        mean.addmm_(scores[:, step], values)
    nothing = total == 0
    mean.div_(total).masked_fill_(nothing, 0)
    log = peak.add_(total.log()).masked_fill_(nothing, torch.inf)
    return mean.view(n, heads, dim_v), log.view(n, heads)
