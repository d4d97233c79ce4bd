"""indexer_logits_paged on NVIDIA GPUs."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Space
from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.portable import indexer_logits as portable
from dsa_hal.backends.portable import layouts
from dsa_hal.ops.indexer import indexer_logits_paged
from dsa_hal.ops.layout import KVLayout

PROCESSORS = 132
"""Multiprocessors of the H200: one block on each."""

KEYS, DIM = 64, 128
"""Keys of a tile, values of a key."""

MOST_COLUMNS = 384
"""Query heads of a request whose weights fit in registers."""

ARGS = struct.Struct("<4Q 3q 6i")


@dataclass(frozen=True)
class Config:
    """Warpgroups that compute in turn, and tiles under way, a multiple of them."""

    wgs: int
    stages: int


def legal(*, columns: int) -> Sequence[Config]:
    """What registers and shared memory hold for so many query heads of a request."""
    if columns <= 128:
        both = [Config(3, 15), Config(2, 16)]
        both = both if columns <= 64 else both[::-1]
        return [*both, Config(3, 21), Config(3, 9)]
    return [Config(2, 12), Config(2, 8)]


SPACE = Space(name="indexer_logits_paged/cuda", kind=Config, legal=legal)


def shared_bytes(config: Config, columns: int) -> int:
    """Shared memory of a block: two requests' queries, the tiles, barriers and small things."""
    queries = columns if columns < 128 else -(-columns // 128) * 128
    tiles = config.stages * (KEYS * (DIM + 4) + 16)
    return 2 * queries * DIM + tiles + 2 * 16 + 8 * (2 + 4 * (config.wgs + 1))


def _why_not(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> str | None:  # fmt: skip
    return layouts.unknown(layout)


@indexer_logits_paged.impl(
    "cuda", "triton", contract=1, needs=("triton>=3.6",), rank=1, why_not=_why_not
)
def tiled(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """Any dtype and page size; a program per request and tile of positions."""
    return portable.paged(q, pages, weights, context_lens, block_table, layout, max_context_len)


def scores_why_not(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> str | None:  # fmt: skip
    """What the CUDA kernel does not take."""
    next_n, heads, dim = q.shape[1:]
    if q.dtype != torch.float8_e4m3fn:
        return f"q is {q.dtype}; it takes float8_e4m3fn"
    if heads not in (32, 64) or dim != DIM or not 1 <= next_n * heads <= MOST_COLUMNS:
        return (
            f"q has {next_n} tokens with {heads} heads of {dim} each; it takes 32 or 64 heads of"
            f" {DIM}, of all tokens up to {MOST_COLUMNS}"
        )
    if pages.shape[1] not in (8, 16, 32) and pages.shape[1] % KEYS:
        return f"a page has {pages.shape[1]} tokens; it takes 8, 16, 32 and multiples of {KEYS}"
    return None


@indexer_logits_paged.impl(
    "cuda", "cuda", contract=1, arch=("sm90",), needs=(*_nvrtc.NEEDS, "triton>=3.6"), rank=2,
    why_not=scores_why_not,
)  # fmt: skip
def streamed(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """Persistent blocks, to which all requests' keys are dealt evenly; each is read once."""
    out = torch.empty(q.shape[0] * q.shape[1], max_context_len, device=q.device)
    _launch(q, pages, weights, context_lens, block_table, layout, out, clean=True, overlap=False)
    return out


def scores_into(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    out: Tensor, *, layout: str, clean: bool, overlap: bool = False,
) -> None:  # fmt: skip
    """Scores into `out` [batch * next_n, max_context_len] fp32, whose rows may lie apart; limits
    are clipped to its columns. Unless `clean`, what lies beyond a limit may stay as it is.
    `overlap` where this file's kernel may begin before the one ahead of it ends."""
    reason = scores_why_not(
        q, pages, weights, context_lens, block_table, layout=layout, max_context_len=out.shape[1]
    )
    if reason is None:
        _launch(
            q, pages, weights, context_lens, block_table, layout, out, clean=clean, overlap=overlap
        )
    else:
        portable.paged_into(out, q, pages, weights, context_lens, block_table, layout)


def _launch(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    layout: str, out: Tensor, *, clean: bool, overlap: bool,
) -> None:  # fmt: skip
    if not out.numel():
        return
    (batch, next_n, heads, _), context = q.shape, out.shape[1]
    count, page_size = pages.shape[:2]
    form = KVLayout.parse(layout)
    keys = form.views(pages)[form.data[0].name]
    if _nvrtc.address(pages) % 16 or pages.stride(0) % 16:
        # The copy engine cannot read such a pool, and a copy of it would cost more than the scores.
        portable.paged_into(out, q, pages, weights, context_lens, block_table, layout)
        return
    columns = next_n * heads
    q = q.flatten(1, 2)
    if _nvrtc.address(q) % 16 or q.stride(-1) != 1 or any(s % 16 for s in q.stride()[:-1]):
        q = q.clone(memory_format=torch.contiguous_format)
    weights, context_lens, block_table = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (weights, context_lens, block_table)
    )
    config = SPACE.pick(columns=columns)
    read = pages, weights, context_lens, block_table
    args = ARGS.pack(
        *map(_nvrtc.address, read), pages.stride(0), weights.stride(0), out.stride(0),
        context_lens.stride(0), block_table.stride(0), batch, context, count, clean,
    )  # fmt: skip
    _nvrtc.module("indexer_logits_paged.cu", defines(heads, next_n, page_size, config)).launch(
        "scores",
        (PROCESSORS,),
        (128 * (config.wgs + 1),),
        (
            _nvrtc.tensor_map(q, (1, min(columns, 128), DIM), swizzle=128),
            _nvrtc.tensor_map(keys, (1, min(page_size, KEYS), DIM), swizzle=128),
            args,
            out,
        ),
        shared=shared_bytes(config, columns),
        overlap=overlap,
    )


def defines(heads: int, next_n: int, page_size: int, config: Config) -> tuple[tuple[str, int], ...]:
    """The macros of `_kernels/indexer_logits_paged.cu`."""
    return (
        ("HEADS", heads), ("NEXT", next_n), ("PAGE", page_size), ("WGS", config.wgs),
        ("STAGES", config.stages),
    )  # fmt: skip


from dsa_hal.backends.cuda._adapters import deepgemm  # noqa: E402, F401
