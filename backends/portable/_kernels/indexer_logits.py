"""The indexer's scores in Triton: a tile of keys against one query's heads at a time."""

import triton
import triton.language as tl

from dsa_hal.backends.portable._kernels.fp8 import spoken, understood


@triton.jit
def _against(
    keys, Q, q_head, W, live, heads,
    DIM: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """sum over heads of ReLU(<q, key>) * weight: keys [BN, BD], `spoken`, -> [BN] fp32. Where not
    `live`, neither q nor weights are read."""
    column = tl.arange(0, BD)
    total = tl.zeros([BN], tl.float32)
    for block in tl.static_range(HEAD_BLOCKS):
        head = block * BH + tl.arange(0, BH)
        there = (head < heads) & live
        at = Q + head[:, None].to(tl.int64) * q_head + column[None, :]
        q = tl.load(at, mask=there[:, None] & (column < DIM)[None, :], other=0.0)
        weight = tl.load(W + head, mask=there, other=0.0)
        products = tl.dot(keys, tl.trans(spoken(q, FNUZ)), input_precision="ieee")
        products = understood(products, q, FNUZ)
        total += tl.sum(tl.maximum(products, 0.0) * weight[None, :], 1)
    return total


@triton.jit
def ragged(
    Q, K, SCALE, W, STARTS, ENDS, OUT, q_row, q_head, k_row, w_row, out_row, rows, context, heads,
    DIM: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """Program (i, j): BM rows from i * BM against BN keys from j * BN; K is read once, and not at
    all where no row's range meets the tile."""
    first, left = tl.program_id(0) * BM, tl.program_id(1) * BN
    first64, row = first.to(tl.int64), first + tl.arange(0, BM)
    starts = tl.load(STARTS + row, mask=row < rows, other=context)
    ends = tl.load(ENDS + row, mask=row < rows, other=0)
    starts, ends = tl.maximum(starts, 0), tl.minimum(ends, context)
    some = starts < ends
    lowest = tl.min(tl.where(some, starts, context))
    highest = tl.max(tl.where(some, ends, 0))
    key, column = left + tl.arange(0, BN), tl.arange(0, BD)
    inside = (key >= lowest) & (key < highest)
    last = tl.minimum(first + BM, rows)
    if (lowest < left + BN) & (highest > left):
        at = K + key[:, None].to(tl.int64) * k_row + column[None, :]
        keys = tl.load(at, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)
        keys = spoken(keys, FNUZ)
        scale = tl.load(SCALE + key, mask=inside, other=0.0)
        for r in range(first, last):
            start, end = tl.load(STARTS + r), tl.load(ENDS + r)
            wide = first64 + (r - first)
            found = _against(
                keys, Q + wide * q_row, q_head, W + wide * w_row, end > start, heads,
                DIM, BD, BH, BN, HEAD_BLOCKS, FNUZ,
            )  # fmt: skip
            found = tl.where((key >= start) & (key < end), found * scale, float("-inf"))
            tl.store(OUT + wide * out_row + key, found, mask=key < context)
    else:
        for r in range(first, last):
            nothing = tl.full([BN], float("-inf"), tl.float32)
            at = OUT + (first64 + (r - first)) * out_row + key
            tl.store(at, nothing, mask=key < context)


@triton.jit
def paged(
    Q, K, SCALE, W, LIMITS, TABLE, OUT, q_batch, q_query, q_head, k_page, k_token, s_page, s_token,
    w_row, limits_batch, table_batch, out_row, next_n, context, heads, page_size, pages,
    DIM: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, BQ: tl.constexpr, SCALED: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """Program (i, j): request i's query tokens against its BN positions from j * BN. BQ is a power
    of two >= next_n."""
    batch, left = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN
    position, column = left + tl.arange(0, BN), tl.arange(0, BD)
    query = tl.arange(0, BQ)
    limits = tl.load(LIMITS + batch * limits_batch + query, mask=query < next_n, other=0)
    longest = tl.minimum(tl.max(limits), context)
    inside = position < longest
    page = tl.load(TABLE + batch * table_batch + position // page_size, mask=inside, other=0)
    # a page outside the pool is undefined; here its keys are another page's
    page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
    token = (position % page_size).to(tl.int64)
    at = K + (page * k_page + token * k_token)[:, None] + column[None, :]
    keys = tl.load(at, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)
    keys = spoken(keys, FNUZ)
    for n in range(next_n):
        limit = tl.minimum(tl.load(LIMITS + batch * limits_batch + n), context)
        row = batch * next_n + n
        live = limit > left
        found = _against(
            keys, Q + batch * q_batch + n * q_query, q_head, W + row * w_row, live,
            heads, DIM, BD, BH, BN, HEAD_BLOCKS, FNUZ,
        )  # fmt: skip
        if SCALED:
            found *= tl.load(SCALE + page * s_page + token * s_token, mask=inside, other=0.0)
        found = tl.where(position < limit, found, float("-inf"))
        tl.store(OUT + row * out_row + position, found, mask=position < context)
