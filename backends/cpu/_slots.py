"""Slots on the processor, where they are checked before anything is touched."""

import torch
from torch import Tensor

from dsa_hal.errors import BadInput


def locate(op: str, slots: Tensor, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token, page, offset) of every slot that is not -1, each int64 [kept].

    Raises BadInput for a slot outside the pool.
    """
    page_size = pages.shape[1]
    room = pages.shape[0] * page_size
    wrong = ((slots < -1) | (slots >= room)).nonzero()
    if wrong.numel():
        first = int(wrong[0])
        raise BadInput(
            f"{op}: slots[{first}] is {int(slots[first])}; the pool has slots 0 to {room - 1},"
            " and -1 means none"
        )
    token = (slots >= 0).nonzero()[:, 0]
    kept = slots[token].long()
    return token, torch.div(kept, page_size, rounding_mode="floor"), kept.remainder(page_size)


def raw(view: Tensor) -> Tensor:
    """A part's view as bytes, which every index operation takes."""
    return view.view(torch.uint8)
