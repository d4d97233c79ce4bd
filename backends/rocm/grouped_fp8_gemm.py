"""grouped_fp8_gemm on AMD Instinct."""

import torch
from torch import Tensor

from dsa_hal.backends.portable import gemm
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.gemm import grouped_fp8_gemm


@grouped_fp8_gemm.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS)
def tiled(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, grouped_layout: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Any shape and stride, one program per tile, once for each group in the tile."""
    return gemm.grouped_fp8(a, a_scale, b, b_scale, grouped_layout, out_dtype)
