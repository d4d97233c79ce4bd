"""Launches of `_kernels/fp8_gemm.cu`: FP8 products alone, by rows' groups, and by masked groups."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dsa_hal.autotune.space import Space
from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.ops.gemm import BLOCK

SHARED = 227 << 10
"""Bytes of shared memory that one block can have; two share one KiB more, less one each."""

PROCESSORS = 132
OUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ARGS = struct.Struct("<2Q Q 4q 4i")


@dataclass(frozen=True)
class Tile:
    """How one block computes its part of a product.

    mt      rows of activations
    wgs     warpgroups that compute
    waves   times 64 rows of weights for each of them
    stages  blocks of k under way at once
    split   blocks of one cluster that share k
    blocks  of them on a multiprocessor at once
    pair    2: two blocks of a cluster share weights, each has rows of its own
    width   0: weights lie along the matrix unit's 64 rows (fp8_gemm.cu); else columns of one wave in
            fp8_gemm_wide.cu, where two groups compute `mt` = 128 rows
    """

    mt: int
    wgs: int
    waves: int
    stages: int
    split: int
    blocks: int
    pair: int = 1
    width: int = 0
    ahead: int = 1
    share: int = 1

    @property
    def height(self) -> int:
        return self.mt * self.pair

    @property
    def nt(self) -> int:
        return self.waves * (self.width or self.wgs * 64)


def shared_bytes(tile: Tile, wide: bool) -> int:
    """Shared memory of one block; `wide` outputs need no room to be turned in."""
    stage = (tile.nt + tile.mt) * BLOCK + 16
    if tile.width:
        return tile.stages * stage + (0 if wide else tile.mt * (tile.width // 8 | 1) * 16)
    stage += 4 * tile.mt
    store = 0 if wide or tile.split > 1 else tile.wgs * tile.mt * BLOCK
    return tile.stages * stage + store


def _staged(mt: int, wgs: int, waves: int, split: int, blocks: int, share: int = 1) -> Tile | None:
    """The tile with as many stages as fit, at most eight; None if not even three do."""
    room = SHARED if blocks == 1 else (228 << 10) // blocks - 1024
    for stages in range(8, 2, -1):
        tile = Tile(mt, wgs, waves, stages, split, blocks, share=share)
        part = 4 * mt * (tile.nt + 4) if split > 1 else 0
        if shared_bytes(tile, False) <= room and part <= stages * (tile.nt + mt) * BLOCK:
            return tile
    return None


def _wide(width: int, waves: int, pair: int, ahead: int = 1) -> Tile:
    """The tile of fp8_gemm_wide.cu with as many stages as fit, at most eight."""
    fits = (Tile(128, 2, waves, stages, 1, 1, pair, width, ahead) for stages in range(8, 1, -1))
    return next(tile for tile in fits if shared_bytes(tile, False) <= SHARED)


def tiles(*, rows: int, n: int, k: int, groups: int) -> list[Tile]:
    """Tiles for `groups` products of about so many rows each, the best guess first."""
    if rows > 128:
        return _wide_tiles(rows, n, groups)
    return _narrow_tiles(rows, n, -(-k // BLOCK), groups)


def _narrow_tiles(rows: int, n: int, blocks_k: int, groups: int) -> list[Tile]:
    """Few rows: what takes time is to read the weights, so the tile is as low as the rows allow, and
    k is split until every processor has some of them."""
    mt = next(t for t in (8, 16, 32, 64, 128) if rows <= t)
    across = groups * -(-n // 64)
    split = 1
    while split < 8 and across * split * 2 <= 1.1 * PROCESSORS and blocks_k >= 4 * split:
        split *= 2
    many = (3, 1) if mt == 128 else (2, 2)
    shapes = [many, (1, 2)] if across > 2 * PROCESSORS else [(1, 2), many]
    found = [_staged(mt, wgs, 1, split, blocks) for wgs, blocks in shapes]
    found += [_staged(mt, wgs, 1, s, 2) for s in (1, 2, 4, 8) for wgs in (1, 2) if mt < 128]
    return list(dict.fromkeys(tile for tile in found if tile is not None))


def _wide_tiles(rows: int, n: int, groups: int) -> list[Tile]:
    """Many rows: the fewest columns' worth of time over all rounds of tiles. A wave costs a little
    beside its columns."""
    pair = 2 if rows > 128 else 1

    def time(tile: Tile) -> float:
        count = groups * -(-rows // tile.height) * -(-n // tile.nt)
        return -(-count // (PROCESSORS // tile.pair)) * (tile.nt + 8 * tile.waves)

    found = [_wide(128, 2, pair), _wide(96, 2, pair, 2), _wide(128, 1, pair, 2)]
    return sorted(found, key=time)


SPACES = {
    name: Space(f"{name}/cuda", Tile, tiles)
    for name in ("fp8_gemm", "grouped_fp8_gemm", "grouped_fp8_gemm_masked")
}


def weights_wrong(b: Tensor) -> str | None:
    """Why the kernel cannot compute with weights [n, k] or [groups, n, k]."""
    n, k = b.shape[-2:]
    if 0 in b.shape or k % 16 or n % 8:
        return (
            f"b has shape {list(b.shape)}; this kernel needs no empty axis, n a multiple of 8, and"
            " k of 16"
        )
    return None


def _readable(t: Tensor) -> Tensor:
    """t with a group axis, or a copy where the copy engine could not read it: addresses and strides
    are multiples of 16 bytes there."""
    if t.data_ptr() % 16 or any(s % 16 for s in t.stride()[:-1]):
        t = t.clone(memory_format=torch.contiguous_format)
    return t if t.dim() == 3 else t.unsqueeze(0)


def _launch(
    tile: Tile, mode: int, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor,
    plan: Tensor | None, m: int, units: int,
) -> None:  # fmt: skip
    """Launch one kind of the kernel; `units` is how many tiles of rows there are at most."""
    a, b = _readable(a), _readable(b)
    groups, n, k = b.shape
    module = _module(tile, OUTS[out.dtype], mode)
    args = ARGS.pack(
        a_scale.data_ptr(), b_scale.data_ptr(), 0 if plan is None else plan.data_ptr(),
        a_scale.stride(0), a_scale.stride(-2),
        b_scale.stride(0) if b_scale.dim() == 3 else 0, b_scale.stride(-2),
        m, n, -(-k // BLOCK), groups,
    )  # fmt: skip
    cluster = tile.split * tile.pair * tile.share
    count = units * -(-n // (tile.nt * tile.share))
    if tile.split == 1:
        count = min(count, PROCESSORS * tile.blocks // cluster)
    module.launch(
        "product",
        (count * cluster,),
        (tile.wgs * 128 + (128 if tile.blocks == 1 else 32),),
        (
            _nvrtc.tensor_map(b, (1, tile.nt // tile.pair, BLOCK), swizzle=128),
            _nvrtc.tensor_map(a, (1, tile.mt // tile.share, BLOCK), swizzle=128),
            args,
            out,
        ),
        shared=shared_bytes(tile, out.dtype == torch.float32),
        cluster=(cluster,) if cluster > 1 else None,
    )


@cache
def _module(tile: Tile, out: int, mode: int) -> _nvrtc.Module:
    if tile.width:
        return _nvrtc.module(
            "fp8_gemm_wide.cu",
            (
                ("WIDTH", tile.width), ("WAVES", tile.waves), ("STAGES", tile.stages),
                ("PAIR", tile.pair), ("AHEAD", tile.ahead), ("OUT", out), ("MODE", mode),
            ),
        )  # fmt: skip
    return _nvrtc.module(
        "fp8_gemm.cu",
        (
            ("MT", tile.mt), ("WGS", tile.wgs), ("WAVES", tile.waves), ("STAGES", tile.stages),
            ("SPLIT", tile.split), ("BLOCKS", tile.blocks), ("SHARE", tile.share), ("OUT", out), ("MODE", mode),
        ),
    )  # fmt: skip


def _bucket(rows: int) -> int:
    return 1 << max(0, rows - 1).bit_length()


def fp8(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`fp8_gemm`: [m, n]."""
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((m, n), dtype=out_dtype)
    if out.numel():
        tile = SPACES["fp8_gemm"].pick(rows=_bucket(m), n=n, k=k, groups=1)
        _launch(tile, 0, a, a_scale, b, b_scale, out, None, m, -(-m // tile.height))
    return out


def masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """`grouped_fp8_gemm_masked`: [groups, max_m, n]."""
    (groups, m, k), n = a.shape, b.shape[1]
    out = a.new_empty((groups, m, n), dtype=out_dtype)
    if out.numel():
        space = SPACES["grouped_fp8_gemm_masked"]
        tile = space.pick(rows=_bucket(m), n=n, k=k, groups=groups)
        units = groups * -(-m // tile.height)
        _launch(tile, 1, a, a_scale, b, b_scale, out, masked_m.contiguous(), m, units)
    return out


def grouped_floats(a: Tensor, b: Tensor, layout: Tensor) -> Tensor:
    """`grouped_gemm` of bf16 or fp16: [m, n]."""
    (m, k), (groups, n, _) = a.shape, b.shape
    out = a.new_empty((m, n))
    if out.numel():
        waves = 2
        plan = layout.new_empty(4 + 2 * m)
        _nvrtc.module("gemm_units.cu", (("MT", 128),)).launch(
            "units", (1,), (1024,), (layout.contiguous(), plan, m, groups)
        )
        a, b = _readable(a), _readable(b)
        args = ARGS.pack(0, 0, plan.data_ptr(), 0, 0, 0, 0, m, n, -(-k // 64), groups)
        module = _nvrtc.module(
            "grouped_gemm.cu",
            (("WAVES", waves), ("STAGES", 4), ("OUT", OUTS[out.dtype]), ("MODE", 2)),
        )
        count = (-(-m // 128) + groups) * -(-n // (waves * 128))
        shared = 4 * ((waves + 1) * 128 * 128 + 16) + 128 * 17 * 16
        maps = (
            _nvrtc.tensor_map(b, (1, waves * 128, 64), swizzle=128),
            _nvrtc.tensor_map(a, (1, 128, 64), swizzle=128),
        )
        module.launch(
            "product", (min(count, PROCESSORS),), (384,), (*maps, args, out), shared=shared
        )
    return out


def grouped(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, layout: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """`grouped_fp8_gemm`: [m, n]."""
    (m, k), (groups, n, _) = a.shape, b.shape
    out = a.new_empty((m, n), dtype=out_dtype)
    if out.numel():
        rows = _bucket(-(-m // groups))
        tile = SPACES["grouped_fp8_gemm"].pick(rows=rows, n=n, k=k, groups=groups)
        plan = layout.new_empty(4 + 2 * m)
        _nvrtc.module("gemm_units.cu", (("MT", tile.height),)).launch(
            "units", (1,), (1024,), (layout.contiguous(), plan, m, groups)
        )
        _launch(tile, 2, a, a_scale, b, b_scale, out, plan, m, -(-m // tile.height) + groups)
    return out
