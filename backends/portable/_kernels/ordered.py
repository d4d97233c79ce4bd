"""Sums of rows that queries made for the keys they selected, in the order of the queries, which
adding atomically would leave to chance."""

import triton
import triton.language as tl


@triton.jit
def collect(
    rows, order, starts, sums, k, pieces, WIDTH: tl.constexpr, ROWS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to sums [context, WIDTH] fp32 the rows [tokens, pieces, k, WIDTH] fp32 of each key:
    order [tokens * k] names a token's entries key by key, those of a key from starts [context + 1]
    on. Grid: (context, blocks of columns)."""
    key = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_BLOCK + tl.arange(0, COLUMNS_BLOCK)
    inside = column < WIDTH
    total = tl.zeros([ROWS_BLOCK, COLUMNS_BLOCK], tl.float32)
    end = tl.load(starts + key + 1)
    for start in range(tl.load(starts + key), end, ROWS_BLOCK):
        at = start + tl.arange(0, ROWS_BLOCK)
        entry = tl.load(order + at, mask=at < end, other=0)
        row = entry // k * pieces * k + entry % k
        for piece in range(0, pieces):
            total += tl.load(
                rows + (row + piece * k)[:, None] * WIDTH + column[None],
                mask=(at < end)[:, None] & inside[None], other=0.0,
            )  # fmt: skip
    to = sums + key * WIDTH + column
    tl.store(to, tl.load(to, mask=inside, other=0.0) + tl.sum(total, 0), mask=inside)


@triton.jit
def fold(parts, sums, pieces, count, BLOCK: tl.constexpr):
    """Adds parts [pieces, count] to sums [count]. Grid: blocks of BLOCK."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sums + at, mask=at < count, other=0.0)
    for _ in range(0, pieces):
        total += tl.load(parts + at, mask=at < count, other=0.0)
        parts += count
    tl.store(sums + at, total, mask=at < count)
