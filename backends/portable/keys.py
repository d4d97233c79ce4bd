"""The keys of a chunk of queries, in the two forms that `chunks` decides between, with the three
products that attention, the indexer and their gradients are made of."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsa_hal.backends.portable.chunks import Chunk, Limits


def product(a: Tensor, b: Tensor, result: torch.dtype = torch.float32) -> Tensor:
    """a @ b, [m, k] by [k, n] or with one more axis in front, summed in fp32 and given as `result`:
    a's dtype or fp32."""
    if a.dtype == result:
        return a @ b
    if a.is_cpu:  # where no product has a wider result than its factors
        return a.float() @ b.float()
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=result)


class Keys(Protocol):
    """Keys of c queries, n for each. Where rows are narrower than a key, only as many of its
    columns count."""

    def against(self, *rows: Tensor, result: torch.dtype = torch.float32) -> list[Tensor]:
        """Products of each of rows [c, r, columns] with the keys: [c, r, n]."""

    def mixed(self, weights: Tensor, columns: int | None = None) -> Tensor:
        """Sums of the keys' first `columns` (all), weighted [c, r, n]: [c, r, columns] fp32."""

    def spread(self, total: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
        """For each pair of weights [c, r, n] and rows [c, r, columns]: adds the rows, so weighted
        and summed over the queries, to the keys' own rows of `total` [context + 1, dim] fp32."""


class Stretch:
    """Keys [low, high) of an array: the same for every query, so that all are one product."""

    def __init__(self, keys: Tensor, chunk: Chunk, factors: torch.dtype) -> None:
        self.span = slice(chunk.low, chunk.high)
        self.keys = keys[self.span].to(factors)

    def against(self, *rows: Tensor, result: torch.dtype = torch.float32) -> list[Tensor]:
        return [
            product(r.flatten(0, 1), self.keys[:, : r.shape[2]].T, result).view(*r.shape[:2], -1)
            for r in rows
        ]

    def mixed(self, weights: Tensor, columns: int | None = None) -> Tensor:
        made = product(weights.flatten(0, 1), self.keys[:, :columns])
        return made.view(*weights.shape[:2], -1)

    def spread(self, total: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
        for weights, rows in pairs:
            part = product(weights.flatten(0, 1).T, rows.flatten(0, 1))
            total[self.span, : rows.shape[2]].add_(part)


class Gathered:
    """Keys ids [c, n] of an array. They are read, and their gradients written, once for all rows,
    which are many times fewer: narrow rows are filled up with zeros."""

    def __init__(self, keys: Tensor, ids: Tensor, factors: torch.dtype) -> None:
        self.ids = ids.flatten()
        self.keys = keys.index_select(0, self.ids).view(*ids.shape, -1).to(factors)

    def against(self, *rows: Tensor, result: torch.dtype = torch.float32) -> list[Tensor]:
        found = product(self._stacked(*rows), self.keys.transpose(1, 2), result)
        return list(found.split([r.shape[1] for r in rows], 1))

    def mixed(self, weights: Tensor, columns: int | None = None) -> Tensor:
        return product(weights, self.keys[..., :columns])

    def spread(self, total: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
        weights = torch.cat([weights for weights, _ in pairs], 1)
        rows = self._stacked(*(rows for _, rows in pairs))
        parts = product(weights.transpose(1, 2), rows).flatten(0, 1)
        total.index_add_(0, self.ids, parts)

    def _stacked(self, *rows: Tensor) -> Tensor:
        width = self.keys.shape[2]
        return torch.cat([pad(r, (0, width - r.shape[2])) for r in rows], 1)


class Selection:
    """The selections ids [tokens, k], -1 = none, of a call, and the keys they name."""

    def __init__(self, ids: Tensor, context: int, limits: Limits) -> None:
        self.ids, self.context, self.limits = ids, context, limits
        best = ids.amax(1, keepdim=True)
        some = torch.where(best < 0, context, best)
        self._safe = torch.where(ids < 0, some, ids)  # a hole repeats a key of its own query

    def readable(self, keys: Tensor) -> Tensor:
        """Keys [context, dim] and a row of zeros, zeros too where nobody selected: what may be
        anything must not be read, and 0 times a NaN would be NaN."""
        used = torch.zeros(self.context + 1, dtype=torch.bool, device=keys.device)
        return _only(used.index_fill_(0, self._safe.flatten().long(), True), keys)

    def keys(self, keys: Tensor, chunk: Chunk) -> Keys:
        """A chunk's keys out of those that `readable` returned."""
        factors = self.limits.factors(keys.dtype)
        if not chunk.gathered:
            return Stretch(keys, chunk, factors)
        return Gathered(keys, self._safe[chunk.rows], factors)

    def allowed(self, chunk: Chunk) -> Tensor | None:
        """Which of the chunk's keys each query selected: bool [c, n]; None if all."""
        ids = self.ids[chunk.rows]
        if chunk.gathered:
            return None if chunk.whole else ids >= 0
        width = chunk.high - chunk.low
        column = torch.where(ids < 0, width, ids - chunk.low).long()
        mask = torch.zeros(ids.shape[0], width + 1, dtype=torch.bool, device=ids.device)
        return mask.scatter_(1, column, True)[:, :width]


class Ranges:
    """The ranges [first, last) of a call's queries, [tokens] int32 each, within the context."""

    def __init__(self, first: Tensor, last: Tensor, context: int, limits: Limits) -> None:
        self.first, self.last, self.context, self.limits = first, last, context, limits

    def readable(self, keys: Tensor) -> Tensor:
        """As of `Selection`: zeros where no range reaches."""
        full = (self.first < self.last).int()
        edges = torch.zeros(self.context + 1, dtype=torch.int32, device=keys.device)
        edges.index_add_(0, self.first, full).index_add_(0, self.last, -full)
        return _only(edges.cumsum(0) > 0, keys)

    def keys(self, keys: Tensor, chunk: Chunk) -> Keys:
        """As of `Selection`."""
        return Stretch(keys, chunk, self.limits.factors(keys.dtype))

    def allowed(self, chunk: Chunk) -> Tensor | None:
        """Which of the chunk's keys lie in each query's range: bool [c, n]."""
        column = torch.arange(chunk.low, chunk.high, dtype=torch.int32, device=self.first.device)
        first, last = self.first[chunk.rows, None], self.last[chunk.rows, None]
        return (column >= first) & (column < last)


def _only(used: Tensor, keys: Tensor) -> Tensor:
    """Keys [context, dim] where used [context + 1] says so, zeros elsewhere, and a row of zeros."""
    kept = keys.new_zeros(keys.shape[0] + 1, keys.shape[1])
    kept[:-1].copy_(keys).masked_fill_(~used[:-1, None], 0)
    return kept
