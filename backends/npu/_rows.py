"""Plain torch on the device for what it has no kernel for: the references, a few rows at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

ROOM = 64 << 20
"""Bytes of the largest intermediate result; at least one row is computed at a time."""


def chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Slices of `rows` whose intermediate results take at most ROOM; one empty slice of no rows."""
    step = max(1, ROOM // max(1, bytes_per_row))
    for at in range(0, max(1, rows), step):
        yield slice(at, min(rows, at + step))


def by_chunks(
    rows: int, bytes_per_row: int, some: Callable[[slice], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """The results of `some` for every chunk, one behind the other along their first axis."""
    parts = [some(chunk) for chunk in chunks(rows, bytes_per_row)]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))
