"""to_slots on the processor."""

import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.ops.select import to_slots


@to_slots.impl("cpu", "torch", contract=1)
def translate(
    indices: Tensor, block_table: Tensor, rows_per_request: int = 1, *, page_size: int
) -> Tensor:
    """One gather over the whole batch; rows of one request are neighbours, so they share its row of
    the table."""
    rows, k = indices.shape
    out = torch.full((rows, k), -1, dtype=torch.int32)
    if not rows or not k:
        return out
    limit = block_table.shape[1] * page_size
    highest = int(indices.max())
    if highest >= limit:
        raise BadInput(
            f"to_slots: indices hold position {highest}; block_table has"
            f" {block_table.shape[1]} pages of {page_size} per request, up to {limit - 1}"
        )
    if highest < 0:
        return out
    position = indices.clamp(min=0)
    request = torch.arange(rows).div_(rows_per_request, rounding_mode="floor")
    page = block_table[request[:, None], position.div(page_size, rounding_mode="floor")]
    slots = page.mul_(page_size).add_(position.remainder_(page_size))
    kept = indices >= 0
    if bool((kept & (slots < 0)).any()):
        row = int((kept & (slots < 0)).any(-1).nonzero()[0])
        raise BadInput(
            f"to_slots: row {row} points at a page of request {row // rows_per_request} whose entry"
            " in block_table is negative, so was never allocated"
        )
    return torch.where(kept, slots, out)
