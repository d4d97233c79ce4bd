"""The indexer's loss and gradients in Triton: which tiles, and the launches of the steps, for every
backend that has Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space
from dsa_hal.backends.portable.ordered import collected, folded, keys_of
from dsa_hal.backends.portable.rows import FLOATS, dense, power_of_two

WIDEST = 256
"""Columns of q_index that a program holds."""

WORKSPACE = 512 << 20
"""Bytes of what the steps hand on: queries are taken some at a time, as many as fit."""

PARTS = 1024
"""Programs that `push` is cut into at least, if there are queries enough."""


@dataclass(frozen=True)
class Tile(Launched):
    """One program's work: `heads` (rows of several queries, where keys are not picked) by `keys` at
    a time, by `columns` at a time in `attend`, its warps, and stages under way at once."""

    heads: int
    keys: int
    columns: int
    warps: int
    stages: int


def legal(*, heads: int, width: int, bytes: int) -> Sequence[Tile]:
    """Tiles that 64 KB of shared memory hold, for so many heads, columns of a query, and bytes of
    an element."""
    return [Tile(16 if heads <= 16 else 32, 32, 32, 4, 1)]


SPACES = {
    step: Space(f"indexer_kl/triton:{step}", Tile, legal)
    for step in ("attend", "score", "pull", "push")
}


def why_not(q_index: Tensor, q: Tensor) -> str | None:
    """What the programs cannot do, or None."""
    for name, t in (("q_index", q_index), ("q", q)):
        if t.dtype not in FLOATS:
            return f"{name} is {t.dtype}; it takes bfloat16, float16 and float32"
    if q_index.shape[2] > WIDEST:
        return f"q_index has {q_index.shape[2]} columns; it takes up to {WIDEST}"
    return None


def divergence(
    q_index: Tensor, k_index: Tensor, weights: Tensor, q: Tensor, kv: Tensor, ks: Tensor | None,
    ke: Tensor | None, indices: Tensor | None, row_weight: Tensor | None, *, softmax_scale: float,
    repeats: bool, precision: str, workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`indexer_kl`.

    repeats    gradients of selected keys are summed in the queries' order, as those of ranges
               always are, so that calls repeat; else atomically
    precision  how fp32 is multiplied, one of `tl.dot`'s `input_precision`
    """
    from dsa_hal.backends.portable._kernels import indexer_kl as kernels

    (tokens, heads, dim), context, here = q_index.shape, k_index.shape[0], q_index.device
    picked, k = indices is not None, context if indices is None else indices.shape[1]
    loss, dweights = torch.zeros(tokens, device=here), torch.zeros(tokens, heads, device=here)
    dq_index = torch.zeros(q_index.shape, device=here)
    dk_index = torch.zeros(k_index.shape, device=here)
    if not tokens or not k or not context:
        return loss, dq_index, dk_index, dweights
    q_index, k_index, weights, q, kv = (dense(t) for t in (q_index, k_index, weights, q, kv))
    ks, ke, indices, row_weight = (
        None if t is None else dense(t) for t in (ks, ke, indices, row_weight)
    )
    index_row = 0 if indices is None else indices.stride(0)
    strides = q_index.stride(0), q_index.stride(1), k_index.stride(0), weights.stride(0)
    score, pull, push = (
        SPACES[step].pick(heads=heads, width=dim, bytes=q_index.element_size())
        for step in ("score", "pull", "push")
    )
    score_blocks, pull_blocks = -(-heads // score.heads), -(-heads // pull.heads)
    most = max(1, min(tokens, workspace // (4 * k * (1 + score_blocks))))
    share = torch.empty(most, k, device=here)
    scores = torch.empty(score_blocks, most, k, device=here)
    some, rows, named = most, dk_index, None
    if indices is not None and repeats:
        named = keys_of(indices, None, context)
        some = max(1, min(most, workspace // (4 * k * pull_blocks * dim)))
        rows = torch.empty(some, pull_blocks, k, dim, device=here)

    common: dict[str, Any] = dict(
        WIDTH=dim, WIDTH_BLOCK=max(16, power_of_two(dim)), PRECISION=precision
    )
    for first in range(0, tokens, most):
        count = min(most, tokens - first)
        _targets(
            q, kv, ks, ke, indices, share[:count], first, softmax_scale=softmax_scale,
            precision=precision, workspace=workspace,
        )  # fmt: skip
        kernels.score[(count * score_blocks,)](
            q_index, k_index, weights, ks, ke, indices, scores, *strides, index_row,
            scores.stride(0), first, count, context, heads, k, PICKED=picked,
            HEADS_BLOCK=score.heads, KEYS_BLOCK=score.keys, **common, **score.options,
        )  # fmt: skip
        kernels.compare[(count,)](
            share, scores, ks, ke, indices, loss, scores.stride(0), score_blocks, index_row, first,
            context, k, PICKED=picked, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        for at in range(first, first + count, some):
            few = min(some, first + count - at)
            kernels.pull[(few * pull_blocks,)](
                q_index, k_index, weights, ks, ke, indices, row_weight, share[at - first :],
                dq_index, dweights, rows, *strides, index_row, at, few, context, heads, k,
                PICKED=picked, ADDED=not repeats, HEADS_BLOCK=pull.heads, KEYS_BLOCK=pull.keys,
                **common, **pull.options,
            )  # fmt: skip
            if named is not None:
                collected(rows[:few], named[at : at + few], dk_index)
        if picked:
            continue
        key_blocks = -(-context // push.keys)
        pieces = torch.empty(min(count, -(-PARTS // key_blocks)), *k_index.shape, device=here)
        bounds = torch.empty(key_blocks, 2, dtype=torch.int32, device=here)
        kernels.reach[(key_blocks,)](
            ks, ke, bounds, first, count, context, KEYS_BLOCK=push.keys, BLOCK=1024, num_warps=4
        )
        kernels.push[key_blocks, len(pieces)](
            q_index, k_index, weights, ks, ke, row_weight, share, bounds, pieces, *strides, first,
            context, heads, HEADS_BLOCK=push.heads, KEYS_BLOCK=push.keys, **common, **push.options,
        )  # fmt: skip
        folded(pieces, dk_index)
    return loss, dq_index, dk_index, dweights


def _targets(
    q: Tensor, kv: Tensor, ks: Tensor | None, ke: Tensor | None, indices: Tensor | None,
    share: Tensor, first: int, *, softmax_scale: float, precision: str, workspace: int,
) -> None:  # fmt: skip
    """The target of queries from `first` to share [queries, k] fp32."""
    from dsa_hal.backends.portable._kernels import shares
    from dsa_hal.backends.portable._kernels.indexer_kl import mix

    (_, heads, dim), context, (tokens, k) = q.shape, kv.shape[0], share.shape
    picked, index_row = indices is not None, 0 if indices is None else indices.stride(0)
    alone = picked or heads >= 64  # few heads share a program with those of other queries
    tile = SPACES["attend"].pick(
        heads=heads if alone else min(64, tokens * heads), width=dim, bytes=q.element_size()
    )
    half, tiles = q.element_size() == 2, -(-k // tile.keys)
    most = max(1, min(tokens, workspace // (heads * k * (2 if half else 4))))
    if not alone:  # whole blocks of rows
        most = max(most // tile.heads * tile.heads, min(tile.heads, tokens))
    kind = torch.float16 if half else torch.float32
    parts = torch.empty(most, heads, k, dtype=kind, device=q.device)
    peaks, totals = (torch.empty(most, tiles, heads, device=q.device) for _ in range(2))
    spread: dict[str, Any] = dict(
        PICKED=picked, HEADS_BLOCK=16, KEYS_BLOCK=tile.keys, num_warps=4
    )  # fmt: skip
    for start in range(0, tokens, most):
        count, at = min(most, tokens - start), first + start
        blocks = count * -(-heads // tile.heads) if alone else -(-count * heads // tile.heads)
        shares.attend[(blocks * tiles,)](
            q, kv, ks, ke, indices, None, parts, peaks, totals, q.stride(0), q.stride(1),
            kv.stride(0), index_row, at, count, context, heads, k, softmax_scale, PICKED=picked,
            ALONE=alone, WIDTH=dim, ROWS_BLOCK=tile.heads, KEYS_BLOCK=tile.keys,
            COLUMNS_BLOCK=tile.columns, PRECISION=precision, **tile.options,
        )  # fmt: skip
        shares.relate[(count * -(-heads // 16),)](
            ks, ke, peaks, totals, None, None, None, at, context, heads, k,
            TILES_BLOCK=power_of_two(tiles), **spread,
        )  # fmt: skip
        mix[(count * tiles,)](ks, ke, parts, peaks, share[start:], at, context, heads, k, **spread)
