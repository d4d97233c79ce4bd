"""Partial results of attention over parts of a row's keys become the row's result."""

import triton
import triton.language as tl


@triton.jit
def combine(
    PART, PART_LSE, SPLITS, SINK, OUT, LSE, heads, next_n, splits,
    DV: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr,
    HAS_SINK: tl.constexpr, PLANNED: tl.constexpr,
):  # fmt: skip
    """Grid [rows, heads]. PART [pieces, heads, DV] fp32, each piece normalised by its own keys;
    PART_LSE [pieces, heads] fp32, natural, -inf for a piece without keys. A row has `splits`
    pieces, or, PLANNED, those from SPLITS[row] to SPLITS[row + 1], of which a single one has
    already been written as the result. SINK [heads] fp32, OUT [rows, heads, DV],
    LSE [rows / next_n, heads, next_n]."""
    row, head = tl.program_id(0), tl.program_id(1)
    if PLANNED:
        first = tl.load(SPLITS + row)
        count = tl.load(SPLITS + row + 1) - first
    else:
        first, count = row * splits, splits
    if PLANNED and count <= 1:
        return
    cv, cp = tl.arange(0, BV), tl.arange(0, BP)
    most = float("-inf")
    total = 0.0
    for at in range(0, count, BP):
        some = tl.load(
            PART_LSE + (first + at + cp).to(tl.int64) * heads + head,
            mask=at + cp < count, other=float("-inf"),
        )  # fmt: skip
        now = tl.maximum(most, tl.max(some, 0))
        reference = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(most - reference) + tl.sum(tl.exp(some - reference), 0)
        most = now
    empty = total == 0
    lse = tl.where(empty, float("inf"), most + tl.log(total))
    acc = tl.zeros([BV], tl.float32)
    for at in range(0, count, BP):
        place = (first + at + cp).to(tl.int64) * heads + head
        some = tl.load(PART_LSE + place, mask=at + cp < count, other=float("-inf"))
        weight = tl.exp(some - lse)
        # a piece without keys was not written
        part = tl.load(
            PART + place[:, None] * DV + cv[None, :],
            mask=(weight > 0)[:, None] & (cv < DV)[None, :], other=0,
        )  # fmt: skip
        acc += tl.sum(part * weight[:, None], 0)
    if HAS_SINK:
        acc *= tl.where(empty, 0.0, 1 / (1 + tl.exp(tl.load(SINK + head) - lse)))
    to = OUT + (row.to(tl.int64) * heads + head) * DV
    tl.store(to + cv, acc.to(OUT.dtype.element_ty), mask=cv < DV)
    tl.store(LSE + ((row // next_n).to(tl.int64) * heads + head) * next_n + row % next_n, lse)
