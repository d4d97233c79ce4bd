"""A regulariser of dense attention: few keys shall hold its mass, and not only the latest ones.

A large model's heads give what they do not need to the first token, so that few keys matter and
most of them are far away. A model of four layers trained for minutes has not come to that: its
first layer spreads its attention evenly. Towards the end of dense training this teaches it the
habit, which costs it next to nothing, and without which there is little for an indexer to find.
"""

from __future__ import annotations

import torch
from torch import Tensor

HELD_BY_BEST, HELD_BY_LATEST = 0.97, 0.35
"""Shares of the attention mass, over all layers, up to which the best index_topk keys are asked for
more and down to which the latest are asked for less."""

_QUERIES = 64
"""Positions per window at which the mass is looked at."""


def held(q: Tensor, k: Tensor, topk: int, scale: float) -> Tensor:
    """q, k [batch, length, heads, dim] -> [2] fp32: the mass of the best and of the latest `topk`
    keys, by the mean of the heads, over queries that see more than `topk` < length."""
    length = q.shape[1]
    at = torch.linspace(topk, length - 1, _QUERIES, device=q.device).long()
    keys = torch.arange(length, device=q.device)
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, at], k).float() * scale
    scores = scores.masked_fill(keys > at[:, None], -torch.inf)
    mean = scores.softmax(-1).mean(1)
    best = mean.topk(topk, -1).values.sum(-1).mean()
    latest = (mean * (keys > at[:, None] - topk)).sum(-1).mean()
    return torch.stack([best, latest])


def penalty(held: Tensor) -> Tensor:
    """What the mean masses over the layers lack."""
    best, latest = held
    lacking: Tensor = (HELD_BY_BEST - best).clamp_min(0) + (latest - HELD_BY_LATEST).clamp_min(0)
    return lacking
