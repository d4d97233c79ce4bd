"""topk and to_slots in Triton: which pieces of a row a program holds, and the launches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_hal.autotune.space import Launched, Space
from dsa_hal.backends.portable import processors
from dsa_hal.backends.portable.rows import LANES, dense, power_of_two

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
"""Scores that a program holds: ranks are counted in pairs of 16 bits, which bounds them."""

SHARED_ROW = 32
"""Rows from which on they keep a device busy, each with a program of its own."""

SLOTS = 1024
"""Positions of a program of `to_slots`."""


@dataclass(frozen=True)
class Config(Launched):
    """Scores that a program holds, its warps, and the scores of a row's sample; without one rows
    are selected from by pieces."""

    held: int
    warps: int
    sample: int = 0


def room(k: int) -> int:
    """Entries of the list that `sift` fills: most rows leave less than half of it."""
    return max(2048, 4 * power_of_two(k))


def legal(*, rows: int, n: int, k: int, processors: int, lanes: int = LANES) -> Sequence[Config]:
    """How to select from rows of n scores (a power of two), the best guess first: many long rows by
    a sample; other rows in one piece, or, where they are few, in pieces that leave few candidates
    each. A piece has room for k twice, so that each level at least halves a row."""
    many = rows >= 2 * processors  # each waits for its own steps, so that small programs hide more
    least, whole = max(1024, 2 * power_of_two(k)), max(1024, n)
    sizes = [size for size in SIZES if least <= size <= whole] or [min(whole, SIZES[-1])]
    best = next((size for size in (8192, 16384) if size in sizes), sizes[-1])
    pieces = [
        Config(size, size // (per * lanes))
        for size in (best, *reversed(sizes)) for per in ((64, 32, 16) if many else (32, 64, 16))
        if 1 <= size // (per * lanes) <= min(16, 1024 // lanes)
    ]  # fmt: skip
    if n < 2 * room(k):
        return list(dict.fromkeys(pieces))
    sample = min(8192, max(2048, 64 * n // power_of_two(k)))
    tiles = ((2048, 16), (4096, 32), (8192, 32), (4096, 16), (1024, 16), (8192, 16))
    sifts = [Config(size, max(1, size // (per * lanes)), sample) for size, per in tiles]
    if not many:
        sifts.sort(key=lambda c: c.held != 8192)
    both = (sifts, pieces) if rows >= SHARED_ROW else (pieces, sifts)
    return list(dict.fromkeys(both[0] + both[1]))


SPACE = Space(name="topk/triton", kind=Config, legal=legal)


def largest_into(
    out: Tensor, logits: Tensor, k: int, starts: Tensor | None, ends: Tensor | None
) -> None:
    """`topk` into `out` [rows, k] int32, dense: columns ascending, of equal scores the lower ones.
    Meanwhile 8 bytes exist for each of a row's candidates: k of each piece, or `room(k)`."""
    rows, n = logits.shape
    if not rows:
        return
    logits = dense(logits)
    starts, ends = (None if t is None else dense(t) for t in (starts, ends))
    config = SPACE.pick(
        rows=min(power_of_two(rows), 4096), n=power_of_two(n), k=k,
        processors=processors.count(out.device),
    )  # fmt: skip
    (_sifted if config.sample else _by_pieces)(out, logits, k, starts, ends, config)


def _common(out: Tensor, logits: Tensor, starts: Tensor | None, ends: Tensor | None) -> Any:
    """The ranges as a kernel takes them, and what it is told of them."""
    told = {
        "HALF": logits.dtype == torch.bfloat16,
        "HAS_STARTS": starts is not None,
        "HAS_ENDS": ends is not None,
    }
    return out if starts is None else starts, out if ends is None else ends, told


def _by_pieces(
    out: Tensor, logits: Tensor, k: int, starts: Tensor | None, ends: Tensor | None, config: Config
) -> None:
    from dsa_hal.backends.portable._kernels.select import pieces

    rows, n = logits.shape
    scores, columns, first = logits, out, True
    while True:
        count = max(1, -(-n // config.held))
        last = count == 1
        keys = out if last else torch.empty(rows, count * k, dtype=torch.int32, device=out.device)
        to = out if last else torch.empty_like(keys)
        low, high, told = _common(out, logits, starts, ends)
        pieces[(rows * count,)](
            scores, columns, low, high, keys, to, scores.stride(0), to.stride(0), n, k, count,
            HELD=config.held, KP=power_of_two(k), FIRST=first, LAST=last, **told,
            num_warps=config.warps,
        )  # fmt: skip
        if last:
            return
        scores, columns, n, first = keys, to, count * k, False
        starts = ends = None


def _sifted(
    out: Tensor, logits: Tensor, k: int, starts: Tensor | None, ends: Tensor | None, config: Config
) -> None:
    from dsa_hal.backends.portable._kernels.select import finish, sift

    rows, n = logits.shape
    keys = torch.empty(rows, room(k), dtype=torch.int32, device=out.device)
    columns, counts = torch.empty_like(keys), torch.empty_like(keys[:, 0])
    low, high, told = _common(out, logits, starts, ends)
    sift[(rows,)](
        logits, low, high, keys, columns, counts, logits.stride(0), n, k, SAMPLE=config.sample,
        TILE=config.held, CAP=room(k), **told, num_warps=config.warps,
    )  # fmt: skip
    finish[(rows,)](
        logits, low, high, keys, columns, counts, out, logits.stride(0), n, k, TILE=config.held,
        CAP=room(k), KP=power_of_two(k), **told, num_warps=config.warps,
    )  # fmt: skip


def largest(logits: Tensor, k: int, starts: Tensor | None, ends: Tensor | None) -> Tensor:
    """`topk`."""
    out = torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)
    largest_into(out, logits, k, starts, ends)
    return out


def slots(indices: Tensor, block_table: Tensor, rows_per_request: int, page_size: int) -> Tensor:
    """`to_slots`."""
    from dsa_hal.backends.portable._kernels.select import to_slots

    rows, k = indices.shape
    if not indices.numel() or not block_table.numel():
        return torch.full_like(indices, -1, memory_format=torch.contiguous_format)
    out = torch.empty(rows, k, dtype=torch.int32, device=indices.device)
    indices, block_table = dense(indices), dense(block_table)
    to_slots[rows, -(-k // SLOTS)](
        indices, block_table, out, indices.stride(0), block_table.stride(0), k, rows_per_request,
        page_size, block_table.shape[1], BLOCK=SLOTS, num_warps=4,
    )  # fmt: skip
    return out
