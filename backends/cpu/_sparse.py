"""What both sparse attentions do on the processor: gather the selected keys of a few queries, so
that they stay in cache, then two batched fp32 products around a softmax."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsa_hal.errors import BadInput

WORKSPACE = 8 << 20
"""Bytes for gathered keys and scores; at least one query is taken. 2 to 8 MiB measure best."""

Gather = Callable[[Tensor, Tensor], None]
"""(ids [n] int32, out [n, dim] fp32): writes the keys called `ids` to `out`."""


def attend(
    q: Tensor, indices: Tensor, gather: Gather, limit: int, *, softmax_scale: float, dim_v: int,
    attn_sink: Tensor | None, topk_length: Tensor | None, asked: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [rows, heads, dim], indices [rows, k], topk_length [rows] -> out [rows, heads, dim_v] of
    q's dtype, max_logits and lse [rows, heads] fp32. Ids are below `limit`; `asked` names them."""
    rows, heads, dim = q.shape
    out = q.new_empty(rows, heads, dim_v)
    top = torch.full((rows, heads), -torch.inf)
    lse = torch.full((rows, heads), torch.inf)
    if not rows:
        return out, top, lse
    ids, used, holes = _resolve(indices, topk_length, limit, asked)
    chunks = _chunks(used, WORKSPACE // (4 * (dim + heads)))
    workspace = torch.empty(max((end - start) * max(used[start:end]) for start, end in chunks), dim)
    for start, end in chunks:
        width = max(used[start:end])
        if not width:
            out[start:end] = 0
            continue
        keys = workspace[: (end - start) * width]
        gather(ids[start:end, :width].reshape(-1), keys)
        keys = keys.view(end - start, width, dim)
        scores = torch.bmm(q[start:end].float() * softmax_scale, keys.transpose(1, 2))
        if holes is not None:
            scores.masked_fill_(holes[start:end, None, :width], -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        top[start:end] = peak[..., 0]
        if holes is not None:
            peak.clamp_(min=torch.finfo(torch.float32).min)  # -inf - -inf would be NaN
        total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
        mean = torch.bmm(scores, keys[..., :dim_v]).div_(total)
        log = peak.add_(total.log())[..., 0]
        if holes is not None:
            nothing = total[..., 0] == 0
            log.masked_fill_(nothing, torch.inf)
            mean.masked_fill_(nothing[..., None], 0)
        if attn_sink is not None:
            mean.mul_(torch.sigmoid(log - attn_sink).nan_to_num_(0)[..., None])
        lse[start:end] = log
        out[start:end] = mean
    return out, top, lse


def _resolve(
    indices: Tensor, topk_length: Tensor | None, limit: int, asked: str
) -> tuple[Tensor, list[int], Tensor | None]:
    """(ids that are all safe to gather, columns up to each row's last key, mask of entries that are
    no key or None). A hole takes another id of its own row, so that no foreign key is read."""
    rows, k = indices.shape
    column = torch.arange(k, dtype=torch.int32)
    if topk_length is not None:
        indices = torch.where(column < topk_length[:, None], indices, -1)
    lowest, highest = (int(bound) for bound in torch.aminmax(indices))
    if lowest < -1 or highest >= limit:
        row, col = ((indices < -1) | (indices >= limit)).nonzero()[0].tolist()
        raise BadInput(
            f"{asked} [{row}, {col}] is {int(indices[row, col])}; expected -1 (no key) or a number"
            f" from 0 to {limit - 1}"
        )
    if lowest >= 0:
        return indices, [k] * rows, None
    holes = indices < 0
    used = torch.where(holes, 0, column + 1).amax(1).tolist()
    spare = indices.amax(1, keepdim=True).clamp_(min=0)
    return torch.where(holes, spare, indices), used, holes


def _chunks(used: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Runs of rows whose keys, all taken as wide as the widest, are at most `room`, or one row."""
    found, start, widest = [], 0, 0
    for row, width in enumerate(used):
        wider = max(widest, width)
        if row > start and (row - start + 1) * wider > room:
            found.append((start, row))
            start, wider = row, width
        widest = wider
    return [*found, (start, len(used))]
