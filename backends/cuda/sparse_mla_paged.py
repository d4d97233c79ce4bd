"""sparse_mla_paged on NVIDIA GPUs."""

import struct

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.portable import layouts, processors
from dsa_hal.backends.portable.sparse_paged import BLOCK, forward, join, splits_of
from dsa_hal.errors import BadInput
from dsa_hal.ops.attention import sparse_mla_paged
from dsa_hal.ops.layout import KVLayout

PROMISES = ("deterministic", "lse=natural")
LAYOUT = "latent_fp8/512+64"
LOG2E = 1.4426950408889634
ALONE, PLANNED, JOINED, EVEN = range(4)
"""The kernel's modes: a row in one piece or in several of a size; in pieces as a schedule says; in
pieces that the blocks of a cluster join among themselves; all rows' keys in equal parts."""

THREADS = 512
PIECES = 16
"""More of a row cost more to join than they save."""

CLUSTER = 2
"""Pieces up to which a cluster joins faster than a second kernel does (H200); it can join 8."""

START, JOIN, JOINED_AT_ONCE = 2, 2, 2048
"""Blocks of keys that take as long as a row's start, and as a second kernel's; rows and heads that
it joins while the first one takes a block."""


def even(rows: int, heads: int, blocks: int, workers: int) -> tuple[int, int] | None:
    """(blocks of keys of a worker, places for a row's pieces) if equal parts of all rows' blocks
    take less time than whole rows, one after the other, do; else None."""
    if blocks < 2 or not workers:  # nothing to cut
        return None
    span, waves = -(-rows * blocks // workers), -(-rows // workers)
    parts = span + START * (-(-span // blocks) + 1) + JOIN + rows * heads // JOINED_AT_ONCE
    if parts >= waves * (blocks + START):
        return None
    return span, (blocks + span - 2) // span + 1


def _tiled_why_not(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> str | None:  # fmt: skip
    return layouts.unknown(layout)


@sparse_mla_paged.impl(
    "cuda", "triton", contract=1, arch=("sm90",), needs=("triton>=3.6",), promises=PROMISES,
    why_not=_tiled_why_not,
)  # fmt: skip
def portable(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Any dtype, any number of heads. Keys are split by shapes and the number of
    processors alone, or as the schedule says."""
    return forward(
        q, pages, indices, layout=layout, softmax_scale=softmax_scale, dim_v=dim_v,
        attn_sink=attn_sink, topk_length=topk_length, schedule=schedule, num_splits=num_splits,
        processors=processors.count(q.device),
    )  # fmt: skip


def _why_not(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> str | None:  # fmt: skip
    if layout != LAYOUT or dim_v != 512:
        return f"layout is {layout} and dim_v {dim_v}; it takes {LAYOUT} and 512"
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}; it takes bfloat16"
    return None


def aligned(t: Tensor, bytes: int = 16) -> bool:
    """Whether rows of the last axis are dense and start at multiples of `bytes`."""
    steps = (t.stride(i) * t.element_size() for i in range(t.dim() - 1) if t.shape[i] > 1)
    return t.stride(-1) == 1 and t.data_ptr() % bytes == 0 and not any(s % bytes for s in steps)


def shared_bytes(heads: int) -> int:
    """What a block of `heads` heads keeps: queries, two blocks of keys, weights, and 2 KB of small
    things; tiles begin at multiples of 1024."""
    return 9 * heads * 128 + 2 * 9 * 64 * 128 + 64 * 128 + 1984 + 1024


def quotient(divisor: int) -> tuple[int, int]:
    """(m, s) with n * m >> s equal to n // divisor for every n below 2^31: m is 2^s / divisor,
    rounded up, and its excess over n stays below one part in divisor."""
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


@sparse_mla_paged.impl(
    "cuda", "cuda", contract=1, arch=("sm90",), needs=("triton>=3.6", *_nvrtc.NEEDS), rank=2,
    promises=PROMISES, why_not=_why_not,
)  # fmt: skip
def hopper(
    q: Tensor, pages: Tensor, indices: Tensor, *, layout: str, softmax_scale: float,
    dim_v: int = 512, attn_sink: Tensor | None = None, topk_length: Tensor | None = None,
    schedule: Tensor | None = None, num_splits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FP8 records, decoded in registers on their way into the tensor cores."""
    if (reason := KVLayout.parse(layout).why_not(pages)) is not None:
        raise BadInput(f"sparse_mla_paged: {reason}")
    if not aligned(pages):  # records are read in pieces of 16 bytes
        return portable(
            q, pages, indices, layout=layout, softmax_scale=softmax_scale, dim_v=dim_v,
            attn_sink=attn_sink, topk_length=topk_length, schedule=schedule, num_splits=num_splits,
        )  # fmt: skip
    (batch, next_n, heads, _), k = q.shape, indices.shape[-1]
    rows, device, page_size = batch * next_n, q.device, pages.shape[1]
    out = torch.empty(batch, next_n, heads, dim_v, dtype=q.dtype, device=device)
    lse = torch.empty(batch, heads, next_n, dtype=torch.float32, device=device)
    if not out.numel():
        return out, lse
    q = q if aligned(q) else q.clone(memory_format=torch.contiguous_format)
    tile = 64 if heads > 32 else 32 if heads > 16 else 16
    head_blocks, blocks = -(-heads // tile), -(-k // BLOCK)
    if schedule is None or num_splits is None:
        most = min(blocks, PIECES)
        splits = splits_of(rows * head_blocks, blocks, processors.count(device), most)
        mode = JOINED if 1 < splits <= CLUSTER else ALONE
        span, pieces, grid = -(-blocks // splits), rows * splits, (rows * head_blocks, splits)
        workers = processors.count(device) // head_blocks
        if splits == 1 and (parts := even(rows, heads, blocks, workers)) is not None:
            mode, (span, splits), grid = EVEN, parts, (workers * head_blocks, 1)
            pieces = rows * splits
    else:
        schedule, num_splits = schedule.contiguous(), num_splits.contiguous()
        mode, workers = PLANNED, schedule.shape[0]
        splits, span, pieces, grid = workers, 0, rows + workers, (workers * head_blocks, 1)
    part = part_lse = lse
    if splits > 1 and mode != JOINED:
        part = torch.empty(pieces, heads, dim_v, dtype=torch.float32, device=device)
        part_lse = torch.empty(pieces, heads, dtype=torch.float32, device=device)
    sink = None if attn_sink is None else attn_sink.contiguous()
    at = _nvrtc.address
    lengths = (0, 0) if topk_length is None else topk_length.stride()
    work = struct.pack(
        "<Q3qQqQ3qQ2q7Qf8iIi4x", at(q), *q.stride()[:3], at(pages), pages.stride(0),
        at(indices), *indices.stride(), at(topk_length), *lengths, at(sink), at(out),
        at(lse), at(part), at(part_lse), at(schedule), at(num_splits), softmax_scale * LOG2E, rows,
        next_n, heads, k, page_size, min(pages.shape[0] * page_size, 2**31 - 1), span, splits,
        *quotient(page_size),
    )  # fmt: skip
    module = _nvrtc.module("sparse_decode.cu", (("HEADS", tile), ("MODE", mode)))
    cluster = (1, splits) if mode == JOINED else None
    module.kernel("sparse_decode", device.index).launch(
        grid, (THREADS,), (work,), shared_bytes(tile), cluster, False
    )
    if splits > 1 and mode != JOINED:
        join(part, part_lse, num_splits, sink, out, lse, splits)
    return out, lse


from dsa_hal.backends.cuda._adapters import flashmla  # noqa: E402, F401
