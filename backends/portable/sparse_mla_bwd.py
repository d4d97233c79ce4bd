"""The gradients of attention over selected keys in Triton: which tiles, and the launches of the
steps, for every backend that has Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space
from dsa_hal.backends.portable.ordered import collected, keys_of
from dsa_hal.backends.portable.rows import FLOATS, dense, power_of_two

WORKSPACE = 512 << 20
"""Bytes of what the steps hand on: queries are taken some at a time, as many as fit."""


@dataclass(frozen=True)
class Tile(Launched):
    """One program's work: `heads` of a query by `keys` by `columns`, all or one after another as
    its step has it, its warps, and stages under way at once."""

    heads: int
    keys: int
    columns: int
    warps: int
    stages: int


def legal(*, heads: int, bytes: int) -> Sequence[Tile]:
    """Tiles that 64 KB of shared memory hold, for so many heads, and bytes of an element."""
    return [Tile(16 if heads <= 16 else 32, 32, 32, 4, 2)]


SPACES = {
    step: Space(f"sparse_mla_bwd/triton:{step}", Tile, legal) for step in ("weigh", "pull", "push")
}


def why_not(dtype: torch.dtype) -> str | None:
    """What the programs cannot do, or None."""
    return None if dtype in FLOATS else f"q is {dtype}; it takes bfloat16, float16 and float32"


def differentiated(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *,
    softmax_scale: float, dim_v: int, topk_length: Tensor | None, repeats: bool, precision: str,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq and dkv of `sparse_mla_bwd`.

    repeats    gradients of keys are summed in the queries' order, so that calls repeat; else
               atomically
    precision  how fp32 is multiplied, one of `tl.dot`'s `input_precision`
    """
    from dsa_hal.backends.portable._kernels import sparse_mla_bwd as kernels

    (tokens, heads, dim), k, context = q.shape, indices.shape[1], kv.shape[0]
    dq = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    if not tokens or not k:
        return dq.zero_(), torch.zeros(kv.shape, device=q.device)
    q, kv, indices, out, lse, dout = (dense(t) for t in (q, kv, indices, out, lse, dout))
    lengths = None if topk_length is None else dense(topk_length)
    dkv = torch.zeros(kv.shape, device=q.device)
    mean = torch.empty(tokens, heads, device=q.device)
    kernels.agree[(tokens * -(-heads // 16),)](
        out, dout, mean, out.stride(0), out.stride(1), dout.stride(0), dout.stride(1), heads,
        VALUES=dim_v, VALUE_BLOCK=power_of_two(dim_v), HEADS_BLOCK=16, num_warps=4,
    )  # fmt: skip
    most = max(1, min(tokens, workspace // (2 * heads * k * q.element_size())))
    shares, slopes = (torch.empty(most, heads, k, dtype=q.dtype, device=q.device) for _ in "ps")
    some, rows, named = most, dkv, None
    if repeats:
        named = keys_of(indices, lengths, context)
        some = max(1, min(most, workspace // (4 * k * dim)))
        rows = torch.empty(some, 1, k, dim, device=q.device)
    weigh, pull, push = (
        SPACES[step].pick(heads=heads, bytes=q.element_size()) for step in ("weigh", "pull", "push")
    )
    for first in range(0, tokens, most):
        count = min(most, tokens - first)
        kernels.weigh[(count * -(-k // weigh.keys) * -(-heads // weigh.heads),)](
            q, kv, indices, lengths, mean, lse, dout, shares, slopes, q.stride(0), q.stride(1),
            kv.stride(0), indices.stride(0), lse.stride(0), dout.stride(0), dout.stride(1),
            first, context, heads, k, softmax_scale, WIDTH=dim, VALUES=dim_v,
            HEADS_BLOCK=weigh.heads, KEYS_BLOCK=weigh.keys, COLUMNS_BLOCK=weigh.columns,
            PRECISION=precision, **weigh.options,
        )  # fmt: skip
        kernels.pull[(count * -(-dim // pull.columns) * -(-heads // pull.heads),)](
            kv, indices, lengths, slopes, dq, kv.stride(0), indices.stride(0), first, context,
            heads, k, WIDTH=dim, HEADS_BLOCK=pull.heads, KEYS_BLOCK=pull.keys,
            COLUMNS_BLOCK=pull.columns, PRECISION=precision, **pull.options,
        )  # fmt: skip
        for at in range(0, count, some):
            few = min(some, count - at)
            kernels.push[(few * -(-k // push.keys) * -(-dim // push.columns),)](
                q, indices, lengths, dout, shares[at:], slopes[at:], rows, q.stride(0), q.stride(1),
                indices.stride(0), dout.stride(0), dout.stride(1), first + at, context, heads, k,
                ADDED=not repeats, WIDTH=dim, VALUES=dim_v, HEADS_BLOCK=push.heads,
                KEYS_BLOCK=push.keys, COLUMNS_BLOCK=push.columns, PRECISION=precision,
                **push.options,
            )  # fmt: skip
            if named is not None:
                here = slice(first + at, first + at + few)
                collected(rows[:few], named[here], dkv)
    return dq, dkv
