"""The Walsh-Hadamard transform as a product with signs.

Signs are exact in every float, so a 16-bit operand is multiplied exactly and summed in fp32. An
fp32 operand goes as three bf16 parts, which together hold its 24 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_hal.backends.portable.rows import flat, pick

EDGE = 128
"""Columns per product; a wider transform sums products of its parts, each with a sign of its own."""

LEAST = tl.constexpr(16)
"""Smallest edge of a product on matrix units."""


def transformed(x: Tensor) -> Tensor:
    """`hadamard`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = flat(x)
    rows, dim = x.shape
    edge = min(EDGE, dim)
    tile = pick("hadamard", rows, edge)
    _transform[(triton.cdiv(rows, tile.rows), dim // edge)](
        x, out, rows, dim, x.stride(0), dim**-0.5, EDGE=edge, WIDTH=max(LEAST.value, edge),
        SPLIT=x.dtype == torch.float32, ROWS=tile.rows, num_warps=tile.warps,
    )  # fmt: skip
    return out


@triton.jit
def _odd(bits):
    """Whether an odd number of the low 16 bits are set."""
    bits ^= bits >> 8
    bits ^= bits >> 4
    return (0x6996 >> (bits & 15)) & 1


@triton.jit
def signs(row, COLUMNS: tl.constexpr, DIM: tl.constexpr, dtype: tl.constexpr):
    """H[row, 0:COLUMNS] as +-1 [rows, COLUMNS], 0 beyond DIM. COLUMNS is 16 at least. The bits a
    row shares with a column are those shared with its high and with its low three, which spares
    most of the counting."""
    high, low = tl.arange(0, COLUMNS // 8) * 8, tl.arange(0, 8)
    ours = row[:, None]
    odd = _odd(ours & high[None, :])[:, :, None] ^ _odd(ours & low[None, :])[:, None, :]
    sign = tl.reshape(1 - 2 * odd, [row.shape[0], COLUMNS])
    if DIM < COLUMNS:
        inside = (row < DIM)[:, None] & (tl.arange(0, COLUMNS) < DIM)[None, :]
        sign = tl.where(inside, sign, 0)
    return sign.to(tl.float32).to(dtype)


@triton.jit
def signed_sum(x, sign, acc, SPLIT: tl.constexpr):
    """acc + x @ sign in fp32; `sign` has x's dtype, or bf16 where x is fp32 (SPLIT)."""
    if SPLIT:
        for _ in tl.static_range(3):
            part = x.to(tl.bfloat16)
            acc = tl.dot(part, sign, acc)
            x -= part.to(tl.float32)
    else:
        acc = tl.dot(x, sign, acc)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _transform(
    x, out, rows, dim, stride, factor, EDGE: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One part of the columns of ROWS rows."""
    kind: tl.constexpr = tl.bfloat16 if SPLIT else x.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part, column = tl.program_id(1), tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < EDGE)[None, :]
    sign = signs(column, WIDTH, EDGE, kind)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for at in range(0, dim // EDGE):
        values = tl.load(x + row[:, None] * stride + at * EDGE + column[None, :], mask=inside,
                         other=0.0)  # fmt: skip
        values = values.to(tl.float32) * (1 - 2 * _odd(at & part))  # exact
        acc = signed_sum(values.to(x.dtype.element_ty), sign, acc, SPLIT)
    target = out + row[:, None] * dim + part * EDGE + column[None, :]
    tl.store(target, (acc * factor).to(out.dtype.element_ty), mask=inside)
