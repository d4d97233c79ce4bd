"""sparse_mla as one Triton kernel: a program owns some heads of one query and walks the query's
selected keys. The softmax runs in base 2 on fp32 scores."""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, kv, indices, lengths, sink, out, top, lse,
    q_token, q_head, kv_row, index_row, context, heads, k, scale,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_SINK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, KEYS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q [tokens, heads, WIDTH], kv [context, WIDTH], indices [tokens, k] with the given strides;
    out [tokens, heads, VALUES], top and lse [tokens, heads] dense. A key's first VALUES columns are
    its value, the WIDTH - VALUES columns behind them count in the score alone.

    An entry of `indices` that names no row of kv is no key. Grid: tokens times blocks
    of heads, those of a token side by side.
    """
    log2e: tl.constexpr = 1.4426950408889634
    blocks = tl.cdiv(heads, HEADS_BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    mine = head < heads
    column = tl.arange(0, VALUE_BLOCK)
    q_rows = q + token * q_token + head[:, None] * q_head
    latent = tl.load(q_rows + column[None], mask=mine[:, None] & (column < VALUES)[None], other=0.0)
    if WIDTH > VALUES:
        more = tl.arange(0, REST_BLOCK)
        rest = tl.load(
            q_rows + VALUES + more[None],
            mask=mine[:, None] & (more < WIDTH - VALUES)[None], other=0.0,
        )  # fmt: skip
    count = k
    if HAS_LENGTHS:
        count = tl.minimum(tl.load(lengths + token), k)
    peak = tl.full([HEADS_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_BLOCK], tl.float32)
    mean = tl.zeros([HEADS_BLOCK, VALUE_BLOCK], tl.float32)
    for start in range(0, count, KEYS_BLOCK):
        at = start + tl.arange(0, KEYS_BLOCK)
        row = tl.load(indices + token * index_row + at, mask=at < count, other=-1)
        valid = (row >= 0) & (row < context)
        rows = kv + row.to(tl.int64)[:, None] * kv_row
        keys = tl.load(
            rows + column[None], mask=valid[:, None] & (column < VALUES)[None], other=0.0
        )
        score = tl.dot(latent, tl.trans(keys), input_precision=PRECISION)
        if WIDTH > VALUES:
            tail = tl.load(
                rows + VALUES + more[None],
                mask=valid[:, None] & (more < WIDTH - VALUES)[None], other=0.0,
            )  # fmt: skip
            score = tl.dot(rest, tl.trans(tail), score, input_precision=PRECISION)
        score = tl.where(valid[None], score * (scale * log2e), float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: avoid inf - inf
        share = tl.exp2(score - base[:, None])
        kept = tl.exp2(peak - base)
        total = total * kept + tl.sum(share, 1)
        mean = tl.dot(share.to(keys.dtype), keys, mean * kept[:, None], input_precision=PRECISION)
        peak = higher
    nothing = total == 0
    log = tl.where(nothing, float("inf"), (peak + tl.log2(total)) / log2e)
    factor = tl.where(nothing, 0.0, 1 / total)
    if HAS_SINK:
        weight = tl.load(sink + head, mask=mine, other=0.0)
        factor = tl.where(nothing, 0.0, factor / (1 + tl.exp2((weight - log) * log2e)))
    place = token * heads + head
    tl.store(
        out + place[:, None] * VALUES + column[None], mean * factor[:, None],
        mask=mine[:, None] & (column < VALUES)[None],
    )  # fmt: skip
    tl.store(top + place, peak / log2e, mask=mine)
    tl.store(lse + place, log, mask=mine)
