"""The configurations of the portable Triton programs on AMD Instinct: tiles, wavefronts and what
AMD's compiler alone is told. Guesses by compile metrics and the published peaks; none is NVIDIA's.

Wavefronts have 64 lanes. `nonkdim` is the edge of a matrix instruction (16 or 32), `waves` how many
wavefronts of a SIMD the compiler leaves registers for, `kpack` how many steps of k a lane loads at
once on gfx942. LDS is not checked by the compiler, so that every list here is bounded by it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from dsa_hal.backends.portable import (
    absorbed,
    dense,
    gemm,
    indexer_kl,
    indexer_logits,
    rows,
    sparse_attention,
    sparse_mla_bwd,
    sparse_paged,
)
from dsa_hal.backends.portable.rows import RowTile, power_of_two
from dsa_hal.backends.rocm import ARCHITECTURES
from dsa_hal.target import Architecture

ROCM = "rocm"

ARCHES = tuple(architecture.name for architecture in ARCHITECTURES)
"""What the implementations state that serve them all. Their files take it from here, so that the
lists below are stated before a program is launched."""

NEEDS = ("triton>=3.6 | triton-rocm>=3.6",)
"""The same: torch's builds for ROCm bring Triton under the second name, AMD's under the first."""


@dataclass(frozen=True, kw_only=True)
class Amd:
    """What AMD's compiler alone is told; 0 leaves it to the compiler."""

    waves: int = 0
    nonkdim: int = 0
    kpack: int = 0


@cache
def _spendthrift() -> bool:
    """Whether Triton is 3.6, which spills up to 101 registers of attention's tiles of 64 rows by
    512 columns on gfx950 where 3.7 spills none."""
    from packaging.version import Version  # here, as a process without a launch need not pay for it

    for name in ("triton", "triton-rocm"):
        with suppress(PackageNotFoundError):
            return Version(version(name)) < Version("3.7")
    return False


def _rowwise(tiles: Callable[..., list[RowTile]]) -> Callable[..., list[RowTile]]:
    """A program's share of rows by the lanes of a wavefront and the number of compute units."""

    def legal(limits: Architecture, *, rows: int, width: int) -> list[RowTile]:
        return tiles(rows=rows, width=width, lanes=limits.lanes, spread=4 * limits.processors)

    return legal


@dataclass(frozen=True)
class GemmTile(Amd, gemm.Tile):
    """A tile of a product."""


def _products(limits: Architecture, *, rows: int, n: int, bytes: int) -> list[GemmTile]:
    """Tiles of 128 bytes of k, of which two steps are in LDS. Few rows: narrow tiles, since the
    weights' bytes are what takes time, and more programs read more at once."""
    bk = 128 // bytes
    most = max(16, power_of_two(rows))
    few = most <= 64
    found = []
    for bm in (b for b in (128, 256, 64, 32, 16) if b <= most and (few or b >= 64)):
        for bn in (64, 32, 128) if few else (128, 256, 64):
            warps = 8 if bm * bn > 128 * 128 else 4 if bm * bn >= 64 * 64 else 2
            for stages in (2, 1):
                if stages * (bm + bn) * 128 <= limits.shared and bm * bn <= 256 * 128:
                    kpack = 2 if limits.name == "gfx942" else 0
                    edge = 16 if min(bm, bn) < 32 or few else 0
                    found.append(GemmTile(bm, bn, bk, warps, stages, nonkdim=edge, kpack=kpack))
    best = max(16, min(most, 128))
    return sorted(found, key=lambda t: t.bm != best)


@dataclass(frozen=True)
class ScoreTile(Amd, indexer_logits.Config):
    """Keys against the heads of one row after another."""


def _scores(
    limits: Architecture, *, tokens: int, heads: int, dim: int, bytes: int
) -> list[ScoreTile]:
    """Tiles of keys that stay in registers while rows pass by."""
    if bytes == 4:
        return [ScoreTile(32, 4 if tokens > 4 else 1, 4, 1)]
    some = (1,) if tokens <= 4 else (16, 8) if tokens < 1024 else (64, 16)
    sizes = (128, 64) if bytes == 1 or dim <= 128 else (64, 32)
    return [
        ScoreTile(keys, r, 4, stages, nonkdim=edge)
        for keys in sizes for r in some for stages in (2, 1) for edge in (0, 16)
    ]  # fmt: skip


@dataclass(frozen=True)
class PagedTile(Amd, sparse_paged.Config):
    """Heads of a row against its keys."""


