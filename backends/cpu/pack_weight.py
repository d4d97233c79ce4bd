"""pack_weight on the processor: FP8 becomes fp32 once, since every product would have to do it."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu.dequantize_fp8 import dequantize
from dsa_hal.ops.gemm import BLOCK
from dsa_hal.ops.packed import pack_weight


@pack_weight.impl("cpu", "torch", contract=1)
def pack(weight: Tensor, scale: Tensor | None = None) -> list[Tensor]:
    """[weight], multiplied out to fp32 if it was FP8 and the very same tensor if not."""
    if scale is None:
        return [weight]
    return [dequantize(weight, scale, block_rows=BLOCK, out_dtype=torch.float32)]
