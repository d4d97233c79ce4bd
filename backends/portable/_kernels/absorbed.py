"""Products of each head's own rows and weight in Triton."""

import triton
import triton.language as tl


@triton.jit
def project(
    x, weight, out, x_token, x_head, weight_head, weight_row, weight_column, out_token, out_head,
    tokens,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [tokens, heads, COLUMNS] of x [tokens, heads, WIDTH] and weight [heads, WIDTH, COLUMNS],
    all with the given strides. Grid: (blocks of columns times blocks of rows, heads)."""
    blocks = tl.cdiv(COLUMNS, BN)
    head = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) // blocks * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    rows = x + token[:, None] * x_token + head * x_head
    weight += head * weight_head
    total = tl.zeros([BM, BN], tl.float32)
    for left in range(0, WIDTH, BK):
        at = left + inner
        row = tl.load(
            rows + at[None], mask=(token < tokens)[:, None] & (at < WIDTH)[None], other=0.0
        )
        part = tl.load(
            weight + at[:, None] * weight_row + column[None] * weight_column,
            mask=(at < WIDTH)[:, None] & (column < COLUMNS)[None], other=0.0,
        )  # fmt: skip
        total = tl.dot(row, part, total, input_precision=PRECISION)
    to = out + token[:, None] * out_token + head * out_head + column[None]
    inside = (token < tokens)[:, None] & (column < COLUMNS)[None]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)
