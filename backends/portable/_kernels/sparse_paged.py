"""Attention of few queries over selected records of a paged cache, the keys of a query split among
programs; what a row's programs found is joined by `combine`."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_row(
    row, head_block, first, end, piece, direct,
    Q, LATENT, SCALE, ROPE, IDX, LEN, SINK, OUT, LSE, PART, PART_LSE,
    scale_log2, next_n, heads, k, page_size, slots,
    sq_b, sq_n, sq_h, sl_p, sl_t, ss_p, ss_t, sr_p, sr_t, si_b, si_n, si_k, st_b, st_n,
    L: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, DL: tl.constexpr, GROUP: tl.constexpr,
    BL: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    HAS_LEN: tl.constexpr, HAS_SINK: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """One row's keys [first, end) for one block of heads. Piece `piece` of the partial results is
    written, or, if `direct`, the row's answer. DL of a result's DV columns come from the latent."""
    batch, query = (row // next_n).to(tl.int64), (row % next_n).to(tl.int64)
    head = head_block * BH + tl.arange(0, BH)
    real = head < heads
    cl, cr, cn = tl.arange(0, BL), tl.arange(0, BR), tl.arange(0, BN)
    q_row = Q + batch * sq_b + query * sq_n + head[:, None].to(tl.int64) * sq_h
    ql = tl.load(q_row + cl[None, :], mask=real[:, None] & (cl < L)[None, :], other=0).to(MATH)
    qr = tl.load(q_row + L + cr[None, :], mask=real[:, None] & (cr < R)[None, :], other=0).to(MATH)
    length = tl.minimum(k, tl.load(LEN + batch * st_b + query * st_n)) if HAS_LEN else k
    end = tl.minimum(end, length)
    idx_row = IDX + batch * si_b + query * si_n

    top = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, BL], tl.float32)
    if DV > L:
        acc_r = tl.zeros([BH, BR], tl.float32)
    for at in range(first, end, BN):
        slot = tl.load(idx_row + (at + cn) * si_k, mask=at + cn < end, other=-1)
        # a slot outside the pool is undefined; here it counts as none
        valid = (slot >= 0) & (slot < slots)
        slot = tl.where(valid, slot, 0)
        page, token = (slot // page_size).to(tl.int64), (slot % page_size).to(tl.int64)
        base = LATENT + page * sl_p + token * sl_t
        kept = valid[:, None] & (cl < L)[None, :]
        latent = tl.load(base[:, None] + cl[None, :], mask=kept)
        if GROUP > 0:
            scale = (SCALE + page * ss_p + token * ss_t)[:, None] + (cl // GROUP)[None, :]
            latent = latent.to(tl.float32) * tl.load(scale, mask=kept)
        latent = tl.where(kept, latent, 0)
        latent = latent.to(MATH)
        rope = tl.load(
            (ROPE + page * sr_p + token * sr_t)[:, None] + cr[None, :],
            mask=valid[:, None] & (cr < R)[None, :], other=0,
        ).to(MATH)  # fmt: skip
        score = tl.dot(ql, tl.trans(latent), input_precision="ieee")
        score = tl.dot(qr, tl.trans(rope), score, input_precision="ieee")
        score = tl.where(valid[None, :], score * scale_log2, float("-inf"))
        most = tl.maximum(top, tl.max(score, 1))
        # nothing seen so far: any finite reference gives weights of 0
        reference = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp2(score - reference[:, None])
        shrink = tl.exp2(top - reference)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(MATH), latent, acc * shrink[:, None], input_precision="ieee")
        if DV > L:
            acc_r = tl.dot(weight.to(MATH), rope, acc_r * shrink[:, None], input_precision="ieee")
        top = most

    some = total > 0
    share = tl.where(some, 1 / total, 0.0)
    lse = tl.where(some, (top + tl.log2(total)) / LOG2E, float("-inf"))
    columns = real[:, None] & (cl < DL)[None, :]
    columns_r = real[:, None] & (cr < DV - L)[None, :]
    if direct:
        if HAS_SINK:
            sink = tl.load(SINK + head, mask=real, other=float("-inf"))
            share = tl.where(some, share / (1 + tl.exp(sink - lse)), 0.0)
        to_lse = LSE + (batch * heads + head) * next_n + query
        tl.store(to_lse, tl.where(some, lse, float("inf")), mask=real)
        to = OUT + (batch * next_n + query) * heads * DV + head[:, None] * DV
        tl.store(to + cl[None, :], (acc * share[:, None]).to(OUT.dtype.element_ty), mask=columns)
        if DV > L:
            last = (acc_r * share[:, None]).to(OUT.dtype.element_ty)
            tl.store(to + L + cr[None, :], last, mask=columns_r)
    else:
        at_head = piece.to(tl.int64) * heads + head
        tl.store(PART_LSE + at_head, lse, mask=real)
        to_part = PART + at_head[:, None] * DV
        tl.store(to_part + cl[None, :], acc * share[:, None], mask=columns)
        if DV > L:
            tl.store(to_part + L + cr[None, :], acc_r * share[:, None], mask=columns_r)


@triton.jit
def attend(
    Q, LATENT, SCALE, ROPE, IDX, LEN, SINK, OUT, LSE, PART, PART_LSE, SCHEDULE, SPLITS,
    scale_log2, rows, next_n, heads, k, page_size, slots, span,
    sq_b, sq_n, sq_h, sl_p, sl_t, ss_p, ss_t, sr_p, sr_t, si_b, si_n, si_k, st_b, st_n,
    L: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, DL: tl.constexpr, GROUP: tl.constexpr,
    BL: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    HAS_LEN: tl.constexpr, HAS_SINK: tl.constexpr, MATH: tl.constexpr,
    PLANNED: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [rows * head blocks, pieces of `span` keys], or, PLANNED, [workers * head blocks]; what
    shares keys runs side by side.

    Q [batch, next_n, heads, L + R]; LATENT, SCALE, ROPE: views of the records' parts
    [pages, page_size, count] (SCALE unread where GROUP is 0); IDX [batch, next_n, k]; LEN
    [batch, next_n]; SINK [heads]; OUT [batch, next_n, heads, DV], LSE [batch, heads, next_n] of
    rows in one piece; PART [pieces, heads, DV] and PART_LSE [pieces, heads] fp32 of the others;
    SCHEDULE [workers, 4] and SPLITS [rows + 1] of `plan` in blocks of BLOCK keys.
    """
    head_blocks = (heads + BH - 1) // BH
    head_block = tl.program_id(0) % head_blocks
    if PLANNED:
        worker = tl.program_id(0) // head_blocks
        row = tl.load(SCHEDULE + worker * 4)
        block = tl.load(SCHEDULE + worker * 4 + 1)
        last = tl.minimum(tl.load(SCHEDULE + worker * 4 + 2), rows - 1)
        stop = tl.load(SCHEDULE + worker * 4 + 3)
        # pieces are numbered row by row and worker by worker: those before this worker's first
        others = tl.arange(0, BW)
        before = others < worker
        begins = tl.load(SCHEDULE + others * 4, mask=before, other=0)
        ends = tl.minimum(tl.load(SCHEDULE + others * 4 + 2, mask=before, other=-1), rows - 1)
        piece = tl.sum(tl.where(before, ends - begins + 1, 0), 0)
        for step in range(0, last + 1 - row):
            at = row + step
            first = tl.where(at == row, block, 0) * BLOCK
            end = tl.where(at == last, stop * BLOCK, k)
            pieces = tl.load(SPLITS + at + 1) - tl.load(SPLITS + at)
            _attend_row(
                at, head_block, first, end, piece, pieces <= 1,
                Q, LATENT, SCALE, ROPE, IDX, LEN, SINK, OUT, LSE, PART, PART_LSE,
                scale_log2, next_n, heads, k, page_size, slots,
                sq_b, sq_n, sq_h, sl_p, sl_t, ss_p, ss_t, sr_p, sr_t, si_b, si_n, si_k, st_b, st_n,
                L, R, DV, DL, GROUP, BL, BR, BH, BN, HAS_LEN, HAS_SINK, MATH,
            )  # fmt: skip
            piece += 1
    else:
        row, split = tl.program_id(0) // head_blocks, tl.program_id(1)
        splits = tl.num_programs(1)
        _attend_row(
            row, head_block, split * span, split * span + span, row * splits + split, splits == 1,
            Q, LATENT, SCALE, ROPE, IDX, LEN, SINK, OUT, LSE, PART, PART_LSE,
            scale_log2, next_n, heads, k, page_size, slots,
            sq_b, sq_n, sq_h, sl_p, sl_t, ss_p, ss_t, sr_p, sr_t, si_b, si_n, si_k, st_b, st_n,
            L, R, DV, DL, GROUP, BL, BR, BH, BN, HAS_LEN, HAS_SINK, MATH,
        )  # fmt: skip
