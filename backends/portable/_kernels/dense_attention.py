"""Attention over a range of keys per query as Triton kernels: `dense_mla` with its keys split among
programs, and `mha_prefill`. The softmax runs in base 2 on fp32 scores."""

import triton
import triton.language as tl


@triton.jit
def mark(indices, ks, ke, words, anyone, index_row, words_row, k, BLOCK: tl.constexpr):
    """Sets bit i of a query's row of words [tokens, words_row] int32 and of anyone [words_row], for
    each key ks <= i < ke named in indices [tokens, k]. Grid: (tokens, blocks of entries)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(indices + token * index_row + at, mask=at < k, other=-1)
    bit = tl.full([BLOCK], 1, tl.int32) << (key & 31)
    valid = (key >= tl.load(ks + token)) & (key < tl.load(ke + token))
    tl.atomic_or(words + token * words_row + (key >> 5), bit, mask=valid, sem="relaxed")
    tl.atomic_or(anyone + (key >> 5), bit, mask=valid, sem="relaxed")


@triton.jit
def _walk(
    low, end, peak, total, mean, main, rest, keys, values, words, anyone, q_words, first, last,
    key_row, value_row, scale,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, WIDTH_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr, EDGE: tl.constexpr,
    KEYS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running peak, total and mean of some rows after keys [low, end). EDGE: not every row sees
    all of them. What no row sees may hold anything, NaN too, and counts as zeros."""
    column = tl.arange(0, WIDTH_BLOCK)
    more = WIDTH_BLOCK + tl.arange(0, REST_BLOCK)
    wide = tl.arange(0, VALUE_BLOCK)
    for start in range(low, end, KEYS_BLOCK):
        at = start + tl.arange(0, KEYS_BLOCK)
        inside = at < end
        if MASKED:
            own = words + q_words + (start >> 5)
            word = tl.load(own)[:, None]
            if KEYS_BLOCK > 32:
                next_word = tl.load(own + 1, mask=start + 32 < end, other=0)[:, None]
                word = tl.where((at - start < 32)[None], word, next_word)
            seen = ((word >> (at & 31)[None]) & 1) != 0
            named = tl.load(anyone + (at >> 5), mask=inside, other=0)
            inside = inside & (((named >> (at & 31)) & 1) != 0)
        if EDGE:
            seen = (at[None] >= first[:, None]) & (at[None] < last[:, None])
            inside = inside & (tl.max(seen.to(tl.int32), 0) != 0)
        place = at.to(tl.int64)
        tile = tl.load(
            keys + place[:, None] * key_row + column[None],
            mask=inside[:, None] & (column < WIDTH)[None], other=0.0,
        )  # fmt: skip
        score = tl.dot(main, tl.trans(tile), input_precision=PRECISION)
        if WIDTH > WIDTH_BLOCK:
            tail = tl.load(
                keys + place[:, None] * key_row + more[None],
                mask=inside[:, None] & (more < WIDTH)[None], other=0.0,
            )  # fmt: skip
            score = tl.dot(rest, tl.trans(tail), score, input_precision=PRECISION)
        score *= scale
        if EDGE or MASKED:
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: avoid inf - inf
        share = tl.exp2(score - base[:, None])
        kept = tl.exp2(peak - base)
        total = total * kept + tl.sum(share, 1)
        if SHARED:
            used = tile
        else:
            used = tl.load(
                values + place[:, None] * value_row + wide[None],
                mask=inside[:, None] & (wide < VALUES)[None], other=0.0,
            )  # fmt: skip
        mean = tl.dot(share.to(used.dtype), used, mean * kept[:, None], input_precision=PRECISION)
        peak = higher
    return peak, total, mean


