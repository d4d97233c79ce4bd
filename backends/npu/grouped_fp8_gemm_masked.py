"""grouped_fp8_gemm_masked on Ascend, in plain torch."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._fp8 import strips
from dsa_hal.backends.npu.fp8_gemm import activations
from dsa_hal.ops.gemm import grouped_fp8_gemm_masked


@grouped_fp8_gemm_masked.impl("npu", "torch", contract=1, rank=-1)
def by_group(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, masked_m: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """All rows of a group with some rows of its weight at a time, then zeros behind the counts,
    which stay on the device."""
    groups, max_m, _ = a.shape
    out = torch.empty(groups, max_m, b.shape[1], dtype=out_dtype, device=a.device)
    rows = activations(a, a_scale)
    for group, part, wide in strips(b, b_scale):
        out[group, :, part] = rows[group] @ wide.T
    behind = torch.arange(max_m, device=a.device) >= masked_m[:, None]
    return out.masked_fill_(behind[..., None], 0)
