"""Tiles of the row-wise programs: how many rows (or blocks of columns) one program takes, and with
how many warps. No Triton here, so that a search can ask anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_hal.autotune.space import Space

SPREAD = 512
"""Programs below which fewer rows per program are taken: few rows wait for memory one after
another, and more programs wait at once."""

LANES = 32
"""Threads counted per warp; where a warp has 64, a thread only holds half as much."""

WIDEST = 32768
"""Elements of one row that a program can hold."""


@dataclass(frozen=True)
class RowTile:
    """One program's work: `rows` rows or blocks, shared by `warps` warps."""

    rows: int
    warps: int


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def _around(rows: int, warps: int) -> Iterator[tuple[int, int]]:
    """A guess, then its neighbours."""
    for up in (0, -1, 1, 2):
        for wider in (0, -1, 1):
            yield int(rows * 2.0**up), int(warps * 2.0**wider)


def _fitting(rows: int, width: int, least: int, most: int) -> list[RowTile]:
    """Tiles around the best guess that leave each thread 1 to `most` elements. A guess has about 16
    a thread: two loads of 16 bytes of bf16."""
    best = least
    while best < most and 2 * best * width <= 4096 and rows >= SPREAD * 2 * best:
        best *= 2
    guess = min(16, max(1, best * width // 512))
    found = [RowTile(best, guess)]
    for height, warps in _around(best, guess):
        held = height * width / (warps * LANES) if warps else 0
        if least <= height <= most and 1 <= warps <= 16 and 1 <= held <= 64:
            found.append(RowTile(height, warps))
    return list(dict.fromkeys(found))


def tiles(*, rows: int, width: int) -> list[RowTile]:
    """For rows of `width` elements (a power of two) that need nothing of each other."""
    return _fitting(rows, width, 1, 64)


def products(*, rows: int, width: int) -> list[RowTile]:
    """For rows that go through a matrix unit, which takes 16 at least."""
    return _fitting(rows, width, 16, 128)


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


FLOATS = (torch.bfloat16, torch.float16, torch.float32)