@triton.jit
def attend(
    q, keys, values, ks, ke, words, anyone, out, lse,
    q_token, q_head, key_row, key_head, value_row, value_head, words_row, tokens, heads, kv_heads,
    splits, scale,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, WIDTH_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr, PARTIAL: tl.constexpr,
    PLAIN: tl.constexpr,
    ROWS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q [tokens, heads, WIDTH]; a row is a query and one of the heads / kv_heads heads that use the
    same keys [context, kv_heads, WIDTH] and values [context, kv_heads, VALUES].

    SHARED   the values are the keys' first VALUES columns: one load serves both products
    MASKED   of its range ks <= i < ke [tokens], a query sees the keys whose bit is set in its row
             of `words` [tokens, words_row] (`mark`); `anyone` [words_row] is the rows' union
    PLAIN    the same code for all keys, those that every row sees included: less to compile
    PARTIAL  out is fp32 [splits, tokens, heads, VALUES] and lse [splits, tokens, heads]

    PRECISION is how fp32 is multiplied, as `tl.dot` calls it. KEYS_BLOCK is 64 at most. A key is
    read WIDTH_BLOCK columns at first and then REST_BLOCK, if any are left. Grid: (blocks of rows,
    kv_heads, splits); later queries, which see most when they are causal, start first.
    """
    log2e: tl.constexpr = 1.4426950408889634
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    group = heads // kv_heads
    row = block * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    mine = row < tokens * group
    token = tl.minimum(row // group, tokens - 1)
    kv_head = tl.program_id(1).to(tl.int64)
    head = kv_head * group + row % group
    first = tl.load(ks + token)
    last = tl.load(ke + token)
    some = first < last
    high = tl.max(tl.where(some, last, 0), 0)
    low = tl.minimum(tl.min(tl.where(some, first, 2147483647), 0), high)
    low = low // KEYS_BLOCK * KEYS_BLOCK
    per_split = tl.cdiv(tl.cdiv(high - low, KEYS_BLOCK), splits) * KEYS_BLOCK
    low = low + tl.program_id(2) * per_split
    end = tl.maximum(low, tl.minimum(low + per_split, high))
    full_low = tl.cdiv(tl.max(first, 0), KEYS_BLOCK) * KEYS_BLOCK  # from here to full_high,
    full_low = tl.minimum(tl.maximum(full_low, low), end)  # every row sees every key
    full_high = tl.min(last, 0) // KEYS_BLOCK * KEYS_BLOCK
    full_high = tl.maximum(tl.minimum(full_high, end), full_low)

    column = tl.arange(0, WIDTH_BLOCK)
    more = WIDTH_BLOCK + tl.arange(0, REST_BLOCK)
    q_rows = q + token.to(tl.int64)[:, None] * q_token + head[:, None] * q_head
    main = tl.load(q_rows + column[None], mask=mine[:, None] & (column < WIDTH)[None], other=0.0)
    rest = tl.load(q_rows + more[None], mask=mine[:, None] & (more < WIDTH)[None], other=0.0)
    q_words = token.to(tl.int64) * words_row
    keys += kv_head * key_head
    values += kv_head * value_head
    peak = tl.full([ROWS_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([ROWS_BLOCK], tl.float32)
    mean = tl.zeros([ROWS_BLOCK, VALUE_BLOCK], tl.float32)
    if MASKED or PLAIN:
        peak, total, mean = _walk(
            low, end, peak, total, mean, main, rest, keys, values, words, anyone, q_words, first,
            last, key_row, value_row, scale * log2e, WIDTH, VALUES, WIDTH_BLOCK, REST_BLOCK,
            VALUE_BLOCK, SHARED, MASKED, not MASKED, KEYS_BLOCK, PRECISION,
        )  # fmt: skip
    else:
        peak, total, mean = _walk(
            low, full_low, peak, total, mean, main, rest, keys, values, words, anyone, q_words,
            first, last, key_row, value_row, scale * log2e, WIDTH, VALUES, WIDTH_BLOCK, REST_BLOCK,
            VALUE_BLOCK, SHARED, False, True, KEYS_BLOCK, PRECISION,
        )  # fmt: skip
        peak, total, mean = _walk(
            full_low, full_high, peak, total, mean, main, rest, keys, values, words, anyone,
            q_words, first, last, key_row, value_row, scale * log2e, WIDTH, VALUES, WIDTH_BLOCK,
            REST_BLOCK, VALUE_BLOCK, SHARED, False, False, KEYS_BLOCK, PRECISION,
        )  # fmt: skip
        peak, total, mean = _walk(
            full_high, end, peak, total, mean, main, rest, keys, values, words, anyone, q_words,
            first, last, key_row, value_row, scale * log2e, WIDTH, VALUES, WIDTH_BLOCK, REST_BLOCK,
            VALUE_BLOCK, SHARED, False, True, KEYS_BLOCK, PRECISION,
        )  # fmt: skip
    wide = tl.arange(0, VALUE_BLOCK)
    nothing = total == 0
    factor = tl.where(nothing, 0.0, 1 / total)
    log = tl.where(nothing, float("inf"), (peak + tl.log2(total)) / log2e)
    place = token.to(tl.int64) * heads + head
    if PARTIAL:
        place += tl.program_id(2).to(tl.int64) * tokens * heads
    tl.store(
        out + place[:, None] * VALUES + wide[None], mean * factor[:, None],
        mask=mine[:, None] & (wide < VALUES)[None],
    )  # fmt: skip
    tl.store(lse + place, log, mask=mine)


@triton.jit
def merge(
    part, part_lse, out, lse, rows, splits,
    VALUES: tl.constexpr, SPLITS_BLOCK: tl.constexpr, COLUMNS_BLOCK: tl.constexpr,
):  # fmt: skip
    """out [rows, VALUES] and lse [rows] of parts [splits, rows, VALUES] and their lse; a part
    without keys has lse +inf. Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS_BLOCK + tl.arange(0, COLUMNS_BLOCK)
    split = tl.arange(0, SPLITS_BLOCK)
    place = split.to(tl.int64) * rows + row
    log = tl.load(part_lse + place, mask=split < splits, other=float("inf"))
    log = tl.where(log == float("inf"), float("-inf"), log)
    value = tl.load(
        part + place[:, None] * VALUES + column[None],
        mask=(split < splits)[:, None] & (column < VALUES)[None], other=0.0,
    )  # fmt: skip
    peak = tl.max(log, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    share = tl.exp(log - base)
    total = tl.sum(share, 0)
    nothing = total == 0
    mean = tl.sum(share[:, None] * value, 0) / tl.where(nothing, 1.0, total)
    tl.store(out + row * VALUES + column, mean, mask=column < VALUES)
    if tl.program_id(1) == 0:
        tl.store(lse + row, tl.where(nothing, float("inf"), base + tl.log(total)))
