"""How much of dense attention the selected keys hold.

A layer's dense probabilities, the mean over its heads, are what its indexer is trained to rank keys
by. What they give to the selected keys is compared with what they give to the latest keys, which
need no indexer, and to the best choice of as many, which no selection exceeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.model.quality.perplexity import Advance
from dsa_hal.model.transformer import Transformer

ROWS = 256
"""Queries whose probabilities exist at a time."""


@dataclass(frozen=True)
class Mass:
    """Shares of the dense attention mass, 0 to 1, that index_topk keys of a query hold."""

    selected: float
    recent: float
    best: float


@dataclass(frozen=True)
class Recall:
    """Means over all queries that see more than `topk` keys: of each layer, and of all."""

    topk: int
    queries: int
    layers: tuple[Mass, ...]
    whole: Mass


def recall(
    model: Transformer, windows: Sequence[Tensor], *, advance: Advance | None = None
) -> Recall:
    """Of the model as it runs: the queries and keys that its own sparse attention leads to, in
    every layer. `windows`: int64 [tokens] each."""
    topk = model.config.index_topk
    if not windows or max(map(len, windows)) <= topk:
        raise BadInput(f"no window is longer than the {topk} keys that the model selects")
    sums = torch.zeros(model.config.num_hidden_layers, 3, dtype=torch.float64)
    with _listening(model, sums):
        for window in windows:
            cache, contexts = model.new_cache([len(window)])
            for step, _ in model.prefill(cache, contexts, [model.checked(window)]):
                if advance is not None:
                    advance(sum(piece.stop - piece.start for piece in step))
    queries = sum(max(0, len(window) - topk) for window in windows)
    shares = (sums / queries).tolist()
    whole = (sums.mean(0) / queries).tolist()
    return Recall(topk, queries, tuple(Mass(*row) for row in shares), Mass(*whole))


@contextmanager
def _listening(model: Transformer, sums: Tensor) -> Iterator[None]:
    """Within the block, prefill adds each layer's masses to `sums` [layers, 3].

    The form with keys per head is asked for, because its op receives all that is needed. It is
    called once per layer, in order.
    """
    ops, form = model.attention_ops, model.form
    own, calls = ops.mha_prefill, 0

    def mha_prefill(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, ke: Tensor, indices: Tensor | None = None, *,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        nonlocal calls
        if indices is not None:
            found = masses(q, k, ks, ke, indices, softmax_scale=softmax_scale)
            sums[calls % len(sums)] += found.cpu().double().sum(0)
        calls += 1
        return own(q, k, v, ks, ke, indices, softmax_scale=softmax_scale)

    try:
        ops.mha_prefill, model.form = mha_prefill, "mha"
        yield
    finally:
        ops.mha_prefill, model.form = own, form


def masses(
    q: Tensor, k: Tensor, ks: Tensor, ke: Tensor, indices: Tensor, *, softmax_scale: float
) -> Tensor:
    """Shares of each query's dense attention, the mean over heads, that are held by the keys
    selected, by the latest, and by the best: fp32 [queries, 3]. Queries that see no more than topk
    keys are left out, since they need no selection.

    q        [tokens, heads, dim]
    k        [context, heads, dim]
    ks, ke   [tokens] int32: query t sees keys ks[t] <= i < ke[t]
    indices  [tokens, topk] int32 rows of k, -1 = no key
    """
    topk = indices.shape[1]
    wide = (ke - ks > topk).nonzero()[:, 0]
    parts = [q.new_zeros(0, 3, dtype=torch.float32)]
    for rows in wide.split(ROWS):
        first, last = int(ks[rows].min()), int(ke[rows].max())
        start, end = ks[rows, None] - first, ke[rows, None] - first
        p = _dense(q[rows], k[first:last], start, end, softmax_scale)
        column = torch.arange(last - first, device=q.device)
        named = indices[rows] - first
        named = torch.where(named < 0, last - first, named).long()
        chosen = torch.zeros(len(rows), last - first + 1, dtype=torch.bool, device=q.device)
        chosen = chosen.scatter_(1, named, True)[:, :-1]
        selected, latest = (p * chosen).sum(1), (p * (column >= end - topk)).sum(1)
        parts.append(torch.stack([selected, latest, p.topk(topk).values.sum(1)], 1))
    return torch.cat(parts)


def _dense(q: Tensor, k: Tensor, start: Tensor, end: Tensor, softmax_scale: float) -> Tensor:
    """Head-mean attention probabilities fp32 [n, context] of q [n, heads, dim] over keys
    [context, heads, dim], of which each query sees start <= i < end, both [n, 1]."""
    column = torch.arange(k.shape[0], device=k.device)
    hidden = (column < start) | (column >= end)
    heads = q.shape[1]
    total = torch.zeros(q.shape[0], k.shape[0], device=q.device)
    for head in range(heads):
        scores = (q[:, head].float() * softmax_scale) @ k[:, head].float().T
        total += scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    return total / heads
