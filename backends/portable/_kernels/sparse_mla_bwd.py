"""The gradients of sparse_mla in Triton, a step per kernel: `weigh` makes every head's share of
every selected key and the slope of its score, `pull` sums them into gradients of queries, `push`
into those of keys. Tiles are cut from columns as well, so that no program holds whole rows.

With p = exp(scale * q . k - lse) and ds = scale * p * (dout . v - dout . out), dq is the sum of ds
times k, and dkv that of ds times q and p times dout. An entry of `indices` that names no row of kv
is no key. Steps take `tokens` from `first_token`, whose p and ds [tokens, heads, k] they hand on in
q's dtype; all other tensors hold all tokens.
"""

import triton
import triton.language as tl


@triton.jit
def agree(
    out, dout, mean, out_token, out_head, dout_token, dout_head, heads,
    VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr, HEADS_BLOCK: tl.constexpr,
):  # fmt: skip
    """mean [tokens, heads] fp32: out . dout. Grid: tokens times blocks of heads."""
    blocks = tl.cdiv(heads, HEADS_BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    column = tl.arange(0, VALUE_BLOCK)
    inside = (head < heads)[:, None] & (column < VALUES)[None]
    at = token * out_token + head[:, None] * out_head + column[None]
    result = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    at = token * dout_token + head[:, None] * dout_head + column[None]
    upstream = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean + token * heads + head, tl.sum(result * upstream, 1), mask=head < heads)


@triton.jit
def _keys_at(indices, lengths, token, start, index_row, context, k, KEYS_BLOCK: tl.constexpr):
    """Of a query's entries from `start`: their places, rows of kv, and which are keys."""
    count = k
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + token), k)
    at = start + tl.arange(0, KEYS_BLOCK)
    row = tl.load(indices + token * index_row + at, mask=at < count, other=-1)
    return at, row.to(tl.int64), (row >= 0) & (row < context)


