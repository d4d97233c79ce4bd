"""grouped_fp8_gemm on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._product import fp8_product, runs
from dsa_hal.backends.cpu.fp8_gemm import activations
from dsa_hal.ops.gemm import grouped_fp8_gemm


@grouped_fp8_gemm.impl("cpu", "torch", contract=1)
def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, grouped_layout: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    out = torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)
    for group, begin, end in runs(grouped_layout, b.shape[0], "grouped_fp8_gemm: grouped_layout"):
        rows = activations(a[begin:end], a_scale[begin:end])
        out[begin:end] = fp8_product(rows, b[group], b_scale[group])
    return out
