"""indexer_logits on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._fp8 import widen
from dsa_hal.backends.cpu._scores import Scorer, tile_shape
from dsa_hal.ops.indexer import indexer_logits


@indexer_logits.impl("cpu", "torch", contract=1)
def tiled(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor) -> Tensor:
    """Tile by tile of rows and keys; per tile of keys, only the rows between the first and the last
    that see any of them."""
    (tokens, heads, _), context = q.shape, k.shape[0]
    out = torch.full((tokens, context), -torch.inf)
    high, wide = tile_shape(tokens, heads)
    score = Scorer(tokens * heads * context)
    keys = k if tokens <= high else widen(k)  # widened once, whether here or tile by tile
    first, last = ks.clamp(0, context), ke.clamp(0, context)
    spans = list(zip(first.tolist(), last.tolist(), strict=True))
    for at in range(0, tokens, high):
        mine = [(start, end) for start, end in spans[at : at + high] if start < end]
        if not mine:
            continue
        query = widen(q[at : at + high])
        low, top = min(start for start, _ in mine), max(end for _, end in mine)
        for left in range(low, top, wide):
            right = min(left + wide, top)
            seeing = [
                row
                for row, (start, end) in enumerate(spans[at : at + high], at)
                if max(start, left) < min(end, right)
            ]
            if not seeing:
                continue
            rows = slice(seeing[0], seeing[-1] + 1)
            key = widen(keys[left:right])
            found = score(query[rows.start - at : rows.stop - at], key, weights[rows])
            torch.mul(found, k_scale[left:right], out=out[rows, left:right])
            if not all(start <= left and end >= right for start, end in spans[rows]):
                column = torch.arange(left, right, dtype=torch.int32)
                outside = (column < first[rows, None]) | (column >= last[rows, None])
                out[rows, left:right].masked_fill_(outside, -torch.inf)
    return out
