"""topk in plain torch, without a look at the data but for the columns that a chunk of rows uses."""

import torch
from torch import Tensor

from dsa_hal.backends.portable.chunks import Limits, of_ranges


def largest(
    logits: Tensor, k: int, starts: Tensor | None, ends: Tensor | None, *, ties: str, limits: Limits
) -> Tensor:
    """`topk`. What may not be selected becomes -inf in a copy, and what was selected there -1."""
    rows, n = logits.shape
    out = torch.full((rows, k), -1, dtype=torch.int32, device=logits.device)
    some = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    first = some if starts is None else starts.clamp(0, n)
    last = some + n if ends is None else ends.clamp(0, n)
    score = 24 if ties == "lower" else 12
    for chunk in of_ranges(first, last, n, heads=1, score=score, limits=limits):
        scores = logits[chunk.rows, chunk.low : chunk.high].float()
        column = torch.arange(chunk.low, chunk.high, dtype=torch.int32, device=logits.device)
        allowed = (column >= first[chunk.rows, None]) & (column < last[chunk.rows, None])
        scores = torch.where(allowed & ~scores.isnan(), scores, -torch.inf)
        count = min(k, chunk.high - chunk.low)
        if ties == "lower":
            found = _lowest(scores, count)
            found = torch.where(found < 0, -1, found + chunk.low)
        else:
            values, found = torch.topk(scores, count)  # in order, so that -inf is last
            found = torch.where(values == -torch.inf, -1, found + chunk.low)
        out[chunk.rows, :count] = found.to(torch.int32)
    return out


def _lowest(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest scores of each row in ascending order, then -1; of equal ones the
    lowest. Those above the k-th score are taken, then equal ones from the left while there is room;
    each goes to the place that its rank among the taken says."""
    kth = torch.topk(scores, k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > kth, (scores == kth) & (kth > -torch.inf)
    room = k - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    place = taken.cumsum(-1, dtype=torch.int32).sub_(1).masked_fill_(~taken, k)
    column = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    found = torch.full((scores.shape[0], k + 1), -1, device=scores.device)
    return found.scatter_(1, place.long(), column)[:, :k]
