"""quantize_fp8 on the processor."""

import torch
from torch import Tensor

from dsa_hal.ops.quant import AMAX_FLOOR, FP8_MAX, power_of_two, quantize_fp8


@quantize_fp8.impl("cpu", "torch", contract=1)
def quantize(
    x: Tensor, *, group: int = 128, block_rows: int = 1, pow2: bool = True
) -> tuple[Tensor, Tensor]:
    """Block by block as views, so that no scale is repeated to elements; edges are padded with zeros,
    which change no maximum."""
    rows = x.shape[-2] if x.dim() > 1 else 1
    cols = x.shape[-1]
    padded = x.float()
    if cols % group or rows % block_rows:
        padded = torch.nn.functional.pad(padded, (0, -cols % group, 0, -rows % block_rows))
    tiles = padded.unflatten(-1, (-1, group))
    if block_rows > 1:
        tiles = tiles.unflatten(-3, (-1, block_rows))
    across = (-3, -1) if block_rows > 1 else (-1,)
    amax = torch.linalg.vector_norm(tiles, float("inf"), across, keepdim=True)
    scale = amax.clamp_(min=AMAX_FLOOR).mul_(1 / FP8_MAX)
    if pow2:
        scale = power_of_two(scale)
    values = (tiles / scale).clamp_(-FP8_MAX, FP8_MAX).flatten(-2)
    if block_rows > 1:
        values = values.flatten(-3, -2)[..., :rows, :]
    return values[..., :cols].to(torch.float8_e4m3fn).contiguous(), scale.squeeze(across)
