"""grouped_fp8_gemm_masked on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._product import fp8_product
from dsa_hal.backends.cpu.fp8_gemm import activations
from dsa_hal.errors import BadInput
from dsa_hal.ops.gemm import grouped_fp8_gemm_masked


@grouped_fp8_gemm_masked.impl("cpu", "torch", contract=1)
def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    groups, max_m, _ = a.shape
    out = torch.zeros(groups, max_m, b.shape[1], dtype=out_dtype)
    for group, rows in enumerate(masked_m.tolist()):
        if not 0 <= rows <= max_m:
            raise BadInput(
                f"grouped_fp8_gemm_masked: masked_m[{group}] is {rows}; expected 0 to {max_m}"
            )
        if rows:
            used = activations(a[group, :rows], a_scale[group, :rows])
            out[group, :rows] = fp8_product(used, b[group], b_scale[group])
    return out
