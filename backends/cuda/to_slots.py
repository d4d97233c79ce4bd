"""to_slots on NVIDIA GPUs."""

import torch
from torch import Tensor

from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.portable import select as portable
from dsa_hal.ops.select import to_slots

THREADS, PER = 256, 4
"""Threads of a block, and positions of a thread, as in to_slots.cu."""


@to_slots.impl("cuda", "cuda", contract=1, arch=("sm90",), needs=_nvrtc.NEEDS, rank=10)
def slots(
    indices: Tensor, block_table: Tensor, rows_per_request: int = 1, *, page_size: int
) -> Tensor:
    """One pass. A position past the table reads the table's last entry."""
    rows, k = indices.shape
    if not indices.numel() or not block_table.numel():
        return torch.full_like(indices, -1)
    out = torch.empty(rows, k, dtype=torch.int32, device=indices.device)
    if indices.stride(1) != 1:
        indices = indices.contiguous()
    if block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    shift = page_size.bit_length() - 1 if page_size & (page_size - 1) == 0 else -1
    args = (
        indices, block_table, out, indices.stride(0), block_table.stride(0), k, rows_per_request,
        page_size, shift, block_table.shape[1],
    )  # fmt: skip
    blocks = -(-k // (THREADS * PER))
    _nvrtc.module("to_slots.cu").launch("to_slots", (rows, blocks), (THREADS,), args)
    return out


@to_slots.impl("cuda", "triton", contract=1, needs=("triton>=3.6",))
def tiled(
    indices: Tensor, block_table: Tensor, rows_per_request: int = 1, *, page_size: int
) -> Tensor:
    """One pass. A position past the table reads the table's last entry."""
    return portable.slots(indices, block_table, rows_per_request, page_size)
