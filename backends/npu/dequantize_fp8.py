"""dequantize_fp8 on Ascend, in plain torch."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._fp8 import multiplied_out
from dsa_hal.ops.quant import dequantize_fp8


@dequantize_fp8.impl("npu", "torch", contract=1, rank=-1)
def dequantize(
    values: Tensor, scale: Tensor, *, group: int = 128, block_rows: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Some rows of blocks at a time; what a code means is looked up."""
    if values.dim() == 1:
        one = multiplied_out(values[None], scale[None], out_dtype, group=group, block_rows=1)
        return one[0]
    return multiplied_out(values, scale, out_dtype, group=group, block_rows=block_rows)
