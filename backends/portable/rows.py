"""Tiles of the row-wise programs: how many rows (or blocks of columns) one program takes, and with
how many warps. No Triton here, so that a search can ask anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space

SPREAD = 512
"""Programs below which fewer rows per program are taken: few rows wait for memory one after
another, and more programs wait at once."""

LANES = 32
"""Threads of a warp, where a backend states no other number."""

WIDEST = 32768
"""Elements of one row that a program can hold."""

WIDEST_HEAD = 256
"""Columns of an indexer's head beside which a program holds the matrix of signs."""

MOST_EXPERTS = 4096
"""Experts whose scores or counts one program holds."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that programs read and write as values."""


@dataclass(frozen=True)
class RowTile(Launched):
    """One program's work: `rows` rows or blocks, shared by `warps` warps."""

    rows: int
    warps: int


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def _fitting(guess: RowTile, width: int, least: int, most: int, lanes: int) -> list[RowTile]:
    """The guess, then what lies around it and leaves each thread 1 to 64 elements."""
    found = [guess]
    for up in (0, -1, 1, 2):
        for wider in (0, -1, 1):
            rows, warps = int(guess.rows * 2.0**up), int(guess.warps * 2.0**wider)
            if least <= rows <= most and 1 <= warps <= 16:
                held = rows * width / (warps * lanes)
                found += [RowTile(rows, warps)] if 1 <= held <= 64 else []
    return list(dict.fromkeys(found))


def _height(rows: int, width: int, least: int, elements: int, spread: int) -> int:
    """Rows for a program of `elements`, fewer while there would be less than `spread` programs."""
    best = least
    while 2 * best * width <= elements and rows >= spread * 2 * best:
        best *= 2
    return best


def tiles(*, rows: int, width: int, lanes: int = LANES, spread: int = SPREAD) -> list[RowTile]:
    """For rows of `width` elements (a power of two) that need nothing of each other. Narrow rows
    are taken 16 at a time, wide ones up to four; a lane has 16 elements, or more of wide rows."""
    best = _height(rows, width, 1, max(min(16 * width, 4096), min(4 * width, 16384)), spread)
    warps = max(1, best * width // (16 * lanes)), max(128 // lanes, width // (32 * lanes))
    return _fitting(RowTile(best, min(16, *warps)), width, 1, 64, lanes)


def products(*, rows: int, width: int, lanes: int = LANES, spread: int = SPREAD) -> list[RowTile]:
    """For rows that go through a matrix unit, which takes 16 at least, and 64 with four warps at
    its best. Each program makes the other operand first, so they are spread less."""
    best = RowTile(_height(rows, width, 16, 8192, spread // 8), 4)
    return _fitting(best, width, 16, 128, lanes)


SPACES = {
    **{
        name: Space(f"{name}/triton", RowTile, tiles)
        for name in (
            "rms_norm", "add_rms_norm", "layer_norm", "rope", "latent_qkv", "silu_mul",
            "silu_mul_quantize", "quantize_fp8", "dequantize_fp8", "store_latent",
            "store_index_key", "gather_latent", "gather_index_key",
        )
    },
    **{name: Space(f"{name}/triton", RowTile, products) for name in ("hadamard", "indexer_qk")},
}  # fmt: skip


def pick(op: str, rows: int, width: int) -> RowTile:
    """The tile for `rows` rows of `width` elements; rows count by their power of two."""
    return SPACES[op].pick(rows=power_of_two(rows), width=width)


def dense(t: Tensor) -> Tensor:
    """t itself where its last axis is dense, else a copy."""
    return t if t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def flat(t: Tensor) -> Tensor:
    """t [..., dim] as [rows, dim] with a dense last axis: a view wherever strides allow one."""
    return dense(t.reshape(-1, t.shape[-1]))


def too_wide(width: int, what: str) -> str | None:
    """Why a program cannot hold `width` elements at once, or None."""
    if width <= WIDEST:
        return None
    return f"{what} is {width} wide; it takes up to {WIDEST}"


def too_many(experts: int) -> str | None:
    """Why a program cannot hold a number for each expert at once, or None."""
    if experts <= MOST_EXPERTS:
        return None
    return f"there are {experts} experts; it takes up to {MOST_EXPERTS}"


def wide_head(dim: int) -> str | None:
    """Why a program cannot transform an indexer's heads, or None."""
    return None if dim <= WIDEST_HEAD else f"heads have {dim} columns; it takes up to {WIDEST_HEAD}"
