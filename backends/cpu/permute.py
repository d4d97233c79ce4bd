"""permute on the processor."""

import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.ops.moe import permute, permuted_rows


@permute.impl("cpu", "torch", contract=1)
def permuted(
    x: Tensor, ids: Tensor, *, experts: int, align: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots sorted by expert; each row's place is its rank, moved on by the padding before it."""
    flat = ids.reshape(-1)
    _refuse_unknown(ids, experts)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=experts + 1)
    order = order[counts[0] :]
    here, counts = flat[order], counts[1:]
    padding = -counts % align
    place = torch.arange(order.shape[0]) + (padding.cumsum(0) - padding)[here]
    count = permuted_rows(flat.shape[0], experts, align)
    source = x.index_select(0, order // max(ids.shape[1], 1))
    rows = x.new_zeros(count, x.shape[1]).index_copy_(0, place, source)
    layout = torch.full((count,), -1, dtype=torch.int32).index_copy_(0, place, here)
    position = torch.full(flat.shape, -1, dtype=torch.int32)
    position[order] = place.int()
    return rows, layout, position.view(ids.shape)


def _refuse_unknown(ids: Tensor, experts: int) -> None:
    wrong = (ids < -1) | (ids >= experts)
    if wrong.any():
        token, slot = wrong.nonzero()[0].tolist()
        raise BadInput(
            f"permute: ids[{token}, {slot}] is {int(ids[token, slot])};"
            f" expected -1 or 0 to {experts - 1}"
        )
