"""quantize_fp8 on the processor."""

import torch
from torch import Tensor

from dsa_hal.ops.quant import AMAX_FLOOR, FP8_MAX, power_of_two, quantize_fp8


@quantize_fp8.impl("cpu", "torch", contract=1)
def quantize(
    x: Tensor, *, group: int = 128, block_rows: int = 1, pow2: bool = True
) -> tuple[Tensor, Tensor]:
    """Block by block as views, so that no scale is repeated to elements; edges are padded with
    zeros, which change no maximum."""
    shape = x.shape
    rows = shape[-2] if x.dim() > 1 else 1
    padded = x.float()
    if shape[-1] % group or rows % block_rows:
        padded = torch.nn.functional.pad(padded, (0, -shape[-1] % group, 0, -rows % block_rows))
    columns = padded.shape[-1] // group
    if block_rows == 1:
        tiles = padded.reshape(*shape[:-1], columns, group)
        amax = tiles.abs().amax(-1, keepdim=True)
    else:
        tiles = padded.reshape(*shape[:-2], -1, block_rows, columns, group)
        amax = tiles.abs().amax((-3, -1), keepdim=True)
    scale = amax.clamp_(min=AMAX_FLOOR).mul_(1 / FP8_MAX)
    if pow2:
        scale = power_of_two(scale)
    values = (tiles / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    values = values.view(padded.shape)[..., :rows, : shape[-1]] if x.dim() > 1 else values.view(-1)
    if x.dim() == 1:
        return values[: shape[0]].contiguous(), scale.view(-1)
    return values.contiguous(), scale.squeeze(-1) if block_rows == 1 else scale.squeeze((-3, -1))
