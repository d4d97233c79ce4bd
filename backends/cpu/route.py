"""route on the processor."""

import torch
from torch import Tensor

from dsa_hal.ops.routing import route


def _best(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest, equal ones lower column first. A sort would do, but is slow here;
    instead score and column form one integer each, so that no two are equal."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    lower_first = torch.arange(scores.shape[1] - 1, -1, -1)
    return ((ordered.long() << 32) + lower_first).topk(k, 1).indices


@route.impl("cpu", "torch", contract=1)
def routed(
    logits: Tensor, bias: Tensor | None = None, *, topk: int, groups: int = 1,
    topk_groups: int = 1, scale: float = 1.0, score: str = "sigmoid", normalize: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    picking = scores if bias is None else scores + bias
    if topk_groups < groups:
        grouped = picking.view(logits.shape[0], groups, -1)
        if bias is None or grouped.shape[2] == 1:
            best = grouped.amax(-1)
        else:
            best = grouped.topk(2, -1).values.sum(-1)
        dropped = torch.ones(best.shape, dtype=torch.bool)
        dropped.scatter_(1, _best(best, topk_groups), False)
        picking = grouped.masked_fill(dropped[..., None], -torch.inf).view(picking.shape)
    ids = _best(picking, topk)
    weights = scores.gather(1, ids)
    if normalize and score == "sigmoid":
        weights /= weights.sum(-1, keepdim=True).add_(1e-20)
    return ids.int(), weights.mul_(scale)
