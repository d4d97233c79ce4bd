"""unpermute on the processor."""

import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.ops.moe import unpermute

ROOM = 1 << 26
"""Elements of gathered rows at a time."""


@unpermute.impl("cpu", "torch", contract=1)
def unpermuted(
    rows: Tensor, position: Tensor, weights: Tensor, shared: Tensor | None = None
) -> Tensor:
    """A batch of tokens at a time: their rows gathered and widened, then one product per token."""
    (tokens, topk), dim = position.shape, rows.shape[1]
    _refuse_unknown(position, rows.shape[0])
    absent = position < 0
    some = bool(absent.any())
    out = rows.new_zeros(tokens, dim)
    step = max(1, ROOM // max(1, topk * dim))
    for at in range(0, tokens if rows.shape[0] else 0, step):
        part = slice(at, at + step)
        here = position[part].clamp(min=0)
        taken = rows.index_select(0, here.view(-1)).float().view(*here.shape, dim)
        weight = weights[part]
        if some:
            taken.masked_fill_(absent[part, :, None], 0.0)
            weight = weight.masked_fill(absent[part], 0.0)
        total = torch.bmm(weight[:, None], taken)[:, 0]
        out[part] = total if shared is None else total.add_(shared[part])
    if shared is not None and not rows.shape[0]:
        out.copy_(shared)
    return out


def _refuse_unknown(position: Tensor, rows: int) -> None:
    wrong = (position < -1) | (position >= rows)
    if wrong.any():
        token, slot = wrong.nonzero()[0].tolist()
        raise BadInput(
            f"unpermute: position[{token}, {slot}] is {int(position[token, slot])};"
            f" expected -1 or 0 to {rows - 1}"
        )
