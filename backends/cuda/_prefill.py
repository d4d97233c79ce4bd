"""What sparse_mla and dense_mla share on NVIDIA GPUs: how `sparse_prefill.cu` is launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Space
from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.portable.dense import merge, without_gaps

NEEDS = _nvrtc.NEEDS
PROCESSORS = 132
"""Multiprocessors of the H200: one block on each."""

ROWS, KEYS, VALUES, STAGES, HELD = 64, 48, 512, 3, 5
"""As in the source: rows of a block, keys of a tile, columns of a value, tiles of keys in shared
memory, pieces of 64 columns of Q that are in registers instead."""

RESTART = 8
"""Tiles of keys that take as long as a block's change from one part of its work to the next."""


@dataclass(frozen=True)
class Config:
    """splits: parts into which the keys of a block's rows are cut."""

    splits: int


def _legal(*, blocks: int, tiles: int) -> list[Config]:
    """For so many blocks of rows with up to so many tiles of keys each."""

    def time(splits: int) -> int:
        return -(-blocks * splits // PROCESSORS) * (-(-tiles // splits) + RESTART)

    most = max(1, min(64, tiles, 8 * PROCESSORS // max(1, blocks)))
    return [Config(s) for s in sorted(range(1, most + 1), key=lambda s: (time(s), s))]


SPACE = Space("dense_mla/cuda", Config, _legal)


def why_not(dtype: torch.dtype, dim: int, dim_v: int) -> str | None:
    """What the kernel cannot do, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"q is {dtype}; it takes bfloat16 and float16"
    if dim_v != VALUES or dim not in (512, 576):
        return f"keys have {dim} columns, {dim_v} of them values; it takes 512 or 576 and 512"
    return None


def selected(
    q: Tensor, kv: Tensor, indices: Tensor, *, softmax_scale: float, attn_sink: Tensor | None,
    topk_length: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, max_logits and lse of `sparse_mla`."""
    (tokens, heads, _), k = q.shape, indices.shape[1]
    out = torch.empty(tokens, heads, VALUES, dtype=q.dtype, device=q.device)
    top = torch.empty(tokens, heads, device=q.device)
    lse = torch.empty(tokens, heads, device=q.device)
    if tokens:
        _launch(
            q, kv, indices, topk_length, attn_sink, out, top, lse, None, k=k, splits=1,
            blocks=tokens * -(-heads // ROWS), scale=softmax_scale,
        )  # fmt: skip
    return out, top, lse


def ranged(
    q: Tensor, kv: Tensor, ks: Tensor, ke: Tensor, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse of `dense_mla`; keys are split among blocks where these are few, and the parts
    merged."""
    tokens, heads, _ = q.shape
    out = torch.empty(tokens, heads, VALUES, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, device=q.device)
    if tokens == 0:
        return out, lse
    blocks = -(-tokens * heads // ROWS)
    tiles = -(-kv.shape[0] // KEYS)
    rounded = 1 << (tiles - 1).bit_length() if tiles > 1 else 1
    splits = SPACE.pick(blocks=min(blocks, 8 * PROCESSORS), tiles=rounded).splits
    part, logs = None, lse
    if splits > 1:
        part = torch.empty(splits, tokens, heads, VALUES, device=q.device)
        logs = torch.empty(splits, tokens, heads, device=q.device)
    _launch(
        q, kv, ks, ke, None, out, None, logs, part, k=0, splits=splits,
        blocks=blocks * splits, scale=softmax_scale, ranges=True,
    )  # fmt: skip
    if part is not None:
        merge(part, logs, out, lse)
    return out, lse


def _launch(
    q: Tensor, kv: Tensor, indices: Tensor, lengths: Tensor | None, sink: Tensor | None,
    out: Tensor, top: Tensor | None, lse: Tensor, part: Tensor | None, *, k: int, splits: int,
    blocks: int, scale: float, ranges: bool = False,
) -> None:  # fmt: skip
    q, kv, indices = _aligned(q), _aligned(kv), without_gaps(indices)
    lengths, sink = (None if t is None else without_gaps(t) for t in (lengths, sink))
    tokens, heads, dim = q.shape
    defines: tuple[tuple[str, int], ...] = (("WIDTH", dim),)
    if q.dtype == torch.float16:
        defines += (("HALF", 1),)
    if ranges:
        defines += (("RANGES", 1),)
    _nvrtc.module("sparse_prefill.cu", defines).launch(
        "attend", (min(PROCESSORS, blocks),), (512,),
        (
            q, kv, indices, *(0 if t is None else t for t in (lengths, sink)), out,
            *(0 if t is None else t for t in (top, lse, part)), q.stride(0), q.stride(1),
            kv.stride(0), indices.stride(0), tokens, heads, kv.shape[0], k, splits, scale,
        ),
        shared=shared_bytes(dim),
    )  # fmt: skip


def shared_bytes(dim: int) -> int:
    """Shared memory of a block: tiles of keys, pieces of Q, two tiles of P, and small things."""
    pieces = dim // 64
    keys, queries = STAGES * pieces * KEYS * 128, (pieces - HELD) * ROWS * 128
    return keys + queries + 2 * ROWS * 128 + 1024


def _aligned(t: Tensor) -> Tensor:
    """`t`, whose rows kernels copy 16 bytes at a time; a copy where these cannot be."""
    t, size = without_gaps(t), t.element_size()
    ragged = t.data_ptr() % 16 or any(s * size % 16 for s in t.stride()[:-1])
    return t.clone(memory_format=torch.contiguous_format) if ragged else t
