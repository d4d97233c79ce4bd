"""rope on the processor."""

import torch
from torch import Tensor

from dsa_hal.errors import BadInput
from dsa_hal.ops.norm import rope


@rope.impl("cpu", "torch", contract=1)
def rotate(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool, offset: int = 0
) -> Tensor:
    """Interleaved pairs are complex numbers; halves are turned as two blocks of columns."""
    width = cos_sin.shape[1]
    out = x.clone(memory_format=torch.contiguous_format)
    turn = out[..., offset : offset + width]
    cos, sin = _rows(cos_sin, positions, x.dim()).chunk(2, -1)
    wide = x[..., offset : offset + width].float()
    if interleaved:
        pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], width // 2, 2))
        turn.copy_(torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2))
    else:
        a, b = wide.chunk(2, -1)
        low, high = turn.chunk(2, -1)
        low.copy_((a * cos).addcmul_(b, sin, value=-1))
        high.copy_((b * cos).addcmul_(a, sin))
    return out


def _rows(cos_sin: Tensor, positions: Tensor, axes: int) -> Tensor:
    """The table's rows for each token, with an axis for heads where x has one."""
    try:
        rows = cos_sin.index_select(0, positions)
    except IndexError:
        wrong = (positions < 0) | (positions >= cos_sin.shape[0])
        token = int(wrong.nonzero()[0])
        raise BadInput(
            f"rope: positions[{token}] is {int(positions[token])};"
            f" the table reaches from 0 to {cos_sin.shape[0] - 1}"
        ) from None
    return rows[:, None] if axes == 3 else rows