@triton.jit
def weigh(
    q, kv, indices, lengths, mean, lse, dout, shares, slopes,
    q_token, q_head, kv_row, index_row, lse_token, dout_token, dout_head,
    first_token, context, heads, k, scale,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, HEADS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """shares and slopes, p and ds; 0 where an entry is no key. Grid: tokens times blocks of keys
    times blocks of heads, those of the same keys side by side."""
    log2e: tl.constexpr = 1.4426950408889634
    head_blocks, key_blocks = tl.cdiv(heads, HEADS_BLOCK), tl.cdiv(k, KEYS_BLOCK)
    place = (tl.program_id(0) // (head_blocks * key_blocks)).to(tl.int64)
    token = first_token + place
    start = tl.program_id(0) // head_blocks % key_blocks * KEYS_BLOCK
    head = tl.program_id(0) % head_blocks * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    mine = head < heads
    at, row, valid = _keys_at(indices, lengths, token, start, index_row, context, k, KEYS_BLOCK)
    column = tl.arange(0, COLUMNS_BLOCK)
    queries = q + token * q_token + head[:, None] * q_head + column[None]
    upstreams = dout + token * dout_token + head[:, None] * dout_head + column[None]
    keys = kv + row[:, None] * kv_row + column[None]
    score = tl.zeros([HEADS_BLOCK, KEYS_BLOCK], tl.float32)
    slope = tl.zeros([HEADS_BLOCK, KEYS_BLOCK], tl.float32)
    for left in range(0, VALUES, COLUMNS_BLOCK):
        inside = (left + column < VALUES)[None]
        key = tl.trans(tl.load(keys + left, mask=valid[:, None] & inside, other=0.0))
        query = tl.load(queries + left, mask=mine[:, None] & inside, other=0.0)
        upstream = tl.load(upstreams + left, mask=mine[:, None] & inside, other=0.0)
        score = tl.dot(query, key, score, input_precision=PRECISION)
        slope = tl.dot(upstream, key, slope, input_precision=PRECISION)
    for left in range(VALUES, WIDTH, COLUMNS_BLOCK):
        inside = (left + column < WIDTH)[None]
        key = tl.trans(tl.load(keys + left, mask=valid[:, None] & inside, other=0.0))
        query = tl.load(queries + left, mask=mine[:, None] & inside, other=0.0)
        score = tl.dot(query, key, score, input_precision=PRECISION)
    log = tl.load(lse + token * lse_token + head, mask=mine, other=float("inf")) * log2e
    base = tl.load(mean + token * heads + head, mask=mine, other=0.0)
    share = tl.where(valid[None], tl.exp2(score * (scale * log2e) - log[:, None]), 0.0)
    slope = share * (slope - base[:, None]) * scale
    to = (place * heads + head[:, None]) * k + at[None]
    inside = mine[:, None] & (at < k)[None]
    tl.store(shares + to, share.to(shares.dtype.element_ty), mask=inside)
    tl.store(slopes + to, slope.to(slopes.dtype.element_ty), mask=inside)


@triton.jit
def pull(
    kv, indices, lengths, slopes, dq, kv_row, index_row, first_token, context, heads, k,
    WIDTH: tl.constexpr, HEADS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [tokens, heads, WIDTH] dense. Grid: tokens times blocks of columns times blocks of heads,
    those of the same keys side by side."""
    head_blocks, column_blocks = tl.cdiv(heads, HEADS_BLOCK), tl.cdiv(WIDTH, COLUMNS_BLOCK)
    place = (tl.program_id(0) // (head_blocks * column_blocks)).to(tl.int64)
    token = first_token + place
    left = tl.program_id(0) // head_blocks % column_blocks * COLUMNS_BLOCK
    head = tl.program_id(0) % head_blocks * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    mine = head < heads
    column = left + tl.arange(0, COLUMNS_BLOCK)
    step = tl.zeros([HEADS_BLOCK, COLUMNS_BLOCK], tl.float32)
    for start in range(0, k, KEYS_BLOCK):
        at, row, valid = _keys_at(indices, lengths, token, start, index_row, context, k, KEYS_BLOCK)
        slope = tl.load(
            slopes + (place * heads + head[:, None]) * k + at[None],
            mask=mine[:, None] & (at < k)[None], other=0.0,
        )  # fmt: skip
        keys = tl.load(
            kv + row[:, None] * kv_row + column[None],
            mask=valid[:, None] & (column < WIDTH)[None], other=0.0,
        )  # fmt: skip
        step = tl.dot(slope, keys, step, input_precision=PRECISION)
    to = (token * heads + head[:, None]) * WIDTH + column[None]
    tl.store(to + dq, step.to(dq.dtype.element_ty), mask=mine[:, None] & (column < WIDTH)[None])


@triton.jit
def push(
    q, indices, lengths, dout, shares, slopes, dkv,
    q_token, q_head, index_row, dout_token, dout_head, first_token, context, heads, k,
    ADDED: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, HEADS_BLOCK: tl.constexpr,
    KEYS_BLOCK: tl.constexpr, COLUMNS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a query gives its keys: ADDED to dkv [context, WIDTH] fp32 dense, in no certain order,
    or written to dkv [tokens, k, WIDTH], for keys alone. `shares` and `slopes` begin with the first
    of `tokens`. Grid: tokens times blocks of keys times blocks of columns."""
    key_blocks, column_blocks = tl.cdiv(k, KEYS_BLOCK), tl.cdiv(WIDTH, COLUMNS_BLOCK)
    place = (tl.program_id(0) // (key_blocks * column_blocks)).to(tl.int64)
    token = first_token + place
    start = tl.program_id(0) // column_blocks % key_blocks * KEYS_BLOCK
    left = tl.program_id(0) % column_blocks * COLUMNS_BLOCK
    at, row, valid = _keys_at(indices, lengths, token, start, index_row, context, k, KEYS_BLOCK)
    column = left + tl.arange(0, COLUMNS_BLOCK)
    head = tl.arange(0, HEADS_BLOCK)
    made = place * heads * k + head[:, None] * k + at[None]
    queries = q + token * q_token + head[:, None] * q_head + column[None]
    upstreams = dout + token * dout_token + head[:, None] * dout_head + column[None]
    part = tl.zeros([KEYS_BLOCK, COLUMNS_BLOCK], tl.float32)
    for first in range(0, heads, HEADS_BLOCK):
        mine = (first + head < heads)[:, None]
        slope = tl.load(slopes + made + first * k, mask=mine & (at < k)[None], other=0.0)
        query = tl.load(queries + first * q_head, mask=mine & (column < WIDTH)[None], other=0.0)
        part = tl.dot(tl.trans(slope), query, part, input_precision=PRECISION)
    if left < VALUES:
        for first in range(0, heads, HEADS_BLOCK):
            mine = (first + head < heads)[:, None]
            share = tl.load(shares + made + first * k, mask=mine & (at < k)[None], other=0.0)
            upstream = tl.load(
                upstreams + first * dout_head, mask=mine & (column < VALUES)[None], other=0.0
            )
            part = tl.dot(tl.trans(share), upstream, part, input_precision=PRECISION)
    inside = valid[:, None] & (column < WIDTH)[None]
    if ADDED:
        tl.atomic_add(dkv + row[:, None] * WIDTH + column[None], part, mask=inside, sem="relaxed")
    else:
        tl.store(dkv + (place * k + at)[:, None] * WIDTH + column[None], part, mask=inside)
