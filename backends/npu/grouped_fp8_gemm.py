"""grouped_fp8_gemm on Ascend, in plain torch: the device's routing moves no FP8 rows. Models use
`grouped_linear` and `moe_experts`, which quantise behind it."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._products import stretches
from dsa_hal.backends.npu.fp8_gemm import multiplied
from dsa_hal.ops.gemm import grouped_fp8_gemm


@grouped_fp8_gemm.impl("npu", "torch", contract=1, rank=-1)
def by_stretches(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, grouped_layout: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """A product per stretch of rows of one group; the host waits for the layout."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    for group, rows in stretches(grouped_layout):
        out[rows] = multiplied(
            a[rows], a_scale[rows], b[group], b_scale[group], out_dtype=out_dtype
        )
    return out
