"""Launches of the plain Triton products, for every backend that has Triton.

Tensors may be any views; one whose last axis has gaps is copied. Tiles come from a `Space`; the
number of rows counts there by its power of two, so that few programs are compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space
from dsa_hal.backends.portable.dialect import is_fnuz

SPAN = 8
"""Tiles of rows that are walked together, see `_tile_at`."""


@dataclass(frozen=True)
class Tile(Launched):
    """One program's part of the product, and how it is computed.

    bm, bn  rows and columns
    bk      of k, per step
    warps   of a program
    stages  steps whose operands are under way at once
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


def tiles(*, rows: int, n: int, bytes: int) -> list[Tile]:
    """Tiles for so many rows per group, `n` columns and operands of `bytes` per element.

    Shared memory holds `stages` of both operands; 96 KiB leave two programs to a multiprocessor of
    an H200 and fit what AMD's have.
    """
    bk = 128 // bytes
    heights = [h for h in (128, 64, 32, 16) if h <= max(16, 1 << (rows - 1).bit_length())]
    found = []
    for bm in heights:
        for bn in (128, 64):
            # Few rows: the weights' bytes are what takes time, and more programs read more at once.
            if bm <= 64 and bn == 128 and n >= 128:
                continue
            warps = 8 if bm * bn > 8192 else 4
            stages = min(5, (96 << 10) // ((bm + bn) * bk * bytes))
            found.append(Tile(bm, bn, bk, warps, stages))
    return found


SPACES = {
    name: Space(f"{name}/triton", Tile, tiles)
    for name in ("fp8_gemm", "grouped_fp8_gemm", "grouped_fp8_gemm_masked", "grouped_gemm")
}


@cache
def kernels() -> ModuleType:
    """The Triton programs; imported when first launched, as Triton may be absent."""
    from dsa_hal.backends.portable._kernels import gemm

    return gemm


def _dense(*tensors: Tensor) -> list[Tensor]:
    """The kernels take any strides but the last axis's."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _bucket(rows: int) -> int:
    return 1 << max(0, rows - 1).bit_length()


def _options(tile: Tile) -> dict[str, int]:
    return dict(BM=tile.bm, BN=tile.bn, SPAN=SPAN, **tile.options)


def _count(tile: Tile, m: int, n: int) -> int:
    return -(-m // tile.bm) * -(-n // tile.bn)


def fp8(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`fp8_gemm`: [m, n]."""
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((m, n), dtype=out_dtype)
    if out.numel():
        a, a_scale, b, b_scale = _dense(a, a_scale, b, b_scale)
        tile = SPACES["fp8_gemm"].pick(rows=_bucket(m), n=n, bytes=1)
        kernels().fp8_gemm[(_count(tile, m, n),)](
            a, a_scale, b, b_scale, out, m, n, k,
            a.stride(0), a_scale.stride(0), b.stride(0), b_scale.stride(0), n, FNUZ=is_fnuz(),
            **_options(tile),
        )  # fmt: skip
    return out


def grouped_fp8(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, layout: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """`grouped_fp8_gemm`: [m, n]."""
    (m, k), (groups, n, _) = a.shape, b.shape
    out = a.new_empty((m, n), dtype=out_dtype)
    if out.numel():
        rows = _bucket(-(-m // max(1, groups)))
        a, a_scale, b, b_scale, layout = _dense(a, a_scale, b, b_scale, layout)
        tile = SPACES["grouped_fp8_gemm"].pick(rows=rows, n=n, bytes=1)
        kernels().grouped_fp8_gemm[(_count(tile, m, n),)](
            a, a_scale, b, b_scale, layout, out, m, n, k, groups,
            a.stride(0), a_scale.stride(0), *b.stride()[:2], *b_scale.stride()[:2], n,
            FNUZ=is_fnuz(), **_options(tile),
        )  # fmt: skip
    return out


def masked_fp8(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """`grouped_fp8_gemm_masked`: [groups, max_m, n]."""
    (groups, max_m, k), n = a.shape, b.shape[1]
    out = a.new_empty((groups, max_m, n), dtype=out_dtype)
    if out.numel():
        a, a_scale, b, b_scale, masked_m = _dense(a, a_scale, b, b_scale, masked_m)
        tile = SPACES["grouped_fp8_gemm_masked"].pick(rows=_bucket(max_m), n=n, bytes=1)
        kernels().grouped_fp8_gemm_masked[(_count(tile, max_m, n), groups)](
            a, a_scale, b, b_scale, masked_m, out, max_m, n, k,
            *a.stride()[:2], *a_scale.stride()[:2], *b.stride()[:2], *b_scale.stride()[:2],
            *out.stride()[:2], FNUZ=is_fnuz(), **_options(tile),
        )  # fmt: skip
    return out


def grouped(a: Tensor, b: Tensor, layout: Tensor) -> Tensor:
    """`grouped_gemm`: [m, n]."""
    (m, k), (groups, n, _) = a.shape, b.shape
    out = a.new_empty((m, n))
    if out.numel():
        rows = _bucket(-(-m // max(1, groups)))
        a, b, layout = _dense(a, b, layout)
        tile = SPACES["grouped_gemm"].pick(rows=rows, n=n, bytes=a.element_size())
        kernels().grouped_gemm[(_count(tile, m, n),)](
            a, b, layout, out, m, n, k, groups, a.stride(0), *b.stride()[:2], n,
            BK=tile.bk, **_options(tile),
        )  # fmt: skip
    return out
