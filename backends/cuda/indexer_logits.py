"""indexer_logits on NVIDIA GPUs."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Space
from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.cuda._limits import LIMITS
from dsa_hal.backends.portable import indexer_logits as portable
from dsa_hal.backends.portable import layouts
from dsa_hal.backends.portable.indexer import logits
from dsa_hal.ops.indexer import indexer_logits

PROCESSORS = 132
"""Multiprocessors of the H200: one block on each."""

KEYS, DIM, COLUMNS, WARPGROUPS = 64, 128, 512, 3
"""Keys of a tile, values of a key, query heads of a block, warpgroups of which the last copies."""

ARGS = struct.Struct("<8Q 2q 5i 4x")


@dataclass(frozen=True)
class Config:
    """Tiles of keys under way."""

    stages: int


def legal(*, heads: int) -> Sequence[Config]:
    """As many as fit shared memory, or fewer."""
    return [Config(8), Config(11), Config(4)]


SPACE = Space(name="indexer_logits/cuda", kind=Config, legal=legal)


def shared_bytes(config: Config) -> int:
    """Shared memory of a block: two blocks of queries, tiles, barriers and small things."""
    tiles = config.stages * (KEYS * DIM + 16)
    return 2 * COLUMNS * DIM + tiles + 2 * 16 + 8 * (2 + 4 * WARPGROUPS)


def _why_not(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> str | None:
    return layouts.coded(q)


@indexer_logits.impl("cuda", "torch", contract=1, why_not=_why_not)
def scores(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """Products of FP8 and bf16 in bf16, of other dtypes in fp32."""
    return logits(q, k, k_scale, weights, ks, ke, LIMITS)


@indexer_logits.impl("cuda", "triton", contract=1, needs=("triton>=3.6",), rank=1, why_not=_why_not)
def tiled(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor) -> Tensor:
    """Any dtype; a program per tile of keys and some rows."""
    return portable.ragged(q, k, k_scale, weights, ks, ke)


def scores_why_not(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> str | None:
    """What the CUDA kernel does not take."""
    if q.dtype != torch.float8_e4m3fn:
        return f"q is {q.dtype}; it takes float8_e4m3fn"
    if q.shape[1] not in (32, 64) or q.shape[2] != DIM:
        return f"q has {q.shape[1]} heads of {q.shape[2]}; it takes 32 or 64 heads of {DIM}"
    return None


@indexer_logits.impl(
    "cuda", "cuda", contract=1, arch=("sm90",), needs=_nvrtc.NEEDS, rank=2, why_not=scores_why_not
)
def streamed(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """Persistent blocks, to which the tiles inside the rows' ranges are dealt evenly."""
    out = torch.empty(q.shape[0], k.shape[0], device=q.device)
    launch(q, k, k_scale, weights, ks, ke, out, clean=True)
    return out


def scores_into(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, out: Tensor, *,
    clean: bool, overlap: bool = False,
) -> None:  # fmt: skip
    """Scores into `out` [tokens, context] fp32, whose rows may lie apart. Unless `clean`, what lies
    outside a row's range may stay as it is. `overlap` where this file's kernel may begin before the
    one ahead of it ends."""
    if scores_why_not(q, k, k_scale, weights, ks, ke) is None:
        launch(q, k, k_scale, weights, ks, ke, out, clean=clean, overlap=overlap)
    else:
        portable.ragged_into(out, q, k, k_scale, weights, ks, ke)


def launch(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, out: Tensor, *,
    clean: bool = False, overlap: bool = False, part: int = 0, entries: int = 0,
    chosen: Tensor | None = None, at: int = 0, most: int = 0, kept: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    """One launch of `_kernels/indexer_logits.cu`.

    out      [tokens, context] fp32, whose rows may lie apart; of part 1 a column for each key of
             the sample; of part 2 the lists of `entries` scores and columns each
    chosen   int32, how many blocks of queries are wanted, then their numbers. This launch takes
             those from number `at` on, `most` at most; their rows follow each other in `out`
    kept     of part 2: guesses, counts and losses, as `_kernels/indexer_parts.cuh` has them. No
             more than two thread blocks may share a block of queries there, so there are no more
             thread blocks than those
    """
    (tokens, heads, _), context = q.shape, k.shape[0]
    if not tokens or not context:
        return
    q, k = _readable(q), _readable(k)
    read = [t if t.stride(-1) == 1 else t.contiguous() for t in (k_scale, weights, ks, ke)]
    more = (chosen, *(kept or (None,) * 3))
    args = ARGS.pack(
        *map(_nvrtc.address, (*read, *more)), read[1].stride(0), out.stride(0), tokens, context,
        clean, at, most,
    )  # fmt: skip
    config = SPACE.pick(heads=heads)
    queries = _nvrtc.tensor_map(q, (COLUMNS // heads, heads, DIM), swizzle=128)
    keys = _nvrtc.tensor_map(k.unsqueeze(0), (1, KEYS, DIM), swizzle=128)
    _nvrtc.module("indexer_logits.cu", defines(heads, config, part, entries)).launch(
        "scores",
        (min(PROCESSORS, -(-tokens * heads // COLUMNS)) if part == 2 else PROCESSORS,),
        (128 * WARPGROUPS,),
        (queries, keys, args, out),
        shared=shared_bytes(config),
        overlap=overlap,
    )


def defines(
    heads: int, config: Config, part: int = 0, entries: int = 0
) -> tuple[tuple[str, int], ...]:
    """The macros of `_kernels/indexer_logits.cu`."""
    return ("HEADS", heads), ("STAGES", config.stages), ("PART", part), ("LIST", entries)


def _readable(t: Tensor) -> Tensor:
    """`t`, or a copy where the copy engine could not read it: addresses and strides are multiples
    of 16 bytes there."""
    ragged = _nvrtc.address(t) % 16 or t.stride(-1) != 1 or any(s % 16 for s in t.stride()[:-1])
    return t.clone(memory_format=torch.contiguous_format) if ragged else t


from dsa_hal.backends.cuda._adapters import deepgemm  # noqa: E402, F401
