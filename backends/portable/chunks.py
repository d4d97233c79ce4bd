"""How queries are cut into chunks whose temporary tensors fit a workspace, and which of two ways a
chunk takes: with the stretch of all keys from the first to the last that its queries may use, or
with the selected keys of each query gathered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsa_hal.errors import BadInput

GRANULE = 64
"""Queries whose bounds come to the host as one: the only data that is waited for."""

ALIGN = 16
"""Stretches start and, where there are keys enough, end at multiples of this many keys: products of
odd sizes are slow."""

_NO_KEY = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Limits:
    """What a device is good at.

    workspace  bytes of a chunk's scores and gathered keys; one query is always taken
    launch     scores, one per query, head and key, that take as long as starting a chunk's work
    gather     heads with which a key of a stretch takes as long as moving one gathered key
    half       whether bf16 is multiplied as it is; if not, and for other dtypes, it is in fp32
    """

    workspace: int
    launch: int
    gather: int
    half: bool = False

    def factors(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which tensors of `dtype` are multiplied."""
        return dtype if self.half and dtype == torch.bfloat16 else torch.float32


class Chunk(NamedTuple):
    """Queries [start, end) and their keys [low, high), all used (`gathered` False) or picked from.
    whole: no query of it lacks a key in any column of its selection."""

    start: int
    end: int
    low: int
    high: int
    gathered: bool = False
    whole: bool = False

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)

    @property
    def area(self) -> int:
        return (self.end - self.start) * (self.high - self.low)


def resolved(indices: Tensor, topk_length: Tensor | None) -> Tensor:
    """`indices` with -1 behind the lengths."""
    if topk_length is None:
        return indices
    column = torch.arange(indices.shape[1], device=indices.device)
    return torch.where(column < topk_length[:, None], indices, -1)


def of_selection(
    ids: Tensor, context: int, *, heads: int, score: int, picked: int, limits: Limits, asked: str
) -> list[Chunk]:
    """Chunks for selections ids [tokens, k]; queries without keys are in none.

    heads   of all products with a key
    score   bytes of temporaries per query and key of a stretch
    picked  bytes of temporaries per gathered key
    Raises BadInput for an id outside [-1, context), in words that name `asked`.
    """
    k = ids.shape[1]
    none = ids < 0
    least = ids.amin(1)
    low, high = ids.masked_fill(none, _NO_KEY).amin(1), ids.amax(1) + 1
    found: list[Chunk] = []
    for chunk, lowest in _granules(low, high.clamp_min(0), least, context):
        if lowest < -1 or chunk.high > context:
            bad = (ids < -1) | (ids >= context)
            row, column = bad.nonzero()[0].tolist()
            raise BadInput(
                f"{asked} [{row}, {column}] is {int(ids[row, column])}; expected -1 (no key) or a"
                f" number from 0 to {context - 1}"
            )
        gathered = heads * (chunk.high - chunk.low - k) > limits.gather * k
        found.append(chunk._replace(gathered=gathered, whole=lowest >= 0))
    return _cut(found, heads=heads, score=score, picked=k * picked, limits=limits)


def of_ranges(
    first: Tensor, last: Tensor, context: int, *, heads: int, score: int, limits: Limits
) -> list[Chunk]:
    """Chunks for ranges first, last [tokens] within the context; empty ones are in none."""
    nothing = first >= last
    low, high = first.masked_fill(nothing, _NO_KEY), last.masked_fill(nothing, 0)
    found = [chunk for chunk, _ in _granules(low, high, low, context)]
    return _cut(found, heads=heads, score=score, picked=0, limits=limits)


def _granules(low: Tensor, high: Tensor, least: Tensor, context: int) -> list[tuple[Chunk, int]]:
    """GRANULE queries each with the smallest of their `least`; those without keys are left out,
    unless their `least` is wrong."""
    tokens = low.shape[0]
    short = -tokens % GRANULE
    bounds = torch.stack([
        pad(low, (0, short), value=_NO_KEY).view(-1, GRANULE).amin(1),
        pad(high, (0, short)).view(-1, GRANULE).amax(1),
        pad(least, (0, short), value=_NO_KEY).view(-1, GRANULE).amin(1),
    ]).tolist()  # fmt: skip
    found = []
    for at, (first, last, lowest) in enumerate(zip(*bounds, strict=True)):
        start, end = at * GRANULE, min(tokens, (at + 1) * GRANULE)
        if first < last:
            last = last if last > context else min(context, -(-last // ALIGN) * ALIGN)
            found.append((Chunk(start, end, first // ALIGN * ALIGN, last), lowest))
        elif lowest < -1:
            found.append((Chunk(start, end, 0, 0), lowest))
    return found


def _cut(
    found: Sequence[Chunk], *, heads: int, score: int, picked: int, limits: Limits
) -> list[Chunk]:
    """Neighbours made one where that fits and is no slower: while starting a chunk's work takes
    longer than the work, and the keys that one's queries share with the other's are few enough.
    Then what does not fit is made several."""

    def size(chunk: Chunk) -> int:
        rows = chunk.end - chunk.start
        return rows * picked if chunk.gathered else chunk.area * score

    merged: list[Chunk] = []
    for chunk in found:
        if merged and merged[-1].end == chunk.start and merged[-1].gathered == chunk.gathered:
            before = merged[-1]
            low, high = min(before.low, chunk.low), max(before.high, chunk.high)
            both = Chunk(
                before.start, chunk.end, low, high, chunk.gathered, before.whole and chunk.whole
            )
            waste = heads * (both.area - before.area - chunk.area)
            small = heads * before.area < limits.launch and waste <= limits.launch
            if (small or chunk.gathered) and size(both) <= limits.workspace:
                merged[-1] = both
                continue
        merged.append(chunk)
    cut: list[Chunk] = []
    for chunk in merged:
        row = size(chunk) // (chunk.end - chunk.start)
        step = max(1, limits.workspace // max(1, row))
        cut += [
            chunk._replace(start=at, end=min(at + step, chunk.end))
            for at in range(chunk.start, chunk.end, step)
        ]
    return cut
