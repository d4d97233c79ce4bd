"""How the products' kernels in CUDA C++ cut a product into tiles: plain arithmetic, no device."""

from __future__ import annotations

from dataclasses import dataclass

from dsa_hal.autotune.space import Space

BLOCK = 128
"""Of k in one stage of an FP8 kernel."""

SHARED = 228 << 10
"""Bytes of shared memory of a multiprocessor; each block also takes one KiB for the system."""

PROCESSORS = 132

CLUSTERS = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}
"""How many clusters of so many blocks an H200 runs at once, if a block takes a whole processor:
clusters do not cross the groups in which processors stand."""

SHARES = {128: 0.53, 192: 0.76, 256: 1.0}
"""Time of a tile of 128 rows by its columns, as measured at k 7168."""


@dataclass(frozen=True)
class Tile:
    """How one block computes its part of a product.

    mt      rows of activations
    wgs     warpgroups that compute
    stages  blocks of k under way at once
    split   blocks of one cluster that share k
    blocks  of them on a multiprocessor at once
    waves   0: fp8_gemm.cu, 64 columns for each warpgroup, along the rows of the matrix unit; else
            fp8_gemm_wide.cu, where the `mt` = 128 rows of activations lie there, and so many times
            `width` columns along its other side
    ahead   1 or 2: products of a group that are under way while it adds
    pair    2: two blocks of a cluster share weights, each has rows of its own
    width   128, or 192 with one wave
    columns of fp8_gemm.cu's turned tile, whose 64 rows of activations lie along those of the unit
    """

    mt: int
    wgs: int
    stages: int
    split: int = 1
    blocks: int = 1
    waves: int = 0
    ahead: int = 1
    pair: int = 1
    width: int = 128
    columns: int = 0

    @property
    def nt(self) -> int:
        """Columns."""
        return self.waves * self.width if self.waves else self.columns or self.wgs * 64

    @property
    def height(self) -> int:
        """Rows of a cluster."""
        return self.mt * self.pair

    @property
    def threads(self) -> int:
        """Those that compute, and those that copy: a warp, or a whole group where it gives its
        registers to the others."""
        return self.wgs * 128 + (128 if self.blocks == 1 else 32)


