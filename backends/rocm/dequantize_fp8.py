"""dequantize_fp8 on AMD Instinct."""

import torch
from torch import Tensor

from dsa_hal.backends.portable.rows import FLOATS, too_wide
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.quant import dequantize_fp8


def _why_not(
    values: Tensor, scale: Tensor, *, group: int = 128, block_rows: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    if out_dtype not in FLOATS:
        return f"out_dtype is {out_dtype}; it makes bfloat16, float16 and float32"
    return too_wide(group, "a group")


@dequantize_fp8.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def dequantize(
    values: Tensor, scale: Tensor, *, group: int = 128, block_rows: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Some rows of one column of blocks per program."""
    from dsa_hal.backends.portable._kernels.quant import dequantized

    return dequantized(values, scale, group=group, block_rows=block_rows, out_dtype=out_dtype)
