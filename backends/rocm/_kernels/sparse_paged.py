"""Attention of few queries over selected FP8 records of a paged cache, for gfx950.

A wavefront has 32 heads, whose scores it shares out by keys and whose results by columns with the
others of those heads. Records lie in LDS as they lie in memory, half of what bf16 would take; a
value becomes bf16 on its way into a matrix instruction, without its scale: scores are scaled after
their product, weights before theirs, group by group. The next records are under way meanwhile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import AMDMFMALayout, cdna4

LOG2E = gl.constexpr(1.4426950408889634)

SLACK = gl.constexpr(8.0)
"""How far, as a power of two, a score may lie above the reference of its row's weights. Only beyond
is scaled down what has been added up: a matrix instruction's accumulators are no operands of
others, and moving them takes longer than a tile's products."""


@gluon.jit
def _slots(IDX, at, end, slots, step, layout: gl.constexpr, BN: gl.constexpr):
    """Slots of BN keys from `at`, -1 where there is none or it lies outside the pool."""
    key = at + gl.arange(0, BN, layout)
    slot = cdna4.buffer_load(IDX, key * step, mask=key < end, other=-1)
    return gl.where(slot < slots, slot, -1)


@gluon.jit
def _records(
    PART, slot, page_step, token_step,
    PAGE: gl.constexpr, layout: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """A part of each slot's record [BN, WIDE], zeros where there is none."""
    base = (slot // PAGE) * page_step + (slot % PAGE) * token_step
    column = gl.arange(0, WIDE, gl.SliceLayout(0, layout))
    there = (slot >= 0)[:, None] & (column >= 0)[None, :]
    return cdna4.buffer_load(PART, base[:, None] + column[None, :], mask=there, other=0.0)


@gluon.jit
def _scale(SCALE, slot, page_step, token_step, PAGE: gl.constexpr):
    """Scales [BN] of a group, 0 where there is no record."""
    base = (slot // PAGE) * page_step + (slot % PAGE) * token_step
    return cdna4.buffer_load(SCALE, base, mask=slot >= 0, other=0.0)


@gluon.jit
def _keys(kept, group: gl.constexpr, layout: gl.constexpr, G: gl.constexpr):
    """A group of the records as the right factor of scores: [G, BN] bf16."""
    return kept.slice(group * G, G, 1).permute([1, 0]).load(layout).to(gl.bfloat16)


@gluon.jit
def _values(kept, group: gl.constexpr, layout: gl.constexpr, G: gl.constexpr):
    """A group of the records as the right factor of the result: [BN, G] bf16."""
    return kept.slice(group * G, G, 1).load(layout).to(gl.bfloat16)


@gluon.jit
def _weights(weight, scale):
    """Weights [BH, BN] with a group's scales, as a left factor."""
    return (weight * scale[None, :]).to(gl.bfloat16)


@gluon.jit
def _store(
    to, group: gl.constexpr, acc, share, real, layout: gl.constexpr, G: gl.constexpr
):  # fmt: skip
    column = group * G + gl.arange(0, G, layout)
    value = (acc * share[:, None]).to(to.dtype.element_ty)
    gl.store(to[:, None] + column[None, :], value, mask=real[:, None] & (column >= 0)[None, :])


@gluon.jit
def _queries(to_q, head, heads, step, first, layout: gl.constexpr, WIDE: gl.constexpr):
    """Columns [first, first + WIDE) of the queries' heads, zeros where there is no head."""
    column = first + gl.arange(0, WIDE, gl.SliceLayout(0, layout))
    there = (head < heads)[:, None] & (column >= 0)[None, :]
    return cdna4.buffer_load(to_q, head[:, None] * step + column[None, :], mask=there, other=0.0)


@gluon.jit
def attend(
    Q, LATENT, SCALE, ROPE, IDX, LEN, SINK, OUT, LSE, PART, PART_LSE,
    scale_log2, next_n, heads, k, slots, span,
    sq_b, sq_n, sq_h, sl_p, sl_t, ss_p, ss_t, sr_p, sr_t, si_b, si_n, si_k, st_b, st_n,
    HAS_LEN: gl.constexpr, HAS_SINK: gl.constexpr, DIRECT: gl.constexpr, PAGE: gl.constexpr,
    BH: gl.constexpr, BN: gl.constexpr, WN: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """Grid [rows * blocks of BH heads, pieces of `span` keys]; arguments as of the portable program
    of this name; offsets of 32 bits reach all of the pool. Records are 512 values in four groups,
    and 64 rotated ones; PAGE of them are a page. WN wavefronts have the same 32 heads. HELD groups
    of the queries stay in registers, the others in LDS."""
    D: gl.constexpr = 512
    G: gl.constexpr = 128
    R: gl.constexpr = 64
    WAVES: gl.constexpr = BH // 32 * WN
    mf: gl.constexpr = AMDMFMALayout(4, [32, 32, 16], True, [BH // 32, WN])
    left: gl.constexpr = gl.DotOperandLayout(0, mf, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, mf, 8)
    of_head: gl.constexpr = gl.SliceLayout(1, mf)
    of_key: gl.constexpr = gl.SliceLayout(0, mf)
    latent_layout: gl.constexpr = gl.BlockedLayout([1, 16], [2, 32], [WAVES, 1], [1, 0])
    rope_layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 8], [WAVES, 1], [1, 0])
    of_scale: gl.constexpr = gl.BlockedLayout([1], [64], [WAVES], [0])
    of_latent: gl.constexpr = gl.SliceLayout(1, latent_layout)
    of_rope: gl.constexpr = gl.SliceLayout(1, rope_layout)
    of_left: gl.constexpr = gl.SliceLayout(0, left)
    latent_shared: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 8, [1, 0])
    rope_shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    query_shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 16, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    head_blocks = (heads + BH - 1) // BH
    row, head_block = gl.program_id(0) // head_blocks, gl.program_id(0) % head_blocks
    piece = gl.program_id(1)
    batch, query = (row // next_n).to(gl.int64), (row % next_n).to(gl.int64)
    first, end = piece * span, gl.minimum(k, piece * span + span)
    if HAS_LEN:
        end = gl.minimum(end, gl.load(LEN + batch * st_b + query * st_n))
    idx = IDX + batch * si_b + query * si_n

    slot = _slots(idx, first, end, slots, si_k, of_latent, BN)
    slot_r = _slots(idx, first, end, slots, si_k, of_rope, BN)
    slot_s = _slots(idx, first, end, slots, si_k, of_scale, BN)
    latent = _records(LATENT, slot, sl_p, sl_t, PAGE, latent_layout, D)
    rope = _records(ROPE, slot_r, sr_p, sr_t, PAGE, rope_layout, R)
    scale0 = _scale(SCALE, slot_s, ss_p, ss_t, PAGE)
    scale1 = _scale(SCALE + 1, slot_s, ss_p, ss_t, PAGE)
    scale2 = _scale(SCALE + 2, slot_s, ss_p, ss_t, PAGE)
    scale3 = _scale(SCALE + 3, slot_s, ss_p, ss_t, PAGE)
    slot = _slots(idx, first + BN, end, slots, si_k, of_latent, BN)
    slot_r = _slots(idx, first + BN, end, slots, si_k, of_rope, BN)
    slot_s = _slots(idx, first + BN, end, slots, si_k, of_scale, BN)

    to_q = Q + batch * sq_b + query * sq_n
    q_head = head_block * BH + gl.arange(0, BH, gl.SliceLayout(1, left))
    q0 = _queries(to_q, q_head, heads, sq_h, 0, left, G)
    q1 = _queries(to_q, q_head, heads, sq_h, G, left, G)
    q2 = _queries(to_q, q_head, heads, sq_h, 2 * G, left, G)
    q3 = _queries(to_q, q_head, heads, sq_h, 3 * G, left, G)
    qr = _queries(to_q, q_head, heads, sq_h, D, left, R)
    if HELD < 4:
        queries = gl.allocate_shared_memory(gl.bfloat16, [4 - HELD, BH, G], query_shared)
        queries.index(3 - HELD).store(q3)
        if HELD < 3:
            queries.index(2 - HELD).store(q2)
        if HELD < 2:
            queries.index(1 - HELD).store(q1)

    latents = gl.allocate_shared_memory(LATENT.dtype.element_ty, [2, BN, D], latent_shared)
    ropes = gl.allocate_shared_memory(ROPE.dtype.element_ty, [2, BN, R], rope_shared)
    scales = gl.allocate_shared_memory(gl.float32, [8, BN], plain)

    top = gl.full([BH], float("-inf"), gl.float32, of_head)
    total = gl.full([BH], 0.0, gl.float32, of_head)
    acc0 = gl.full([BH, G], 0.0, gl.float32, mf)
    acc1 = gl.full([BH, G], 0.0, gl.float32, mf)
    acc2 = gl.full([BH, G], 0.0, gl.float32, mf)
    acc3 = gl.full([BH, G], 0.0, gl.float32, mf)
    none = gl.full([BH, BN], 0.0, gl.float32, mf)
    turn = 0
    for at in range(first, end, BN):
        kept, kept_r = latents.index(turn), ropes.index(turn)
        kept.store(latent)
        kept_r.store(rope)
        scales.index(4 * turn).store(scale0)
        scales.index(4 * turn + 1).store(scale1)
        scales.index(4 * turn + 2).store(scale2)
        scales.index(4 * turn + 3).store(scale3)
        valid = _slots(idx, at, end, slots, si_k, of_key, BN) >= 0
        # the next records are on their way while these are used, and the slots after them
        latent = _records(LATENT, slot, sl_p, sl_t, PAGE, latent_layout, D)
        rope = _records(ROPE, slot_r, sr_p, sr_t, PAGE, rope_layout, R)
        scale0 = _scale(SCALE, slot_s, ss_p, ss_t, PAGE)
        scale1 = _scale(SCALE + 1, slot_s, ss_p, ss_t, PAGE)
        scale2 = _scale(SCALE + 2, slot_s, ss_p, ss_t, PAGE)
        scale3 = _scale(SCALE + 3, slot_s, ss_p, ss_t, PAGE)
        slot = _slots(idx, at + 2 * BN, end, slots, si_k, of_latent, BN)
        slot_r = _slots(idx, at + 2 * BN, end, slots, si_k, of_rope, BN)
        slot_s = _slots(idx, at + 2 * BN, end, slots, si_k, of_scale, BN)

        s0 = scales.index(4 * turn).load(of_key)
        s1 = scales.index(4 * turn + 1).load(of_key)
        s2 = scales.index(4 * turn + 2).load(of_key)
        s3 = scales.index(4 * turn + 3).load(of_key)
        score = cdna4.mfma(qr, kept_r.permute([1, 0]).load(right), none)
        score += cdna4.mfma(q0, _keys(kept, 0, right, G), none) * s0[None, :]
        if HELD < 2:
            q1 = queries.index(1 - HELD).load(left)
        score += cdna4.mfma(q1, _keys(kept, 1, right, G), none) * s1[None, :]
        if HELD < 3:
            q2 = queries.index(2 - HELD).load(left)
        score += cdna4.mfma(q2, _keys(kept, 2, right, G), none) * s2[None, :]
        if HELD < 4:
            q3 = queries.index(3 - HELD).load(left)
        score += cdna4.mfma(q3, _keys(kept, 3, right, G), none) * s3[None, :]
        score = gl.where(valid[None, :], score * scale_log2, float("-inf"))
        most = gl.max(score, 1)
        if gl.max((most > top + SLACK).to(gl.int32), 0) > 0:
            most = gl.maximum(top, most)
            shrink = gl.where(most == float("-inf"), 0.0, gl.exp2(top - most))
            acc0, acc1 = acc0 * shrink[:, None], acc1 * shrink[:, None]
            acc2, acc3 = acc2 * shrink[:, None], acc3 * shrink[:, None]
            total, top = total * shrink, most
        # nothing seen so far: any finite reference gives weights of 0
        weight = gl.exp2(score - gl.where(top == float("-inf"), 0.0, top)[:, None])
        total += gl.sum(weight, 1)
        weight = gl.convert_layout(weight, left)
        acc0 = cdna4.mfma(
            _weights(weight, scales.index(4 * turn + 0).load(of_left)),
            _values(kept, 0, right, G),
            acc0,
        )
        acc1 = cdna4.mfma(
            _weights(weight, scales.index(4 * turn + 1).load(of_left)),
            _values(kept, 1, right, G),
            acc1,
        )
        acc2 = cdna4.mfma(
            _weights(weight, scales.index(4 * turn + 2).load(of_left)),
            _values(kept, 2, right, G),
            acc2,
        )
        acc3 = cdna4.mfma(
            _weights(weight, scales.index(4 * turn + 3).load(of_left)),
            _values(kept, 3, right, G),
            acc3,
        )
        turn = 1 - turn

    head = head_block * BH + gl.arange(0, BH, of_head)
    real = head < heads
    some = total > 0
    share = gl.where(some, 1 / total, 0.0)
    lse = gl.where(some, (top + gl.log2(total)) / LOG2E, float("-inf"))
    if DIRECT:
        if HAS_SINK:
            sink = gl.load(SINK + head, mask=real, other=float("-inf"))
            share = gl.where(some, share / (1 + gl.exp(sink - lse)), 0.0)
        to_lse = LSE + (batch * heads + head) * next_n + query
        gl.store(to_lse, gl.where(some, lse, float("inf")), mask=real)
        to = OUT + ((batch * next_n + query) * heads + head) * D
    else:
        at_head = (row * gl.num_programs(1) + piece).to(gl.int64) * heads + head
        gl.store(PART_LSE + at_head, lse, mask=real)
        to = PART + at_head * D
    _store(to, 0, acc0, share, real, of_key, G)
    _store(to, 1, acc1, share, real, of_key, G)
    _store(to, 2, acc2, share, real, of_key, G)
    _store(to, 3, acc3, share, real, of_key, G)
