"""The indexer's loss and its gradients in Triton, a step per kernel, with keys and places as in
`shares`.

Steps: `shares.attend`, `shares.relate` and `mix` make the target, `score` the indexer's scores,
`compare` the loss and its slope, `pull` the gradients of a query, and of selected keys; `push`
those of ranges of keys. They take `tokens` from `first_token`; what they hand on begins there,
inputs and results hold all tokens.
"""

import triton
import triton.language as tl

from dsa_hal.backends.portable._kernels.shares import columns_of, named, span

BOOST = tl.constexpr(256.0)
"""Slopes are at most 1 and often 1 / k: so much larger, fp16 holds them."""


@triton.jit
def mix(
    ks, ke, parts, factors, share, first_token, context, heads, k,
    PICKED: tl.constexpr, HEADS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr,
):  # fmt: skip
    """share [tokens, k] fp32, the mean over heads of parts times factors, the peaks of `relate`.
    Grid: tokens times tiles."""
    tiles = tl.cdiv(k, KEYS_BLOCK)
    tile = tl.program_id(0) % tiles
    place = (tl.program_id(0) // tiles).to(tl.int64)
    first, end = span(ks, ke, first_token + place, context, k, PICKED)
    at = tile * KEYS_BLOCK + tl.arange(0, KEYS_BLOCK)
    inside = (at >= first) & (at < end)
    if (tile * KEYS_BLOCK >= end) | (tile * KEYS_BLOCK + KEYS_BLOCK <= first):
        return
    target = tl.zeros([HEADS_BLOCK, KEYS_BLOCK], tl.float32)
    for left in range(0, heads, HEADS_BLOCK):
        head = left + tl.arange(0, HEADS_BLOCK)
        mine = head < heads
        factor = tl.load(factors + (place * tiles + tile) * heads + head, mask=mine, other=0.0)
        part = tl.load(
            parts + (place * heads + head)[:, None] * k + at[None],
            mask=mine[:, None] & inside[None], other=0.0,
        )  # fmt: skip
        target += part.to(tl.float32) * factor[:, None]
    tl.store(share + place * k + at, tl.sum(target, 0) / heads, mask=inside)


@triton.jit
def score(
    q, keys, weights, ks, ke, indices, scores, q_token, q_head, key_row, weight_row, index_row,
    scores_block, first_token, tokens, context, heads, k,
    PICKED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over a block of heads of weights * ReLU(q . key): q [all tokens, heads, WIDTH], keys
    [context, WIDTH], weights [all tokens, heads]; scores [blocks, tokens, k] fp32. Grid: tokens
    times blocks of heads; later queries, which may see more, start first."""
    blocks = tl.cdiv(heads, HEADS_BLOCK)
    block = tl.program_id(0) % blocks
    place = tokens - 1 - tl.program_id(0) // blocks
    token = (first_token + place).to(tl.int64)
    head = block * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    mine = head < heads
    column = tl.arange(0, WIDTH_BLOCK)
    query = columns_of(q + token * q_token + head.to(tl.int64) * q_head, column, mine, WIDTH)
    weight = tl.load(weights + token * weight_row + head, mask=mine, other=0.0)
    first, end = span(ks, ke, token, context, k, PICKED)
    listed = token * index_row
    to = scores + block.to(tl.int64) * scores_block + place.to(tl.int64) * k
    for start in range(first, end, KEYS_BLOCK):
        at = start + tl.arange(0, KEYS_BLOCK)
        row, valid = named(indices, listed, at, end, context, PICKED)
        tile = columns_of(keys + row.to(tl.int64) * key_row, column, valid, WIDTH)
        product = tl.dot(query, tl.trans(tile), input_precision=PRECISION)
        tl.store(to + at, tl.sum(tl.maximum(product, 0.0) * weight[:, None], 0), mask=valid)


@triton.jit
def _summed(parts, step, count, at, live, BLOCK: tl.constexpr):
    """Sum of so many parts, `step` apart, at [BLOCK]."""
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, count):
        total += tl.load(parts + at, mask=live, other=0.0)
        parts += step
    return total


@triton.jit
def compare(
    share, scores, ks, ke, indices, loss, scores_block, scores_blocks, index_row, first_token,
    context, k,
    PICKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A query's loss, and in the place of its share the slope of its loss along the scores: their
    softmax less the share. Grid: tokens. Tensors as in `mix` and `score`; loss [all tokens]."""
    place = tl.program_id(0).to(tl.int64)
    token = first_token + place
    first, end = span(ks, ke, token, context, k, PICKED)
    listed = token * index_row
    share += place * k
    scores += place * k
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, valid = named(indices, listed, at, end, context, PICKED)
        score = _summed(scores, scores_block, scores_blocks, at, valid, BLOCK)
        score = tl.where(valid, score, float("-inf"))
        higher = tl.maximum(peak, score)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.exp(score - base)
        peak = higher
    top = tl.max(peak, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    log = base + tl.log(tl.maximum(tl.sum(total * tl.exp(peak - base), 0), 1e-37))
    lost = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, valid = named(indices, listed, at, end, context, PICKED)
        score = _summed(scores, scores_block, scores_blocks, at, valid, BLOCK)
        target = tl.load(share + at, mask=valid, other=0.0)
        known = target > 0
        lost += tl.where(known, target * (tl.log(tl.where(known, target, 1.0)) - score + log), 0.0)
        slope = tl.where(valid, tl.exp(score - log) - target, 0.0)
        tl.store(share + at, slope, mask=at < end)
    tl.store(loss + token, tl.sum(lost, 0))


@triton.jit
def pull(
    q, keys, weights, ks, ke, indices, row_weight, slopes, dq, dweights, dkeys,
    q_token, q_head, key_row, weight_row, index_row, first_token, tokens, context,
    heads, k,
    PICKED: tl.constexpr, ADDED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q and weights, and of keys that were PICKED.

    With step = slope where q . key is positive, dq is weight * sum of step * key over the keys,
    dweights q . (that sum), and a key's the sum of step * weight * q over heads and queries: ADDED
    to dkeys [context, WIDTH] fp32, in no certain order, or the sum over a block of heads written to
    dkeys [tokens, blocks, k, WIDTH]. dq [all tokens, heads, WIDTH] and dweights [all tokens, heads]
    fp32 dense, row_weight [all tokens] or None, slopes [tokens, k] of `compare`. Grid as in
    `score`."""
    blocks = tl.cdiv(heads, HEADS_BLOCK)
    block = tl.program_id(0) % blocks
    place = tokens - 1 - tl.program_id(0) // blocks
    token = (first_token + place).to(tl.int64)
    head = block * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    mine = head < heads
    column = tl.arange(0, WIDTH_BLOCK)
    query = columns_of(q + token * q_token + head.to(tl.int64) * q_head, column, mine, WIDTH)
    weight = tl.load(weights + token * weight_row + head, mask=mine, other=0.0)
    own = 1.0
    if row_weight is not None:
        own = tl.load(row_weight + token)
    if PICKED:
        size = tl.max(tl.abs(weight), 0)
        size = tl.where(size > 0, size, 1.0)  # weights as parts of it, so that fp16 holds them
        factor = size * own / BOOST
        steep = (query.to(tl.float32) * (weight / size)[:, None]).to(query.dtype)
    first, end = span(ks, ke, token, context, k, PICKED)
    listed = token * index_row
    slopes += place.to(tl.int64) * k
    sums = tl.zeros([HEADS_BLOCK, WIDTH_BLOCK], tl.float32)
    for start in range(first, end, KEYS_BLOCK):
        at = start + tl.arange(0, KEYS_BLOCK)
        row, valid = named(indices, listed, at, end, context, PICKED)
        tile = columns_of(keys + row.to(tl.int64) * key_row, column, valid, WIDTH)
        slope = tl.load(slopes + at, mask=valid, other=0.0) * BOOST
        product = tl.dot(query, tl.trans(tile), input_precision=PRECISION)
        step = tl.where(product > 0, slope[None], 0.0).to(query.dtype)
        sums = tl.dot(step, tile, sums, input_precision=PRECISION)
        if PICKED:
            part = tl.dot(tl.trans(step), steep, input_precision=PRECISION) * factor
            inside = valid[:, None] & (column < WIDTH)[None]
            if ADDED:
                to = dkeys + row.to(tl.int64)[:, None] * WIDTH + column[None]
                tl.atomic_add(to, part, mask=inside, sem="relaxed")
            else:
                to = (place.to(tl.int64) * blocks + block) * k + at
                tl.store(dkeys + to[:, None] * WIDTH + column[None], part, mask=inside)
    sums *= own / BOOST
    to = token * heads + head
    tl.store(dweights + to, tl.sum(sums * query.to(tl.float32), 1), mask=mine)
    tl.store(
        dq + to[:, None] * WIDTH + column[None], sums * weight[:, None],
        mask=mine[:, None] & (column < WIDTH)[None],
    )  # fmt: skip


@triton.jit
def reach(
    ks, ke, bounds, first_token, tokens, context, KEYS_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The first of `tokens` from `first_token` whose range meets a block of keys, and the one
    behind the last: bounds [blocks, 2]. Grid: blocks of keys."""
    left = tl.program_id(0) * KEYS_BLOCK
    low = tl.full([BLOCK], 2147483647, tl.int32)
    high = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tokens, BLOCK):
        place = start + tl.arange(0, BLOCK)
        first = tl.load(ks + first_token + place, mask=place < tokens, other=0)
        last = tl.load(ke + first_token + place, mask=place < tokens, other=0)
        last = tl.minimum(last, tl.minimum(context, left + KEYS_BLOCK))
        met = tl.maximum(first, left) < last
        low = tl.where(met, tl.minimum(low, place), low)
        high = tl.where(met, tl.maximum(high, place + 1), high)
    end = tl.max(high, 0)
    tl.store(bounds + tl.program_id(0) * 2, tl.minimum(tl.min(low, 0), end))
    tl.store(bounds + tl.program_id(0) * 2 + 1, end)


@triton.jit
def push(
    q, keys, weights, ks, ke, row_weight, slopes, bounds, dkeys,
    q_token, q_head, key_row, weight_row, first_token, context, heads,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys in ranges, as in `pull`: a program owns a block of keys and walks a part
    of the queries that see one of them: dkeys [parts, context, WIDTH]. Grid: (blocks of keys,
    parts)."""
    key = tl.program_id(0) * KEYS_BLOCK + tl.arange(0, KEYS_BLOCK)
    low, high = tl.load(bounds + tl.program_id(0) * 2), tl.load(bounds + tl.program_id(0) * 2 + 1)
    each = tl.cdiv(high - low, tl.num_programs(1))
    low += tl.program_id(1) * each
    high = tl.minimum(low + each, high)
    column = tl.arange(0, WIDTH_BLOCK)
    tile = columns_of(keys + key.to(tl.int64) * key_row, column, key < context, WIDTH)
    sums = tl.zeros([KEYS_BLOCK, WIDTH_BLOCK], tl.float32)
    for place in range(low, high):
        token = (first_token + place).to(tl.int64)
        first, last = tl.load(ks + token), tl.minimum(tl.load(ke + token), context)
        seen = (key >= first) & (key < last)
        row = slopes + (token - first_token) * context
        slope = tl.load(row + key, mask=seen, other=0.0)
        own = 1.0
        if row_weight is not None:
            own = tl.load(row_weight + token)
        for head_block in range(0, heads, HEADS_BLOCK):
            head = head_block + tl.arange(0, HEADS_BLOCK)
            mine = head < heads
            rows = q + token * q_token + head.to(tl.int64) * q_head
            query = columns_of(rows, column, mine, WIDTH)
            weight = tl.load(weights + token * weight_row + head, mask=mine, other=0.0)
            size = tl.max(tl.abs(weight), 0)
            size = tl.where(size > 0, size, 1.0)
            steep = (query.to(tl.float32) * (weight / size)[:, None]).to(query.dtype)
            product = tl.dot(tile, tl.trans(query), input_precision=PRECISION)
            step = tl.where(product > 0, (slope * BOOST)[:, None], 0.0).to(query.dtype)
            part = tl.dot(step, steep, input_precision=PRECISION)
            sums += part * (size * own / BOOST)
    to = (tl.program_id(1).to(tl.int64) * context + key)[:, None] * WIDTH + column[None]
    tl.store(dkeys + to, sums, mask=(key < context)[:, None] & (column < WIDTH)[None])