def _paged(limits: Architecture, *, heads: int, width: int, bytes: int) -> list[PagedTile]:
    """Accumulators are what fills registers: [heads, width] in fp32. With 64 heads and 512 columns
    eight wavefronts hold 32 keys without a spill, 16 where FP8 takes many steps to decode or the
    compiler is an old one."""
    decodes = limits.fp8 == torch.float8_e4m3fn and not _spendthrift()
    if bytes == 4:
        return [PagedTile(16, 16, 4, nonkdim=16)]
    tile = min(64, max(16, power_of_two(heads)))
    both = [(tile, 32, 8 if tile == 64 else 4), (tile, 16, 8)]
    if not decodes:
        both = both[1:]
    shapes = *both, (min(tile, 32), 32, 8), (16, 32, 8), (16, 16, 8)
    return [PagedTile(*shape, nonkdim=16) for shape in dict.fromkeys(shapes)]


@dataclass(frozen=True)
class DenseTile(Amd, dense.Config):
    """Rows against keys."""


_TALL = ((128, 64, 8, 2), (128, 64, 8, 1))
_NARROW = (
    (128, 32, 8, 2), (128, 32, 8, 1), (64, 64, 4, 1), (64, 32, 4, 2), (64, 32, 4, 1),
    (32, 32, 4, 2), (16, 64, 4, 1), (16, 32, 4, 1),
)  # fmt: skip
_TALL_WIDE = ((64, 32, 4, 2), (64, 32, 4, 1))
_WIDE = ((32, 32, 4, 1), (32, 32, 4, 2), (16, 32, 4, 1), (16, 32, 4, 2))
"""(rows, keys, warps, stages) without a spill on both architectures; the tall ones on gfx950, the
tall and wide ones with Triton 3.7."""


def _dense(limits: Architecture, *, rows: int, width: int, size: int) -> list[DenseTile]:
    """Tiles without a spill, the tallest first; keys wider than 256 columns leave room for fewer
    rows."""
    if size == 4:
        return [DenseTile(16, 16, 4, 1)]
    most = max(16, power_of_two(rows))
    tall, others = (_TALL_WIDE, _WIDE) if width > 256 else (_TALL, _NARROW)
    roomy = limits.name == "gfx950" and not (width > 256 and _spendthrift())
    shapes = (*tall, *others) if roomy else others
    return [DenseTile(*shape, nonkdim=16) for shape in shapes if shape[0] <= most]


@dataclass(frozen=True)
class SelectedTile(Amd, sparse_attention.Tile):
    """Heads of a query against its selected keys."""


def _selected(limits: Architecture, *, heads: int, width: int, bytes: int) -> list[SelectedTile]:
    """As `_paged`, of keys that are multiplied as they are: two tiles under way, no spill."""
    if bytes == 4:
        return [SelectedTile(16, 16, 4, 1, nonkdim=16)]
    tile = min(64, max(16, power_of_two(heads)))
    both = (tile, 32, 4 if tile == 64 else 8, 2), (tile, 16, 8, 2)
    shapes = *both, (min(tile, 32), 32, 8, 2), (16, 32, 4, 2), (16, 32, 4, 1)
    return [SelectedTile(*shape, nonkdim=16) for shape in dict.fromkeys(shapes)]


@dataclass(frozen=True)
class GradientTile(Amd, sparse_mla_bwd.Tile):
    """Heads by keys by columns of one step of the gradients."""


def _gradients(limits: Architecture, *, heads: int, bytes: int) -> list[GradientTile]:
    """One product in registers at a time."""
    tile = min(64, max(16, power_of_two(heads)))
    if bytes == 4:
        return [GradientTile(min(tile, 32), 32, 32, 4, 1, nonkdim=16)]
    shapes = (64, 64, 4, 2), (64, 64, 4, 1), (128, 64, 8, 2), (64, 128, 8, 2)
    return [GradientTile(tile, *shape, nonkdim=16) for shape in shapes]


@dataclass(frozen=True)
class DivergenceTile(Amd, indexer_kl.Tile):
    """Heads by keys of one step of the indexer's loss."""


def _divergence(
    limits: Architecture, *, heads: int, width: int, bytes: int
) -> list[DivergenceTile]:
    """As `_gradients`, with queries and keys of `width` columns whole."""
    tile = min(64, max(16, power_of_two(heads)))
    if bytes == 4:
        return [DivergenceTile(16, 32, 32, 4, 1, nonkdim=16)]
    shapes = (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 1), (32, 64, 4, 1)
    return [DivergenceTile(tile, *shape, nonkdim=16) for shape in shapes]


sparse_attention.SPACE.on(ROCM, _selected)
for _step in sparse_mla_bwd.SPACES.values():
    _step.on(ROCM, _gradients)
for _part in indexer_kl.SPACES.values():
    _part.on(ROCM, _divergence)
for _name, _space in rows.SPACES.items():
    _space.on(ROCM, _rowwise(rows.products if _space.legal is rows.products else rows.tiles))
for _gemm in (*gemm.SPACES.values(), absorbed.SPACE):
    _gemm.on(ROCM, _products)
indexer_logits.RAGGED.on(ROCM, _scores)
indexer_logits.PAGED.on(ROCM, _scores)
sparse_paged.SPACE.on(ROCM, _paged)
for _attention in dense.SPACES.values():
    _attention.on(ROCM, _dense)
