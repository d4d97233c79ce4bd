"""Paged caches: per layer a pool of latent pages and a pool of index-key pages, shared by requests.

A page number means the same page in every pool, so a request has one list of pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.ops.layout import KVLayout
from dsa_hal.target import Architecture


@dataclass(eq=False)
class Context:
    """What a cache holds of one request: `length` tokens, in `pages` in order. The last page may be
    part full, and pages may be reserved ahead of the length."""

    length: int = 0
    pages: list[int] = field(default_factory=list)


class KVCache:
    """Pools of a fixed number of pages, and which pages are free.

    latent, index  a pool per layer, [pages, page_size, record] in the layouts given
    """

    def __init__(
        self,
        layers: int,
        latent: KVLayout,
        index: KVLayout,
        num_pages: int,
        page_size: int = Architecture.page_size,
        device: torch.device | str | None = None,
    ) -> None:
        self.page_size, self.num_pages = page_size, num_pages
        self._layouts = latent, index
        self.device = torch.device(device or "cpu")
        self.latent = [latent.empty(num_pages, page_size, device) for _ in range(layers)]
        self.index = [index.empty(num_pages, page_size, device) for _ in range(layers)]
        self._free = list(range(num_pages - 1, -1, -1))
        self._table: tuple[tuple[tuple[int, int], ...], Tensor] = ((), torch.empty(0, 0))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def grow(self, num_pages: int) -> None:
        """Have at least `num_pages` pages; what is stored stays where it is. The pools are copied,
        one layer at a time."""
        if num_pages <= self.num_pages:
            return
        for layout, pools in zip(self._layouts, (self.latent, self.index), strict=True):
            for layer, pool in enumerate(pools):
                pools[layer] = layout.grown(pool, num_pages)
        self._free = [*range(num_pages - 1, self.num_pages - 1, -1), *self._free]
        self.num_pages = num_pages

    def reserve(self, context: Context, length: int) -> None:
        """Make room for `length` tokens in all; BadInput, and nothing taken, if too few pages are
        free. The context's own length stays: it grows when tokens are stored."""
        missing = -(-length // self.page_size) - len(context.pages)
        if missing > len(self._free):
            raise BadInput(
                f"a context of {length} tokens needs {missing} more pages of {self.page_size}"
                f" tokens, but {len(self._free)} of {self.num_pages} are free; make a larger cache"
            )
        context.pages += [self._free.pop() for _ in range(missing)]

    def release(self, context: Context) -> None:
        """Give a context's pages back; it is empty afterwards."""
        self._free += reversed(context.pages)
        context.pages, context.length = [], 0

    def slots(self, context: Context, start: int, stop: int) -> Tensor:
        """Slots of positions [start, stop): page * page_size + offset, int32, on the CPU."""
        first, last = start // self.page_size, -(-stop // self.page_size)
        pages = torch.tensor(context.pages[first:last], dtype=torch.int32)
        slots = pages[:, None] * self.page_size + torch.arange(self.page_size, dtype=torch.int32)
        skip = start - first * self.page_size
        return slots.flatten()[skip : skip + stop - start]

    def block_table(self, contexts: Sequence[Context]) -> Tensor:
        """Page numbers [requests, most pages] int32 on the cache's device, rows padded with 0.

        The table of the last call is kept and serves until a page is added or the batch changes.
        """
        key = tuple((id(context), len(context.pages)) for context in contexts)
        if key != self._table[0]:
            width = max(len(context.pages) for context in contexts)
            rows = [context.pages + [0] * (width - len(context.pages)) for context in contexts]
            self._table = key, torch.tensor(rows, dtype=torch.int32).to(self.device)
        return self._table[1]
