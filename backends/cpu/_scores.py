"""Indexer scores of a tile, shared by the ragged and the paged op."""

import torch
from torch import Tensor

TILE = 1 << 21
"""fp32 elements of a tile's [rows * heads, keys] products: they stay in cache from the product to
the sum, and one product is long enough to keep several threads busy."""

KEYS = 1024
"""Keys per tile, if there are rows enough to fill it."""

MOST_KEYS = 2048
"""Keys per tile at most: a few rows (decode) must not push the widened keys out of cache."""


def tile_shape(rows: int, heads: int) -> tuple[int, int]:
    """(rows, keys) of a tile."""
    high = max(1, min(rows, TILE // (heads * KEYS)))
    return high, max(1, min(MOST_KEYS, TILE // (high * heads)))


class Scorer:
    """Scores of row blocks against key blocks, with one buffer for all of them."""

    def __init__(self, elements: int) -> None:
        self._buffer = torch.empty(min(elements, TILE))

    def __call__(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        """q [rows, heads, dim], k [keys, dim], weights [rows, heads], all fp32 -> [rows, keys].

        One matrix product, ReLU in place, and the weighted sum over heads as a product again.
        """
        rows, heads, dim = q.shape
        keys = k.shape[0]
        if rows * heads * keys > self._buffer.numel():  # more heads than a tile has room for
            self._buffer = torch.empty(rows * heads * keys)
        products = self._buffer[: rows * heads * keys].view(rows * heads, keys)
        torch.mm(q.reshape(rows * heads, dim), k.T, out=products)
        products.relu_()
        return torch.bmm(weights[:, None], products.view(rows, heads, keys))[:, 0]
