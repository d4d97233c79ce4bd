"""quantize_fp8 on Ascend, in plain torch."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsa_hal.backends.npu._fp8 import narrow
from dsa_hal.ops.quant import AMAX_FLOOR, FP8_MAX, blocks, power_of_two, quantize_fp8


@quantize_fp8.impl("npu", "torch", contract=1, rank=-1)
def quantize(
    x: Tensor, *, group: int = 128, block_rows: int = 1, pow2: bool = True
) -> tuple[Tensor, Tensor]:
    """Block by block as views, edges padded with zeros; codes by arithmetic on fp32 bits."""
    rows = x.shape[-2] if x.dim() > 1 else 1
    tall, wide = blocks(rows, block_rows), blocks(x.shape[-1], group)
    shape = (*x.shape[:-2], tall, wide) if x.dim() > 1 else (wide,)
    if not x.numel():
        empty = torch.full(shape, AMAX_FLOOR / FP8_MAX, device=x.device)
        return x.to(torch.uint8).view(torch.float8_e4m3fn), empty
    whole = x.float().reshape(-1, rows, x.shape[-1])
    padded = pad(whole, (0, wide * group - x.shape[-1], 0, tall * block_rows - rows))
    tiles = padded.view(-1, tall, block_rows, wide, group)
    amax = tiles.abs().amax((2, 4), keepdim=True)
    scale = amax.clamp_min(AMAX_FLOOR) * (1 / FP8_MAX)
    if pow2:
        scale = power_of_two(scale)
    values = narrow((tiles / scale).clamp(-FP8_MAX, FP8_MAX)).view(torch.uint8)
    values = values.view(padded.shape)[:, :rows, : x.shape[-1]].contiguous().view(x.shape)
    return values.view(torch.float8_e4m3fn), scale.view(shape)
