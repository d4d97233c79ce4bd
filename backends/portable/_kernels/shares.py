"""Attention in steps, a tile of keys at a time, in Triton: what each head's softmax gives each
key. A query's keys are the rows of kv that its row of `indices` names, or all from `ks` to `ke`;
its place `at` counts entries of that row, or rows of kv. Steps take `tokens` from `first_token`;
what they hand on begins there, inputs and results hold all tokens.
"""

import triton
import triton.language as tl


@triton.jit
def span(ks, ke, token, context, k, PICKED: tl.constexpr):
    """The first place of a query and the one behind its last."""
    if PICKED:
        return 0, k
    else:
        first = tl.maximum(tl.load(ks + token), 0)
        return first, tl.maximum(tl.minimum(tl.load(ke + token), context), first)


@triton.jit
def named(indices, listed, at, end, context, PICKED: tl.constexpr):
    """The rows of the keys' arrays at places `at`, and which of them are keys; a query's row of
    indices starts at `listed`."""
    if PICKED:
        row = tl.load(indices + listed + at, mask=at < end, other=-1)
        return row, (row >= 0) & (row < context)
    else:
        return at, at < end


@triton.jit
def columns_of(rows, column, live, WIDTH: tl.constexpr):
    """Columns of rows, [rows, columns]; 0 where there is none."""
    mask = live[:, None] & (column < WIDTH)[None]
    return tl.load(rows[:, None] + column[None], mask=mask, other=0.0)


