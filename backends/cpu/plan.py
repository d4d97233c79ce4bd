"""plan on the processor."""

import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.ops.schedule import plan


@plan.impl("cpu", "torch", contract=1)
def split(lengths: Tensor, *, workers: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """One walk along the line of blocks in plain numbers: rows and workers are few."""
    blocks = []
    for row, length in enumerate(lengths.tolist()):
        if length < 0:
            raise BadInput(f"plan: lengths[{row}] is {length}; expected a number of keys from 0 on")
        blocks.append(max(1, -(-length // block)))
    rows, total = len(blocks), sum(blocks)
    busy = min(workers, total)
    schedule = [[rows, 0, rows, 0] for _ in range(workers)]
    pieces = [0] * rows
    row = at = 0
    for worker in range(busy):
        left = (worker + 1) * total // busy - worker * total // busy
        if at == blocks[row]:
            row, at = row + 1, 0
        begin = row, at
        pieces[row] += 1
        while at + left > blocks[row]:
            left -= blocks[row] - at
            row, at = row + 1, 0
            pieces[row] += 1
        at += left
        schedule[worker] = [*begin, row, at]
    cuts = torch.tensor([0, *pieces], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.tensor(schedule, dtype=torch.int32), cuts
