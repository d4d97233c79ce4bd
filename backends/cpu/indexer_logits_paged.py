"""indexer_logits_paged on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._fp8 import widen
from dsa_hal.backends.cpu._scores import Scorer, tile_shape
from dsa_hal.errors import BadInput
from dsa_hal.ops.indexer import indexer_logits_paged
from dsa_hal.ops.layout import SCALE, KVLayout


@indexer_logits_paged.impl("cpu", "torch", contract=1)
def by_pages(
    q: Tensor, pages: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
    layout: str, max_context_len: int,
) -> Tensor:  # fmt: skip
    """Request by request, a few pages of keys at a time; pages past the longest limit are neither
    looked up nor gathered."""
    batch, next_n, heads, _ = q.shape
    page_size = pages.shape[1]
    known = KVLayout.parse(layout)
    parts = known.views(pages)
    out = torch.full((batch * next_n, max_context_len), -torch.inf)
    limits = context_lens.clamp(0, max_context_len)
    longest = limits.amax(1).tolist() if next_n else [0] * batch
    per_tile = max(1, tile_shape(next_n, heads)[1] // page_size)
    score = Scorer(next_n * heads * max_context_len)
    for request, length in enumerate(longest):
        used = block_table[request, : -(-length // page_size)].long()
        _check_pages(used, pages.shape[0], request)
        rows = slice(request * next_n, (request + 1) * next_n)
        query = widen(q[request])
        for at in range(0, used.shape[0], per_tile):
            some = used[at : at + per_tile]
            left = at * page_size
            right = min(left + some.shape[0] * page_size, length)
            key = widen(parts[known.data[0].name][some]).flatten(0, 1)[: right - left]
            found = score(query, key, weights[rows])
            if known.group:
                found = found.mul_(parts[SCALE][some].flatten()[: right - left])
            column = torch.arange(left, right, dtype=torch.int32)
            outside = column >= limits[request, :, None]
            out[rows, left:right] = found.masked_fill_(outside, -torch.inf)
    return out


def _check_pages(used: Tensor, count: int, request: int) -> None:
    wrong = ((used < 0) | (used >= count)).nonzero()
    if wrong.numel():
        entry = int(wrong[0])
        raise BadInput(
            f"indexer_logits_paged: block_table[{request}, {entry}] is {int(used[entry])}, below"
            f" the request's limit; the pool has pages 0 to {count - 1}"
        )
