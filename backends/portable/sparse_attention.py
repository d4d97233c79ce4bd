"""Attention over selected keys in Triton: which tiles, and the launch, for every backend that has
Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space
from dsa_hal.backends.portable.rows import FLOATS, dense, power_of_two

WIDEST = 512
"""Columns of a value, or behind it, that a program holds."""


@dataclass(frozen=True)
class Tile(Launched):
    """One program's work: `heads` of a query by `keys` at a time, its warps, and stages of keys
    under way at once."""

    heads: int
    keys: int
    warps: int
    stages: int


def legal(*, heads: int, width: int, bytes: int) -> Sequence[Tile]:
    """Tiles that 64 KB of shared memory hold, for so many heads, and columns of a value."""
    return [Tile(16, 32 if width <= 128 else 16, 4, 1)]


@dataclass(frozen=True)
class Steps(Tile):
    """The same in steps: `columns` at a time."""

    columns: int


def in_steps(*, heads: int, width: int, bytes: int) -> Sequence[Steps]:
    """As `legal`."""
    return [Steps(16 if heads <= 16 else 32, 32, 4, 1, 32)]


SPACE = Space("sparse_mla/triton", Tile, legal)
STEPS = Space("sparse_mla/triton:steps", Steps, in_steps)

WORKSPACE = 512 << 20
"""Bytes of what the steps hand on: queries are taken some at a time, as many as fit."""


def why_not(dtype: torch.dtype, dim: int, dim_v: int) -> str | None:
    """What the programs cannot do, or None."""
    if dtype not in FLOATS:
        return f"q is {dtype}; it takes bfloat16, float16 and float32"
    if dim_v > WIDEST or dim - dim_v > WIDEST:
        return f"keys have {dim_v} and {dim - dim_v} columns; it takes up to {WIDEST} of each"
    return None


def _columns(count: int) -> int:
    """The width of a tile that holds so many columns: products want 16 at least."""
    return max(16, power_of_two(count))


def attended(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, dim_v: int,
    attn_sink: Tensor | None, topk_length: Tensor | None, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, max_logits and lse of `sparse_mla`. precision: how fp32 is multiplied, one of `tl.dot`'s
    `input_precision`."""
    from dsa_hal.backends.portable._kernels import sparse_mla as kernels

    (tokens, heads, dim), k = q.shape, indices.shape[1]
    q, kv, indices = dense(q), dense(kv), dense(indices)
    lengths = None if topk_length is None else dense(topk_length)
    sink = None if attn_sink is None else dense(attn_sink)
    out = torch.empty(tokens, heads, dim_v, dtype=q.dtype, device=q.device)
    top = torch.empty(tokens, heads, device=q.device)
    lse = torch.empty(tokens, heads, device=q.device)
    if tokens == 0:
        return out, top, lse
    if q.dtype == torch.float32:  # whose queries and means no program holds whole
        _by_steps(q, kv, indices, lengths, sink, out, top, lse, softmax_scale, precision)
        return out, top, lse
    tile = SPACE.pick(heads=heads, width=dim_v, bytes=q.element_size())
    kernels.attend[(tokens * -(-heads // tile.heads),)](
        q, kv, indices, lengths, sink, out, top, lse,
        q.stride(0), q.stride(1), kv.stride(0), indices.stride(0), kv.shape[0], heads, k,
        softmax_scale, WIDTH=dim, VALUES=dim_v, VALUE_BLOCK=_columns(dim_v),
        REST_BLOCK=_columns(dim - dim_v), HAS_LENGTHS=lengths is not None,
        HAS_SINK=sink is not None, HEADS_BLOCK=tile.heads, KEYS_BLOCK=tile.keys,
        PRECISION=precision, **tile.options,
    )  # fmt: skip
    return out, top, lse


def _by_steps(
    q: Tensor, kv: Tensor, indices: Tensor, lengths: Tensor | None, sink: Tensor | None,
    out: Tensor, top: Tensor, lse: Tensor, softmax_scale: float, precision: str,
) -> None:  # fmt: skip
    from dsa_hal.backends.portable._kernels import shares

    (tokens, heads, dim), (context, k) = q.shape, (kv.shape[0], indices.shape[1])
    if not k:
        out.zero_(), top.fill_(-torch.inf), lse.fill_(torch.inf)
        return
    tile = STEPS.pick(heads=heads, width=out.shape[2], bytes=q.element_size())
    tiles, head_blocks = -(-k // tile.keys), -(-heads // tile.heads)
    most = max(1, min(tokens, WORKSPACE // (4 * heads * k)))
    parts = torch.empty(most, heads, k, device=q.device)
    peaks, totals = (torch.empty(most, tiles, heads, device=q.device) for _ in range(2))
    for first in range(0, tokens, most):
        count = min(most, tokens - first)
        shares.attend[(count * head_blocks * tiles,)](
            q, kv, None, None, indices, lengths, parts, peaks, totals, q.stride(0), q.stride(1),
            kv.stride(0), indices.stride(0), first, count, context, heads, k, softmax_scale,
            PICKED=True, ALONE=True, WIDTH=dim, ROWS_BLOCK=tile.heads, KEYS_BLOCK=tile.keys,
            COLUMNS_BLOCK=tile.columns, PRECISION=precision, **tile.options,
        )  # fmt: skip
        shares.relate[(count * -(-heads // 16),)](
            None, None, peaks, totals, sink, top, lse, first, context, heads, k, PICKED=True,
            HEADS_BLOCK=16, KEYS_BLOCK=tile.keys, TILES_BLOCK=power_of_two(tiles), num_warps=4,
        )  # fmt: skip
        shares.gain[(count * -(-out.shape[2] // tile.columns) * head_blocks,)](
            kv, indices, lengths, parts, peaks, out, kv.stride(0), indices.stride(0), first,
            context, heads, k, VALUES=out.shape[2], HEADS_BLOCK=tile.heads, KEYS_BLOCK=tile.keys,
            COLUMNS_BLOCK=tile.columns, PRECISION=precision, **tile.options,
        )  # fmt: skip
