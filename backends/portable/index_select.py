"""Scores and selection of some rows at a time, so that a bounded workspace holds the scores."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsa_hal.ops.index_select import rows_within

GROUP = 16
"""Rows of the workspace begin at multiples of so many scores, which are read in vectors."""


class Ragged(Protocol):
    """Scores of some queries into `out` [tokens, context] fp32, as `indexer_logits`; what lies
    outside a row's range may stay as it is."""

    def __call__(
        self, out: Tensor, q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor,
        ke: Tensor,
    ) -> None: ...  # fmt: skip


class Paged(Protocol):
    """Scores of some requests into `out` [batch * next_n, context] fp32, as `indexer_logits_paged`;
    what lies beyond a limit may stay as it is."""

    def __call__(
        self, out: Tensor, q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor,
        block_table: Tensor, layout: str,
    ) -> None: ...  # fmt: skip


class Select(Protocol):
    """`topk` into `out` [rows, k] int32 with dense rows."""

    def __call__(
        self, out: Tensor, logits: Tensor, k: int, starts: Tensor | None, ends: Tensor | None
    ) -> None: ...


def ragged(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    logits_mb: int, scores: Ragged, select: Select,
) -> Tensor:  # fmt: skip
    """`indexer_topk`: rows in chunks, whose scores go into one workspace of `logits_mb` MiB from
    which the best are selected before the next chunk's overwrite them."""
    tokens, context = q.shape[0], k.shape[0]
    out = torch.empty(tokens, topk, dtype=torch.int32, device=q.device)
    width = -(-context // GROUP) * GROUP
    step = min(tokens, rows_within(logits_mb, width))
    workspace = torch.empty(step, width, dtype=torch.float32, device=q.device)
    for at in range(0, tokens, max(1, step)):
        some = slice(at, min(at + step, tokens))
        found = workspace[: some.stop - at, :context]
        scores(found, q[some], k, k_scale, weights[some], ks[some], ke[some])
        select(out[some], found, topk, ks[some], ke[some])
    return out


def paged(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, logits_mb: int, scores: Paged, select: Select,
) -> Tensor:  # fmt: skip
    """`indexer_topk_paged`: requests in chunks, as in `ragged`."""
    batch, next_n = q.shape[:2]
    out = torch.empty(batch * next_n, topk, dtype=torch.int32, device=q.device)
    width = -(-max_context_len // GROUP) * GROUP
    step = min(batch, rows_within(logits_mb, next_n * width))
    workspace = torch.empty(step * next_n, width, dtype=torch.float32, device=q.device)
    for at in range(0, batch, max(1, step)):
        some = slice(at, min(at + step, batch))
        rows = slice(at * next_n, some.stop * next_n)
        found = workspace[: rows.stop - rows.start, :max_context_len]
        lens = context_lens[some]
        scores(found, q[some], pages, weights[rows], lens, block_table[some], layout)
        select(out[rows], found, topk, None, lens.reshape(-1))
    return out