@triton.jit
def attend(
    q, kv, ks, ke, indices, lengths, parts, peaks, totals, q_token, q_head, kv_row, index_row,
    first_token, tokens, context, heads, k, scale,
    PICKED: tl.constexpr, ALONE: tl.constexpr, WIDTH: tl.constexpr, ROWS_BLOCK: tl.constexpr,
    KEYS_BLOCK: tl.constexpr, COLUMNS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax of scale * q . kv over a query's keys, each tile for itself: parts [tokens,
    heads, k] relative to the tile's peak, peaks (in base 2) and totals [tokens, tiles, heads] fp32.

    q [all tokens, heads, WIDTH], kv [context, WIDTH], indices [all tokens, k], of which the first
    lengths [all tokens] count, or None: all; without indices, k is `context`. A program takes heads
    of one query ALONE, as it must where keys are PICKED, or heads of queries that follow each
    other; tiles of a range that none of them sees are not written. Grid: blocks of rows times
    tiles, those of the same keys side by side if ALONE, else those of the same rows."""
    log2e: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(k, KEYS_BLOCK)
    if ALONE:
        blocks = tl.cdiv(heads, ROWS_BLOCK)
        tile = tl.program_id(0) // blocks % tiles
        place = tl.program_id(0) // (blocks * tiles)
        head = tl.program_id(0) % blocks * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
        mine = head < heads
    else:
        tile = tl.program_id(0) % tiles
        row = tl.program_id(0) // tiles * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
        mine = row < tokens * heads
        place = tl.minimum(row // heads, tokens - 1)
        head = row % heads
    token = (first_token + place).to(tl.int64)
    at = tile * KEYS_BLOCK + tl.arange(0, KEYS_BLOCK)
    if ALONE:
        first, end = span(ks, ke, token, context, k, PICKED)
        if lengths is not None:
            end = tl.minimum(tl.load(lengths + token), k)
        key, there = named(indices, token * index_row, at, end, context, PICKED)
        if not PICKED:
            if (tile * KEYS_BLOCK >= end) | (tile * KEYS_BLOCK + KEYS_BLOCK <= first):
                return
            there = there & (at >= first)
        seen = mine[:, None] & there[None]
    else:
        first, end = span(ks, ke, token, context, k, PICKED)
        seen = (mine & (first < end))[:, None] & (at[None] >= first[:, None])
        seen = seen & (at[None] < end[:, None])
        if tl.max(tl.max(seen.to(tl.int32), 1), 0) == 0:
            return
        key, there = at, at < context
    column = tl.arange(0, COLUMNS_BLOCK)
    queries = q + token * q_token + head.to(tl.int64) * q_head
    keys = kv + key.to(tl.int64) * kv_row
    score = tl.zeros([ROWS_BLOCK, KEYS_BLOCK], tl.float32)
    for left in range(0, WIDTH, COLUMNS_BLOCK):
        query = columns_of(queries, left + column, mine, WIDTH)
        score = tl.dot(
            query, tl.trans(columns_of(keys, left + column, there, WIDTH)), score,
            input_precision=PRECISION,
        )  # fmt: skip
    score = tl.where(seen, score * (scale * log2e), float("-inf"))
    peak = tl.max(score, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)  # no key of it: avoid inf - inf
    share = tl.exp2(score - base[:, None])
    to = (place.to(tl.int64) * tiles + tile) * heads + head
    tl.store(peaks + to, peak, mask=mine)
    tl.store(totals + to, tl.sum(share, 1), mask=mine)
    to = (place.to(tl.int64) * heads + head)[:, None] * k + at[None]
    inside = mine[:, None] & (at < k)[None]
    tl.store(parts + to, share.to(parts.dtype.element_ty), mask=inside)


@triton.jit
def relate(
    ks, ke, peaks, totals, sink, top, lse, first_token, context, heads, k,
    PICKED: tl.constexpr, HEADS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns the peaks that `attend` left into what a tile's parts are of the whole softmax, to
    which `sink` [heads] fp32, if there is one, adds a term. Where wanted, the largest score and the
    logarithm of the sum to top and lse [all tokens, heads]. Grid: tokens times blocks of heads."""
    log2e: tl.constexpr = 1.4426950408889634
    blocks, tiles = tl.cdiv(heads, HEADS_BLOCK), tl.cdiv(k, KEYS_BLOCK)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    mine = head < heads
    first, end = span(ks, ke, first_token + place, context, k, PICKED)
    tile = tl.arange(0, TILES_BLOCK)
    met = (tile >= first // KEYS_BLOCK) & (tile < tl.cdiv(end, KEYS_BLOCK))
    at = (place * tiles + tile)[:, None] * heads + head[None]
    peak = tl.load(peaks + at, mask=met[:, None] & mine[None], other=float("-inf"))
    total = tl.load(totals + at, mask=met[:, None] & mine[None], other=0.0)
    most = tl.max(peak, 0)
    share = tl.exp2(peak - tl.where(most == float("-inf"), 0.0, most)[None])
    whole = tl.sum(total * share, 0)
    factor = tl.where(whole > 0, 1 / whole, 0.0)
    if lse is not None:
        log = tl.where(whole > 0, (most + tl.log2(whole)) / log2e, float("inf"))
        to = (first_token + place) * heads + head
        tl.store(top + to, most / log2e, mask=mine)
        tl.store(lse + to, log, mask=mine)
        if sink is not None:
            term = tl.load(sink + head, mask=mine, other=0.0)
            factor = tl.where(whole > 0, factor / (1 + tl.exp2((term - log) * log2e)), 0.0)
    tl.store(peaks + at, factor[None] * share, mask=met[:, None] & mine[None])


@triton.jit
def gain(
    kv, indices, lengths, parts, factors, out, kv_row, index_row, first_token, context, heads, k,
    VALUES: tl.constexpr, HEADS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [all tokens, heads, VALUES] dense: the keys' first columns, weighted with parts times
    factors, the peaks of `relate`. Grid: tokens times blocks of columns times blocks of heads,
    those of the same keys side by side."""
    head_blocks, column_blocks = tl.cdiv(heads, HEADS_BLOCK), tl.cdiv(VALUES, COLUMNS_BLOCK)
    place = (tl.program_id(0) // (head_blocks * column_blocks)).to(tl.int64)
    token = first_token + place
    left = tl.program_id(0) // head_blocks % column_blocks * COLUMNS_BLOCK
    head = tl.program_id(0) % head_blocks * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    mine = head < heads
    column = left + tl.arange(0, COLUMNS_BLOCK)
    tiles = tl.cdiv(k, KEYS_BLOCK)
    count = k
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + token), k)
    mean = tl.zeros([HEADS_BLOCK, COLUMNS_BLOCK], tl.float32)
    for tile in range(0, tl.cdiv(count, KEYS_BLOCK)):
        at = tile * KEYS_BLOCK + tl.arange(0, KEYS_BLOCK)
        row, valid = named(indices, token * index_row, at, count, context, True)
        factor = tl.load(factors + (place * tiles + tile) * heads + head, mask=mine, other=0.0)
        part = tl.load(
            parts + (place * heads + head)[:, None] * k + at[None],
            mask=mine[:, None] & (at < count)[None], other=0.0,
        )  # fmt: skip
        keys = columns_of(kv + row.to(tl.int64) * kv_row, column, valid, VALUES)
        part = (part.to(tl.float32) * factor[:, None]).to(keys.dtype)
        mean = tl.dot(part, keys, mean, input_precision=PRECISION)
    to = (token * heads + head)[:, None] * VALUES + column[None]
    inside = mine[:, None] & (column < VALUES)[None]
    tl.store(out + to, mean.to(out.dtype.element_ty), mask=inside)
