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
"""Columns per product; a wider transform sums its parts' products, each with a sign of its own."""

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
        PARTS=dim // edge, SPLIT=x.dtype == torch.float32, ROWS=tile.rows,
        **tile.options,
    )  # fmt: skip
    return out


@triton.jit
def _odd(bits):
    """Whether an odd number of the low 16 bits are set."""
    bits ^= bits >> 8
    bits ^= bits >> 4
    return (0x6996 >> (bits & 15)) & 1


@triton.jit
def signs(any, row, COLUMNS: tl.constexpr, DIM: tl.constexpr, dtype: tl.constexpr):
    """H[row, 0:COLUMNS] as +-1 [rows, COLUMNS], 0 beyond DIM. COLUMNS is 16 at least.

    Bits are put together, as conversions are slow; those of a column's low three bits stand apart,
    as eight neighbours differ in nothing else. `any` is a pointer that is not read.
    """
    ONE: tl.constexpr = 0x3F80 if dtype == tl.bfloat16 else 0x3C00
    column = tl.arange(0, COLUMNS)
    both = row[:, None] & column[None, :]
    odd = (_odd(both & ~7) ^ both ^ (both >> 1) ^ (both >> 2)) & 1
    sign = (odd << 15) | ONE
    if DIM < COLUMNS:
        sign = tl.where((row < DIM)[:, None] & (column < DIM)[None, :], sign, 0)
    sign = sign.to(tl.int16).to(dtype, bitcast=True)
    # A load that never happens: it makes neighbours lie in one thread, so that they are written to
    # shared memory 16 bytes at a time.
    at = any.to(tl.pointer_type(dtype)) + row[:, None] * COLUMNS + column[None, :]
    return tl.load(at, mask=(row < 0)[:, None] & (column < COLUMNS)[None, :], other=sign)


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
    PARTS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One part of the columns of ROWS rows."""
    kind: tl.constexpr = tl.bfloat16 if SPLIT else x.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part, column = tl.program_id(1), tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < EDGE)[None, :]
    source = x + row[:, None] * stride + column[None, :]
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if PARTS == 1:
        values = tl.load(source, mask=inside, other=0.0)  # under way while signs are made
        acc = signed_sum(values, signs(x, column, WIDTH, EDGE, kind), acc, SPLIT)
    else:
        sign = signs(x, column, WIDTH, EDGE, kind)
        # Parts are added outside the matrix unit, which drops bits in long sums.
        for at in range(0, PARTS):
            values = tl.load(source + at * EDGE, mask=inside, other=0.0)
            one = signed_sum(values, sign, tl.zeros([ROWS, WIDTH], tl.float32), SPLIT)
            acc += one * (1 - 2 * _odd(at & part))
    target = out + row[:, None] * dim + part * EDGE + column[None, :]
    tl.store(target, (acc * factor).to(out.dtype.element_ty), mask=inside)
