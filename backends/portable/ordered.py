"""Launches of the sums whose order is the queries', so that calls repeat to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_hal.backends.portable.rows import power_of_two


def collected(rows: Tensor, keys: Tensor, sums: Tensor) -> None:
    """Adds to sums [context, width] fp32 the rows [tokens, pieces, k, width] fp32 that queries made
    for their keys [tokens, k], rows of `sums`; `context` stands for no key."""
    from dsa_hal.backends.portable._kernels.ordered import collect

    (_, pieces, k, width), context = rows.shape, sums.shape[0]
    named, order = keys.flatten().sort(stable=True)  # so that a key's entries stay in order
    every = torch.arange(context + 1, dtype=keys.dtype, device=keys.device)
    block = min(128, max(16, power_of_two(width)))
    collect[context, -(-width // block)](
        rows, order, torch.searchsorted(named, every), sums, k, pieces, WIDTH=width, ROWS_BLOCK=16,
        COLUMNS_BLOCK=block, num_warps=4,
    )  # fmt: skip


def keys_of(indices: Tensor, lengths: Tensor | None, context: int) -> Tensor:
    """indices [tokens, k], `context` where an entry is no key or lies behind lengths [tokens]."""
    live = (indices >= 0) & (indices < context)
    if lengths is not None:
        live &= torch.arange(indices.shape[1], device=indices.device) < lengths[:, None]
    return torch.where(live, indices, context)


def folded(parts: Tensor, sums: Tensor) -> None:
    """Adds parts [pieces, ...] to sums [...], both fp32."""
    from dsa_hal.backends.portable._kernels.ordered import fold

    fold[(-(-sums.numel() // 1024),)](parts, sums, parts.shape[0], sums.numel(), BLOCK=1024)
