"""Products with weights in plain Triton: FP8 with block scales, floats, both by groups of rows.

Every kernel makes one tile [BM, BN] of the product per program. Offsets of rows and groups are
64-bit, since a stack of experts' weights exceeds 2^31 elements. Each 128 of k are accumulated by
themselves and then added in fp32 with their scales: some matrix units keep fewer bits inside one
chain of instructions.
"""

import triton
import triton.language as tl

from dsa_hal.backends.portable._kernels.fp8 import spoken, understood

BLOCK = tl.constexpr(128)
NO_GROUP = tl.constexpr(2**31 - 1)


@triton.jit
def _tile_at(pid, m, n, BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr):
    """Row and column of a tile. SPAN tiles of rows are walked together, so that tiles computed at
    about the same time share rows of both operands in the last cache."""
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    first = pid // (SPAN * tiles_n) * SPAN
    span = tl.minimum(tiles_m - first, SPAN)
    inside = pid % (SPAN * tiles_n)
    return first + inside % span, inside // span


@triton.jit
def _fp8_product(
    acc, a, a_scale, b, b_scale, rows, rows_ok, cols, cols_ok, k,
    stride_a, stride_as, stride_b, stride_bs, FNUZ: tl.constexpr,
):  # fmt: skip
    """acc plus the scaled product of some rows of a and some rows of b; rows that are not ok add
    nothing, whatever lies there."""
    inner = tl.arange(0, BLOCK)
    a_at = a + rows.to(tl.int64)[:, None] * stride_a + inner[None, :]
    b_at = b + cols.to(tl.int64)[None, :] * stride_b + inner[:, None]
    a_scale_at = a_scale + rows.to(tl.int64) * stride_as
    b_scale_at = b_scale + (cols // BLOCK).to(tl.int64) * stride_bs
    for block in range(0, tl.cdiv(k, BLOCK)):
        inside = inner < k - block * BLOCK
        left = tl.load(a_at, mask=rows_ok[:, None] & inside[None, :], other=0.0)
        right = tl.load(b_at, mask=cols_ok[None, :] & inside[:, None], other=0.0)
        part = understood(tl.dot(spoken(left, FNUZ), spoken(right, FNUZ)), left, FNUZ)
        row_scale = tl.load(a_scale_at + block, mask=rows_ok, other=0.0)
        col_scale = tl.load(b_scale_at + block, mask=cols_ok, other=0.0)
        acc += part * (row_scale[:, None] * col_scale[None, :])
        a_at += BLOCK
        b_at += BLOCK
    return acc


@triton.jit
def _store(out, acc, rows, rows_ok, cols, cols_ok, stride):
    at = out + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=rows_ok[:, None] & cols_ok[None, :])


@triton.jit(do_not_specialize=["m"])
def fp8_gemm(
    a, a_scale, b, b_scale, out, m, n, k,
    stride_a, stride_as, stride_b, stride_bs, stride_out,
    BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One tile of a @ b.T; grid [tiles]."""
    tile_m, tile_n = _tile_at(tl.program_id(0), m, n, BM, BN, SPAN)
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    acc = _fp8_product(
        tl.zeros((BM, BN), tl.float32), a, a_scale, b, b_scale, rows, rows < m, cols, cols < n, k,
        stride_a, stride_as, stride_b, stride_bs, FNUZ,
    )  # fmt: skip
    _store(out, acc, rows, rows < m, cols, cols < n, stride_out)


@triton.jit(do_not_specialize=["m", "groups"])
def grouped_fp8_gemm(
    a, a_scale, b, b_scale, layout, out, m, n, k, groups,
    stride_a, stride_as, stride_bg, stride_b, stride_bsg, stride_bs, stride_out,
    BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One tile of the product of rows with their groups' weights; grid [tiles]. A tile whose rows
    are of several groups is computed once for each of them, with the other rows left out."""
    tile_m, tile_n = _tile_at(tl.program_id(0), m, n, BM, BN, SPAN)
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    group_of = tl.load(layout + rows, mask=rows < m, other=-1)
    acc = tl.zeros((BM, BN), tl.float32)
    group = tl.min(tl.where(group_of < 0, NO_GROUP, group_of))
    while group < groups:
        acc = _fp8_product(
            acc, a, a_scale, b + group.to(tl.int64) * stride_bg,
            b_scale + group.to(tl.int64) * stride_bsg, rows, group_of == group, cols, cols < n, k,
            stride_a, stride_as, stride_b, stride_bs, FNUZ,
        )  # fmt: skip
        group = tl.min(tl.where(group_of > group, group_of, NO_GROUP))
    _store(out, acc, rows, rows < m, cols, cols < n, stride_out)


@triton.jit(do_not_specialize=["max_m"])
def grouped_fp8_gemm_masked(
    a, a_scale, b, b_scale, masked_m, out, max_m, n, k,
    stride_ag, stride_a, stride_asg, stride_as, stride_bg, stride_b, stride_bsg, stride_bs,
    stride_outg, stride_out,
    BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One tile of one group's product; grid [tiles, groups]."""
    tile_m, tile_n = _tile_at(tl.program_id(0), max_m, n, BM, BN, SPAN)
    group = tl.program_id(1).to(tl.int64)
    count = tl.load(masked_m + group)
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if tile_m * BM < count:
        acc = _fp8_product(
            acc, a + group * stride_ag, a_scale + group * stride_asg, b + group * stride_bg,
            b_scale + group * stride_bsg, rows, rows < count, cols, cols < n, k,
            stride_a, stride_as, stride_b, stride_bs, FNUZ,
        )  # fmt: skip
    _store(out + group * stride_outg, acc, rows, rows < max_m, cols, cols < n, stride_out)


@triton.jit(do_not_specialize=["m", "groups"])
def grouped_gemm(
    a, b, layout, out, m, n, k, groups, stride_a, stride_bg, stride_b, stride_out,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """`grouped_fp8_gemm` of floats of one dtype; fp32 is multiplied as fp32."""
    tile_m, tile_n = _tile_at(tl.program_id(0), m, n, BM, BN, SPAN)
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    group_of = tl.load(layout + rows, mask=rows < m, other=-1)
    acc = tl.zeros((BM, BN), tl.float32)
    group = tl.min(tl.where(group_of < 0, NO_GROUP, group_of))
    while group < groups:
        a_at = a + rows.to(tl.int64)[:, None] * stride_a + inner[None, :]
        b_at = b + group.to(tl.int64) * stride_bg
        b_at += cols.to(tl.int64)[None, :] * stride_b + inner[:, None]
        for at in range(0, k, BK):
            mine = (group_of == group)[:, None] & (inner < k - at)[None, :]
            theirs = (cols < n)[None, :] & (inner < k - at)[:, None]
            acc = tl.dot(
                tl.load(a_at, mask=mine, other=0.0),
                tl.load(b_at, mask=theirs, other=0.0),
                acc,
                input_precision="ieee",
            )
            a_at += BK
            b_at += BK
        group = tl.min(tl.where(group_of > group, group_of, NO_GROUP))
    _store(out, acc, rows, rows < m, cols, cols < n, stride_out)
