"""mha_prefill on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._ranges import bounds, hull
from dsa_hal.errors import BadInput
from dsa_hal.ops.dense import FREE_MASK, mha_prefill

SCORES = 16 << 20
"""Bytes of fp32 scores at a time."""

CHUNK = 256
"""Queries at a time, fewer in a long context; keys beyond what any of them sees are skipped."""


@mha_prefill.impl("cpu", "torch", contract=1, promises=("deterministic", "lse=natural", FREE_MASK))
def mha(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None = None, *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fp32 products over a few heads and a chunk of queries; own products, since torch's attention
    returns no lse."""
    tokens, heads, dim_v = q.shape[0], q.shape[1], v.shape[2]
    out = q.new_zeros(tokens, heads, dim_v)
    lse = torch.full((tokens, heads), torch.inf)
    starts, ends = bounds("mha_prefill", ks, ke, k.shape[0])
    if indices is not None:
        _check(indices, k.shape[0])
    widest = max((e - s for s, e in zip(starts, ends, strict=True)), default=0)
    chunk = max(1, min(CHUNK, SCORES // (4 * max(1, widest))))
    for first in range(0, tokens, chunk):
        last = min(tokens, first + chunk)
        low, high = hull(starts, ends, first, last)
        if low == high:
            continue
        own = slice(first, last)
        hidden = _hidden(ks[own], ke[own], None if indices is None else indices[own], low, high)
        group = max(1, SCORES // (4 * (last - first) * (high - low)))
        for head in range(0, heads, group):
            some = slice(head, head + group)
            mean, log = _attend(
                q[own, some].float() * softmax_scale, k[low:high, some], v[low:high, some], hidden
            )
            out[own, some], lse[own, some] = mean.transpose(0, 1), log.t()
    return out, lse


def _check(indices: Tensor, context: int) -> None:
    if indices.numel() and (int(indices.min()) < -1 or int(indices.max()) >= context):
        row, col = ((indices < -1) | (indices >= context)).nonzero()[0].tolist()
        raise BadInput(
            f"mha_prefill: indices [{row}, {col}] is {int(indices[row, col])}; expected -1 (no key)"
            f" or a number from 0 to {context - 1}"
        )


def _hidden(ks: Tensor, ke: Tensor, indices: Tensor | None, low: int, high: int) -> Tensor:
    """Mask [n, high - low] of the keys that a query does not see."""
    column = torch.arange(low, high)
    hidden = (column < ks[:, None]) | (column >= ke[:, None])
    if indices is not None:
        width = high - low
        at = torch.where((indices >= low) & (indices < high), indices - low, width).long()
        named = torch.zeros(indices.shape[0], width + 1, dtype=torch.bool).scatter_(1, at, True)
        hidden |= ~named[:, :width]
    return hidden


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled queries [n, heads, dim] -> out [heads, n, dim_v], lse [heads, n]."""
    unseen = hidden.all(0)
    values = v.float().transpose(0, 1)
    if bool(unseen.any()):  # 0 times a NaN that nobody may read would be NaN
        values = values.masked_fill(unseen[:, None], 0)
    scores = torch.bmm(q.transpose(0, 1), k.float().permute(1, 2, 0))
    scores.masked_fill_(hidden, -torch.inf)
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
    nothing = total == 0
    mean = torch.bmm(scores, values).div_(total).masked_fill_(nothing, 0)
    log = peak.add_(total.log()).masked_fill_(nothing, torch.inf)
    return mean, log[..., 0]
