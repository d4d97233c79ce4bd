"""plan in Triton: one program, as rows are few, and the host waits for nothing."""

import torch
from torch import Tensor


def split(lengths: Tensor, workers: int, block: int) -> tuple[Tensor, Tensor]:
    """`plan`."""
    from dsa_hal.backends.portable._kernels.plan import plan as kernel

    rows, device = lengths.shape[0], lengths.device
    ends = torch.empty(rows, dtype=torch.int64, device=device)
    schedule = torch.empty(workers, 4, dtype=torch.int32, device=device)
    num_splits = torch.empty(rows + 1, dtype=torch.int32, device=device)
    kernel[(1,)](
        lengths, ends, schedule, num_splits, rows, workers, block, lengths.stride(0),
        rows.bit_length(), BR=1024, BW=256, num_warps=8,
    )  # fmt: skip
    return schedule, num_splits
