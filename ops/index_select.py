"""The indexer's scores and the selection in one op, so that no backend has to hold all scores:
those of 4096 query tokens against 128K keys are 2 GiB.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, Maker, case
from dsa_hal.check import Check, Report, count, form
from dsa_hal.ops.indexer import (
    indexer_logits,
    indexer_logits_paged,
    paged_cost,
    paged_inputs,
    paged_invalid,
    paged_unread,
    ragged_cost,
    ragged_inputs,
    ragged_invalid,
    ragged_unread,
)
from dsa_hal.ops.select import lower_first, selected, ties_request, ties_wrong
from dsa_hal.ops.select import topk as largest
from dsa_hal.registry import Call, Op, composite

ACHIEVED = 1e-3
"""How far, relative to a row's largest score, a selected score may lie below the k-th one: what two
correct ways to add up a score may differ by. The logits' own bar allows three times that."""


def rows_within(logits_mb: int, columns: int) -> int:
    """Rows of fp32 scores that fit into `logits_mb` MiB, at least one."""
    return max(1, (logits_mb << 20) // max(1, 4 * columns))


def _budget_wrong(topk: int, ties: str, logits_mb: int) -> str | None:
    if logits_mb < 1:
        return f"logits_mb is {logits_mb}; expected at least 1 MiB"
    return ties_wrong(topk, ties)


def scored_by(logits: Op[..., Tensor]) -> Callable[[Inputs], Tensor]:
    """The reference's scores for the inputs of a selection that has those of `logits` as well."""
    others = ("topk", "ties", "logits_mb")
    return lambda inputs: logits.reference(**{n: v for n, v in inputs.items() if n not in others})


def judged(score: Callable[[Inputs], Tensor]) -> Check:
    """Score what was selected with the reference's own scores [rows, columns]. Exact zeros come
    from the ReLU, so they are exact in any order of addition, and the rule for ties can be asked of
    them."""

    def check(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Inputs) -> Report:
        if wrong := count(got, want) or form("out", got[0], want[0]):
            return Report(tuple(wrong))
        columns, scores = got[0], score(inputs)
        scores = torch.where(scores.isnan(), -torch.inf, scores)
        finite = torch.where(scores.isfinite(), scores.abs(), 0)
        slack = finite.amax(-1, keepdim=True) * ACHIEVED if scores.numel() else 0.0
        findings = selected("out", columns, scores, slack)
        if inputs["ties"] == "lower" and all(f.ok for f in findings):
            level = torch.zeros(scores.shape[0], 1, device=scores.device)
            findings.append(lower_first("out", columns, scores, level))
        return Report(tuple(findings))

    return check


# -- indexer_topk -------------------------------------------------------------------------------


def _ragged_inputs(
    make: Maker, *, topk: int, ties: str = "any", logits_mb: int = 64, **axes: Any
) -> Inputs:
    return dict(**ragged_inputs(make, **axes), topk=topk, ties=ties, logits_mb=logits_mb)


def _ragged_cost(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> Cost:  # fmt: skip
    flop, moved = ragged_cost(q, k, k_scale, weights, ks, ke)
    tokens, context = q.shape[0], k.shape[0]
    return Cost(flop, moved + 4.0 * tokens * (topk - context))


def _ragged_invalid(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> str | None:  # fmt: skip
    return ragged_invalid(q, k, k_scale, weights, ks, ke) or _budget_wrong(topk, ties, logits_mb)


def _ragged_requests(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> frozenset[str]:  # fmt: skip
    return ties_request(ties)


def _ragged_asks(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> Sequence[Call]:  # fmt: skip
    return [(indexer_logits, (q, k, k_scale, weights, ks, ke), {})]


def _ragged_unread(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> dict[str, Tensor]:  # fmt: skip
    return ragged_unread(q, k, k_scale, weights, ks, ke)


@composite(
    uses=(indexer_logits, largest),
    asks=_ragged_asks,
    version=1,
    constant=("heads", "dim", "topk", "ties", "kind", "ranges", "values", "logits_mb"),
    variable={"tokens": "q[0]", "context": "k[0]"},
    inputs=_ragged_inputs,
    cases=(
        case("no_tokens", tokens=0, context=64, topk=16),
        case("no_keys", tokens=2, context=0, topk=16),
        case("one", tokens=1, context=1, heads=8, dim=64, topk=64),
        case("k_more", tokens=63, context=65, heads=32, topk=128, traps=(13, 15)),
        case("ragged", tokens=33, context=300, topk=64, ranges="ragged", traps=(15, 21)),
        case("k_odd", tokens=20, context=257, heads=8, topk=37, kind="bf16", ranges="requests",
             traps=(13,)),
        case("int8", tokens=20, context=257, heads=8, topk=37, kind="int8"),
        case("empty", tokens=5, context=70, heads=8, topk=8, ranges="empty"),
        case("plateau", tokens=9, context=400, topk=64, values="plateau"),
        case("plateau_lower", tokens=9, context=400, topk=64, values="plateau", ties="lower",
             traps=(14,)),
        case("chunks", tokens=70, context=8192, heads=8, dim=64, topk=256, logits_mb=1),
        case("one_row_chunks", tokens=3, context=300000, heads=8, dim=64, topk=64, logits_mb=1),
        case("many_ragged", tokens=1100, context=20000, topk=512, ranges="ragged",
             traps=(13, 15)),
        case("decode_8k", model=True, tokens=8, context=8192, topk=2048),
        case("prefill_8k", model=True, tokens=2048, context=8192, topk=2048),
        case("prefill_32k", model=True, tokens=2048, context=32768, topk=2048, logits_mb=256),
        case("long_32k", model=True, tokens=4096, context=32768, topk=2048),
        case("prefill_128k", model=True, tokens=1024, context=131072, topk=2048, logits_mb=256),
    ),
    check=judged(scored_by(indexer_logits)),
    cost=_ragged_cost,
    invalid=_ragged_invalid,
    requests=_ragged_requests,
    unread=_ragged_unread,
)  # fmt: skip
def indexer_topk(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, topk: int, *,
    ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """The keys that each query token attends to: the best `topk` of its range by `indexer_logits`.

    q          [tokens, heads, dim] e4m3, int8 or float, as in `indexer_logits`, like what follows
    k          [context, dim] q's dtype
    k_scale    [context] fp32
    weights    [tokens, heads] fp32
    ks, ke     [tokens] int32, the range of rows that each token may use, ke not included
    topk       1 to 4096
    ties       as in `topk`
    logits_mb  MiB of scores that may exist at a time; a single row is always allowed
    -> out     [tokens, topk] int32 rows of k in any order, then -1

    Source: the paper, section 2.1.
    """
    step = rows_within(logits_mb, k.shape[0])
    parts = []
    for at in range(0, max(1, q.shape[0]), step):
        some = slice(at, at + step)
        logits = indexer_logits(q[some], k, k_scale, weights[some], ks[some], ke[some])
        parts.append(largest(logits, topk, ks[some], ke[some], ties=ties))
        del logits  # before the next chunk's exist
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# -- indexer_topk_paged -------------------------------------------------------------------------


def _paged_inputs(
    make: Maker, *, topk: int, ties: str = "any", logits_mb: int = 64, **axes: Any
) -> Inputs:
    return dict(**paged_inputs(make, **axes), topk=topk, ties=ties, logits_mb=logits_mb)


def _paged_cost(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> Cost:  # fmt: skip
    flop, moved = paged_cost(
        q, pages, weights, context_lens, block_table, layout=layout, max_context_len=max_context_len
    )
    return Cost(flop, moved + 4.0 * weights.shape[0] * (topk - max_context_len))


def _paged_invalid(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> str | None:  # fmt: skip
    return paged_invalid(
        q, pages, weights, context_lens, block_table, layout=layout, max_context_len=max_context_len
    ) or _budget_wrong(topk, ties, logits_mb)


def _paged_requests(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> frozenset[str]:  # fmt: skip
    return ties_request(ties)


def _paged_asks(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> Sequence[Call]:  # fmt: skip
    options = dict(layout=layout, max_context_len=max_context_len)
    return [(indexer_logits_paged, (q, pages, weights, context_lens, block_table), options)]


def _paged_unread(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> dict[str, Tensor]:  # fmt: skip
    return paged_unread(
        q, pages, weights, context_lens, block_table, layout=layout, max_context_len=max_context_len
    )


@composite(
    uses=(indexer_logits_paged, largest),
    asks=_paged_asks,
    version=1,
    constant=("heads", "dim", "next_n", "topk", "ties", "kind", "page_size", "lengths", "values",
              "logits_mb"),
    variable={"batch": "q[0]", "context": "max_context_len"},
    inputs=_paged_inputs,
    cases=(
        case("no_batch", batch=0, next_n=1, context=64, topk=16),
        case("no_context", batch=2, next_n=2, context=0, topk=16),
        case("one", batch=1, next_n=1, context=1, heads=8, dim=64, topk=64, lengths="full"),
        case("k_more", batch=5, next_n=2, context=130, topk=192, traps=(13,)),
        case("page1", batch=3, next_n=1, context=90, heads=8, page_size=1, topk=33),
        case("page16", batch=2, next_n=6, context=129, heads=32, page_size=16, topk=64),
        case("page3", batch=3, next_n=3, context=63, heads=8, page_size=3, topk=7, kind="bf16"),
        case("int8_split", batch=3, next_n=2, context=300, heads=8, page_size=128, topk=64,
             kind="int8_split", traps=(10,)),
        case("plateau_lower", batch=3, next_n=2, context=300, topk=64, values="plateau",
             ties="lower", lengths="full", traps=(14,)),
        case("chunks", batch=9, next_n=2, context=40000, heads=8, dim=64, topk=64, logits_mb=1),
        case("batch_8k", model=True, batch=8, next_n=1, context=8192, topk=2048),
        case("decode_8k", model=True, batch=128, next_n=1, context=8192, topk=2048, lengths="full"),
        case("decode_32k", model=True, batch=64, next_n=1, context=32768, topk=2048,
             lengths="full"),
        case("mtp_32k", model=True, batch=64, next_n=2, context=32768, topk=2048, lengths="full"),
        case("decode_128k", model=True, batch=64, next_n=1, context=131072, topk=2048,
             lengths="full"),
    ),
    check=judged(scored_by(indexer_logits_paged)),
    cost=_paged_cost,
    invalid=_paged_invalid,
    requests=_paged_requests,
    unread=_paged_unread,
)  # fmt: skip
def indexer_topk_paged(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    topk: int, *, layout: str, max_context_len: int, ties: str = "any", logits_mb: int = 64,
) -> Tensor:  # fmt: skip
    """The positions that each query token of a request attends to: the best `topk` below its limit
    by `indexer_logits_paged`.

    q          [batch, next_n, heads, dim] e4m3, int8 or float, as in that op, like what follows
    pages      [pages, page_size, record], as KVLayout says of `layout`
    weights    [batch * next_n, heads] fp32
    context_lens  [batch, next_n] int32, how many positions each query sees
    block_table   [batch, max_pages] int32
    max_context_len  no context_lens is larger
    topk       1 to 4096
    ties       as in `topk`
    logits_mb  MiB of scores that may exist at a time; one request is always allowed
    -> out     [batch * next_n, topk] int32 positions in the request in any order, then -1;
               `to_slots` makes them slots

    Source: the paper, section 2.1.
    """
    batch, next_n = q.shape[:2]
    step = rows_within(logits_mb, next_n * max_context_len)
    parts = []
    for at in range(0, max(1, batch), step):
        some, rows = slice(at, at + step), slice(at * next_n, (at + step) * next_n)
        logits = indexer_logits_paged(
            q[some], pages, weights[rows], context_lens[some], block_table[some],
            layout=layout, max_context_len=max_context_len,
        )  # fmt: skip
        limits = context_lens[some].reshape(-1)
        parts.append(largest(logits, topk, None, limits, ties=ties))
        del logits  # before the next chunk's exist
    return parts[0] if len(parts) == 1 else torch.cat(parts)
