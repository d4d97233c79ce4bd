"""indexer_topk where scores are many: of most tiles of keys only what may be among a row's best is
kept, so that scores are neither written nor read again.

A sixteenth of the tiles is scored first. From these a floor is guessed for each row, which somewhat
more than topk of its scores should reach; when the others are scored, what reaches it goes into
lists. The selection cuts the lists. Where a guess was wrong, or a list full, the row's block of
queries is scored and selected again as a whole: the kernels for that are launched at all times, and
end at once where there is no such block, since the host does not wait to be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _nvrtc, topk
from dsa_hal.backends.cuda.indexer_logits import COLUMNS, KEYS, PROCESSORS, launch
from dsa_hal.ops.index_select import rows_within

EVERY, DRAWN = 16, 8
"""One tile of so many is of the sample, and which: as in `_kernels/indexer_guess.cuh`."""

TAKEN = 512
"""Entries of a row's list of its sample: twice what should reach a floor where topk is 2048."""

LEAST_CONTEXT, MOST_CONTEXT = 16384, 131072
"""Keys from which a sample is large enough, and up to which a block holds that of a row."""

MOST_TOPK = 2048

THREADS, CAP, RESIDENT = 256, 2048, 4
"""Of a block of the selection; the entries in whose room it has a bit for each key; blocks on a
processor."""

SHARED = topk.HEADER + topk.ENTRY * CAP
"""Bytes of shared memory of a block."""

Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""What indexer_topk scores: q, k, k_scale, weights, ks, ke."""


@dataclass(frozen=True)
class Plan:
    """whole    queries of which a sample is scored at a time
    rows     of these whose lists exist at a time; both are multiples of 16
    entries  of a list
    sample   columns of a row's sample
    """

    whole: int
    rows: int
    entries: int
    sample: int

    def floats(self) -> int:
        """Scores that exist at a time, at most."""
        return self.whole * TAKEN + max(self.whole * self.sample, self.rows * self.entries * KEYS)


def plan(tokens: int, context: int, heads: int, k: int, budget: int) -> Plan | None:
    """How to go about it within `budget` MiB of scores; None where it does not pay: fewer blocks of
    queries at a time than processors, or so few keys that a row's lists would be as long."""
    if not tokens or not LEAST_CONTEXT <= context <= MOST_CONTEXT or k > MOST_TOPK:
        return None
    kept = k + 4 * (EVERY * k) ** 0.5 + 8 * EVERY  # that reach a row's floor, by guess
    entries = -(-int(1.6 * kept / KEYS + 12) // 4) * 4
    tiles = -(-context // KEYS)
    sample = (tiles + EVERY - 1 - DRAWN) // EVERY * KEYS
    whole = _even(tokens, rows_within(budget, sample + TAKEN))
    room = (budget << 18) - whole * TAKEN
    rows = _even(whole, room // (entries * KEYS))
    if rows * heads // COLUMNS < PROCESSORS * 31 // 32:
        return None
    return Plan(whole, rows, entries, sample)


def _even(count: int, most: int) -> int:
    """The size of as few equal parts of `count` as possible, a multiple of 16 not above `most`."""
    most = most // 16 * 16
    return -(-count // -(-count // most) // 16) * 16 if count and most else 0


def select(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, out: Tensor,
    plan: Plan, budget: int,
) -> None:  # fmt: skip
    """Select into `out` [tokens, topk] int32, dense."""
    ks, ke = (t if t.stride(0) == 1 else t.contiguous() for t in (ks, ke))
    (tokens, heads, _), device = q.shape, q.device
    blocks = -(-tokens * heads // COLUMNS)
    flags = torch.zeros(1 + 2 * blocks, dtype=torch.int32, device=device)
    chosen, marks = flags[: 1 + blocks], flags[1 + blocks :]
    sizes = (2,), (TAKEN, 2), (2, KEYS), ()
    small = [torch.empty(plan.whole, *s, dtype=torch.int32, device=device) for s in sizes]
    for at in range(0, tokens, plan.whole):
        some = slice(at, min(at + plan.whole, tokens))
        part = (q[some], k, k_scale, weights[some], ks[some], ke[some])
        # What begins early follows a kernel; the flags may have been cleared without one.
        _guess(part, small, plan, out.shape[1], overlap=at > 0)
        lists = torch.empty(plan.rows, plan.entries * KEYS, 2, dtype=torch.int32, device=device)
        for first in range(0, some.stop - at, plan.rows):
            own = slice(at + first, min(at + first + plan.rows, some.stop))
            part = (q[own], k, k_scale, weights[own], ks[own], ke[own])
            rest = [t[first : first + plan.rows] for t in small]
            _keep(part, rest, lists, marks, chosen, out, plan, own.start)
        del lists  # before the next sample exists
    _again((q, k, k_scale, weights, ks, ke), chosen, out, budget)


def _module(plan: Plan) -> _nvrtc.Module:
    defines = (
        ("THREADS", THREADS), ("PER", 16), ("RESIDENT", RESIDENT), ("CAP", CAP), ("BYTES", SHARED),
        ("OWNED", -(-plan.sample // (4 * THREADS)) * 4), ("LIST", plan.entries), ("TAKEN", TAKEN),
    )  # fmt: skip
    return _nvrtc.module("indexer_best.cu", defines)


def _guess(part: Part, small: Sequence[Tensor], plan: Plan, count: int, *, overlap: bool) -> None:
    """Floors of some rows, from their sample."""
    q, k, _, _, ks, ke = part
    rows, context = q.shape[0], k.shape[0]
    sample = torch.empty(rows, plan.sample, dtype=torch.float32, device=q.device)
    launch(*part, sample, part=1, overlap=overlap)
    _module(plan).launch(
        "guess", (rows,), (THREADS,), (sample, ks, ke, *small, plan.sample, context, count),
        shared=SHARED, overlap=True,
    )  # fmt: skip


def _keep(
    part: Part, small: Sequence[Tensor], lists: Tensor, marks: Tensor,
    chosen: Tensor, out: Tensor, plan: Plan, at: int,
) -> None:  # fmt: skip
    """Select for rows whose floors are known, from number `at` on."""
    (rows, heads, _), context = part[0].shape, part[1].shape[0]
    guesses, _, counts, lost = small
    kept = (guesses, counts, lost)
    launch(*part, lists, part=2, entries=plan.entries, kept=kept, overlap=True)
    _module(plan).launch(
        "best", (rows,), (THREADS,),
        (lists, *small, marks, chosen, out, at, COLUMNS // heads, context, out.shape[1]),
        shared=SHARED, overlap=True,
    )  # fmt: skip


def _again(part: Part, chosen: Tensor, out: Tensor, budget: int) -> None:
    """Score and select the blocks of queries that were chosen, as many at a time as fit."""
    (tokens, heads, _), context = part[0].shape, part[1].shape[0]
    *_, ks, ke = part
    group, width = COLUMNS // heads, -(-context // 4) * 4
    blocks = -(-tokens // group)
    most = min(blocks, max(1, rows_within(budget, width) // group))
    room = torch.empty(most * group, width, dtype=torch.float32, device=out.device)
    scores = room[:, :context]
    for at in range(0, blocks, most):
        launch(*part, scores, chosen=chosen, at=at, most=most, overlap=True)
        topk.run(scores, out.shape[1], ks, ke, out, chosen=chosen, at=at, group=group, overlap=True)
