"""dequantize_fp8 on the processor."""

import torch
from torch import Tensor

from dsa_hal.ops.quant import dequantize_fp8


@dequantize_fp8.impl("cpu", "torch", contract=1)
def dequantize(
    values: Tensor, scale: Tensor, *, group: int = 128, block_rows: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """A strip of `block_rows` rows at a time, in place, so that fp32 copies of a large weight never
    exist beside the result."""
    out = torch.empty(values.shape, dtype=out_dtype)
    if not out.numel():
        return out
    cols = values.shape[-1]
    strip = block_rows if block_rows > 1 else 1024
    flat_values, flat_out = values.reshape(-1, *values.shape[-2:]), out.view(-1, *out.shape[-2:])
    flat_scale = scale.reshape(flat_values.shape[0], -1, scale.shape[-1])
    for source, target, factors in zip(flat_values, flat_out, flat_scale, strict=True):
        for at in range(0, source.shape[0], strip):
            rows = slice(at, at + strip)
            own = factors[at // block_rows][None] if block_rows > 1 else factors[rows]
            wide = own.repeat_interleave(group, -1)[:, :cols]
            target[rows] = source[rows].float().mul_(wide)
    return out
