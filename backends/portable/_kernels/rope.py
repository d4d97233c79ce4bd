"""Rotary positions: pairs of columns turned by each token's angle, in fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_hal.backends.portable.rows import dense, pick, power_of_two


def rotated(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool, offset: int
) -> Tensor:
    """`rope`: one pass over x, a row per token and head."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = dense(x)
    x3 = x if x.dim() == 3 else x[:, None]
    tokens, heads, dim = x3.shape
    rotary = cos_sin.shape[1]
    rest = dim - offset - rotary
    cos_sin = dense(cos_sin)
    tile = pick("rope", tokens * heads, power_of_two(dim))
    _rope[(triton.cdiv(tokens * heads, tile.rows),)](
        x3, dense(positions), cos_sin, out, tokens * heads, heads, cos_sin.shape[0],
        x3.stride(0), x3.stride(1), cos_sin.stride(0), DIM=dim, OFFSET=offset, ROTARY=rotary,
        HALF=power_of_two(rotary // 2), BEFORE=power_of_two(offset) if offset else 0,
        BEHIND=power_of_two(rest) if rest else 0, INTERLEAVED=interleaved, ROWS=tile.rows,
        **tile.options,
    )  # fmt: skip
    return out


@triton.jit
def positions_of(positions, token, ok, end):
    """Positions of some tokens; outside the table the nearest in it, so that nothing beyond is
    read."""
    position = tl.load(positions + token, mask=ok, other=0)
    return tl.minimum(tl.maximum(position, 0), end - 1).to(tl.int64)


@triton.jit
def table_of(cos_sin, position, ok, stride, ROTARY: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines [rows, HALF] of each row's position."""
    item = tl.arange(0, HALF)
    inside = ok[:, None] & (item < ROTARY // 2)[None, :]
    at = cos_sin + position[:, None] * stride + item[None, :]
    return tl.load(at, mask=inside, other=0.0), tl.load(at + ROTARY // 2, mask=inside, other=0.0)


@triton.jit
def turned(a, b, cos, sin):
    """The pairs (a, b) turned by an angle."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _copy(x, out, source, target, ok, FIRST: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [FIRST, END) as they are."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    inside = ok[:, None] & (column < END)
    values = tl.load(x + source[:, None] + column, mask=inside, other=0.0)
    tl.store(out + target[:, None] + column, values, mask=inside)


@triton.jit(do_not_specialize=["rows", "positions_end"])
def _rope(
    x, positions, cos_sin, out, rows, heads, positions_end, token_stride, head_stride,
    table_stride, DIM: tl.constexpr, OFFSET: tl.constexpr, ROTARY: tl.constexpr,
    HALF: tl.constexpr, BEFORE: tl.constexpr, BEHIND: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    token, head = row // heads, row % heads
    source = token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    target = row.to(tl.int64) * DIM
    if BEFORE:
        _copy(x, out, source, target, ok, 0, OFFSET, BEFORE)
    if BEHIND:
        _copy(x, out, source, target, ok, OFFSET + ROTARY, DIM, BEHIND)
    position = positions_of(positions, token, ok, positions_end)
    cos, sin = table_of(cos_sin, position, ok, table_stride, ROTARY, HALF)
    if INTERLEAVED:
        pair = tl.arange(0, 2 * HALF)
        inside = ok[:, None] & (pair < ROTARY)[None, :]
        column = OFFSET + pair[None, :]
        both = tl.load(x + source[:, None] + column, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [ROWS, HALF, 2]))
        a, b = turned(a, b, cos, sin)
        made = tl.reshape(tl.join(a, b), [ROWS, 2 * HALF]).to(out.dtype.element_ty)
        tl.store(out + target[:, None] + column, made, mask=inside)
    else:
        item = tl.arange(0, HALF)
        inside = ok[:, None] & (item < ROTARY // 2)[None, :]
        column = OFFSET + item[None, :]
        a_at, a_to = x + source[:, None] + column, out + target[:, None] + column
        a = tl.load(a_at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(a_at + ROTARY // 2, mask=inside, other=0.0).to(tl.float32)
        a, b = turned(a, b, cos, sin)
        tl.store(a_to, a.to(out.dtype.element_ty), mask=inside)
        tl.store(a_to + ROTARY // 2, b.to(out.dtype.element_ty), mask=inside)