def shared_bytes(tile: Tile, turned: bool = True) -> int:
    """Shared memory of one block. `turned`: 16-bit outputs are turned there, fp32 ones need not."""
    stage = (tile.nt + tile.mt) * BLOCK + 16
    if tile.waves:
        return tile.stages * stage + turned * tile.mt * 128
    own = -(-(tile.columns or tile.mt) // 8 // tile.split)  # eights that a block stores
    parts = (tile.split - 1) * own * tile.wgs * 2048  # what others of its cluster send for them
    room = turned * own * tile.wgs * 1024 if not tile.columns else 0
    return tile.stages * (stage + 4 * tile.mt) + room + parts + 16


def fits(tile: Tile) -> bool:
    """Whether the tile's blocks have room on a multiprocessor."""
    return shared_bytes(tile) <= SHARED // tile.blocks - 1024


def narrow(mt: int, wgs: int, split: int, blocks: int) -> Tile | None:
    """The tile of fp8_gemm.cu with as many stages as fit, at most 13; None if not even three."""
    tiles = (Tile(mt, wgs, stages, split, blocks) for stages in range(13, 2, -1))
    return next(filter(fits, tiles), None)


def turned(n: int, blocks_k: int) -> Tile | None:
    """The turned tile of fp8_gemm.cu that keeps most processors busy, with as many stages as fit.
    With less than 56 columns it would copy more activations than weights."""

    def columns(split: int) -> int:
        return max(56, -(-n // (8 * CLUSTERS[split])) * 8)

    splits = [s for s in CLUSTERS if columns(s) <= 128 and (s == 1 or blocks_k >= 4 * s)]
    split = max(splits, key=lambda s: -(-n // columns(s)) * s, default=0)
    tiles = (Tile(64, 1, stages, split, columns=columns(split)) for stages in range(13, 2, -1))
    return next(filter(fits, tiles), None) if split else None


def wide(waves: int, pair: int, ahead: int = 1, width: int = 128) -> Tile:
    """The tile of fp8_gemm_wide.cu with as many stages as fit, at most eight."""
    tiles = (
        Tile(128, 2, stages, waves=waves, ahead=ahead, pair=pair, width=width)
        for stages in range(8, 1, -1)
    )
    return next(filter(fits, tiles))


def tiles(*, rows: int, n: int, k: int, groups: int) -> list[Tile]:
    """Tiles for `groups` products of about so many rows each, the best guess first."""
    if rows > 128 or (rows > 64 and groups > 1):
        return _many_rows(rows, n, groups)
    return _few_rows(rows, n, -(-k // BLOCK), groups)


def _few_rows(rows: int, n: int, blocks_k: int, groups: int) -> list[Tile]:
    """What takes time is to read the weights, so the tile is as low as the rows allow, and k is
    split until every processor has some of them."""
    mt = next(t for t in (8, 16, 32, 64, 128) if rows <= t)
    down = groups
    if mt == 128 and groups * -(-n // 64) <= 2 * PROCESSORS:
        mt, down = 64, 2 * groups  # the weights are read twice, but by twice as many blocks

    def split(wgs: int) -> int:
        """Parts of k, if all blocks run at once and each has a processor to itself; else 0."""
        across = down * -(-n // (64 * wgs))
        fits = (s for s, room in reversed(CLUSTERS.items()) if across <= room)
        return next((s for s in fits if s == 1 or blocks_k >= 4 * s), 0)

    def covered(wgs: int) -> int:
        return down * -(-n // (64 * wgs)) * split(wgs)

    once = [wgs for wgs in (1, 2, 3) if split(wgs)]
    # Two warpgroups share the activations that are copied, where no more processors stay idle.
    if ((mt <= 16 and split(1) > 1) or down > groups) and covered(2) >= covered(1) > 0:
        once.insert(0, 2)
    found = [narrow(mt, wgs, split(wgs), 1) for wgs in once]
    if 32 < rows <= 64 and groups == 1:
        tile = turned(n, blocks_k)
        # Measured: 72 columns on 120 processors for 99 gain, 56 on 128 for 112 do not.
        if tile is not None and -(-n // tile.nt) * tile.split > 1.15 * covered(1):
            found.insert(0, tile)
    if not once:
        many, pairs = (3, 1) if mt == 128 else (2, 2), (1, 2)
        shapes = [many, pairs] if down * -(-n // 64) > 2 * PROCESSORS else [pairs, many]
        found = [narrow(mt, wgs, 1, blocks) for wgs, blocks in shapes]
    found += [narrow(min(mt, 64), wgs, s, 2) for s in (1, 2, 4, 8) for wgs in (1, 2)]
    return list(dict.fromkeys(tile for tile in found if tile is not None))


def _many_rows(rows: int, n: int, groups: int) -> list[Tile]:
    """The least time over all rounds of tiles; few columns take more than their share of 256. Of
    equal ones, pairs where there are rows enough: they read less."""

    def time(tile: Tile) -> float:
        count = groups * -(-rows // tile.height) * -(-n // tile.nt)
        return -(-count // (PROCESSORS // tile.pair)) * SHARES[tile.nt]

    found = [wide(2, 1), wide(1, 1, width=192), wide(1, 1, ahead=2)]
    if rows > 128:
        found += [wide(2, 2), wide(1, 2, width=192), wide(1, 2, ahead=2)]
    if rows > 1024:
        found.insert(0, wide(2, 2))
    return sorted(dict.fromkeys(found), key=time)


def whole(**facts: int) -> list[Tile]:
    """`tiles` that do not split k, for products whose count of tiles only the device knows: blocks
    that share a sum take one tile each."""
    return [tile for tile in tiles(**facts) if tile.split == 1]


SPACES = {
    "fp8_gemm": Space("fp8_gemm/cuda", Tile, tiles),
    "grouped_fp8_gemm": Space("grouped_fp8_gemm/cuda", Tile, whole),
    "grouped_fp8_gemm_masked": Space("grouped_fp8_gemm_masked/cuda", Tile, tiles),
}


@dataclass(frozen=True)
class FloatTile:
    """How one block of grouped_gemm.cu computes its part: two warpgroups, 64 rows each.

    waves   times 128 columns
    stages  of 64 along k, under way at once
    """

    waves: int
    stages: int
    mt = 128
    bk = 64
    threads = 3 * 128

    @property
    def nt(self) -> int:
        """Columns."""
        return self.waves * 128


def floats_bytes(tile: FloatTile) -> int:
    """Shared memory of one block."""
    return tile.stages * ((tile.mt + tile.nt) * tile.bk * 2 + 16) + tile.mt * 128


def float_tiles(*, n: int, groups: int) -> list[FloatTile]:
    """Tiles for products of bf16 or fp16: wide ones, but where n is narrow."""
    found = [FloatTile(2, 4), FloatTile(1, 6)]
    return found if n > 128 else found[::-1]


FLOATS = Space("grouped_gemm/cuda", FloatTile, float_tiles)
