"""grouped_fp8_gemm_masked on AMD Instinct."""

import torch
from torch import Tensor

from dsa_hal.backends.portable import gemm
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.gemm import grouped_fp8_gemm_masked


@grouped_fp8_gemm_masked.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS)
def tiled(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Any shape and stride, one program per tile; tiles without rows only write zeros."""
    return gemm.masked_fp8(a, a_scale, b, b_scale, masked_m, out_dtype)
