"""topk on the processor."""

import torch
from torch import Tensor

from dsa_hal.ops.select import topk

BLOCK = 1 << 20
"""Scores that are copied and searched at a time, so that the copy stays in cache."""


@topk.impl("cpu", "torch", contract=1, promises=("deterministic", "ties=lower"))
def largest(
    logits: Tensor, k: int, starts: Tensor | None = None, ends: Tensor | None = None, *,
    ties: str = "any",
) -> Tensor:  # fmt: skip
    """A few rows at a time, of those only the columns from the first start to the last end. What is
    rare (short rows, NaN, ties at the boundary) is looked for in the k results, not in the row."""
    rows, n = logits.shape
    out = torch.full((rows, k), -1, dtype=torch.int32)
    step = max(1, BLOCK // max(1, n))
    for at in range(0, rows, step):
        some = slice(at, min(at + step, rows))
        first = None if starts is None else starts[some].clamp(0, n)
        last = None if ends is None else ends[some].clamp(0, n)
        low = 0 if first is None else int(first.min())
        high = n if last is None else int(last.max())
        if low >= high:
            continue
        scores = _masked(logits[some, low:high].float(), low, first, last)
        count = min(k, high - low)
        values, columns = torch.topk(scores, count, sorted=False)
        kept = values > -torch.inf
        if not bool(kept.all()):
            if bool(values.isnan().any()):  # counts as the largest, so it cannot hide
                scores = scores.masked_fill(scores.isnan(), -torch.inf)
            values, columns = torch.topk(scores, count, sorted=True)  # what is not kept comes last
            kept = values > -torch.inf
        if ties == "lower":
            _prefer_lower(scores, values, columns)
        out[some, :count] = torch.where(kept, columns.add_(low), -1)
    return out


def _masked(scores: Tensor, low: int, first: Tensor | None, last: Tensor | None) -> Tensor:
    """`scores` with -inf outside each row's range. Rows that follow each other have nearly equal
    ranges, so only the strips where these differ are compared; the input is not written."""
    if scores.shape[0] == 1:
        return scores
    strips = []
    if first is not None and (wide := min(int(first.max()) - low, scores.shape[1])) > 0:
        strips.append((0, torch.arange(low, low + wide) < first[:, None]))
    if last is not None and (whole := max(0, int(last.min()) - low)) < scores.shape[1]:
        strips.append((whole, torch.arange(low + whole, low + scores.shape[1]) >= last[:, None]))
    if strips:
        scores = scores.clone()
    for at, outside in strips:
        scores[:, at : at + outside.shape[1]].masked_fill_(outside, -torch.inf)
    return scores


def _prefer_lower(scores: Tensor, values: Tensor, columns: Tensor) -> None:
    """Where more columns equal the k-th score than were taken, take the lowest of them; in place.
    Rows whose k-th is -inf are left: their tail is no selection."""
    kth = values.amin(-1, keepdim=True)
    equal = scores == kth
    contested = (equal.sum(-1) > (values == kth).sum(-1)) & (kth[:, 0] > -torch.inf)
    rows = contested.nonzero()[:, 0]
    if not rows.numel():
        return
    above, equal = scores[rows] > kth[rows], equal[rows]
    room = columns.shape[1] - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    columns[rows] = chosen.nonzero()[:, 1].view(rows.shape[0], -1)
