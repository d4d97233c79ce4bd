"""fp8_gemm on the processor."""

import torch
from torch import Tensor

from dsa_hal.backends.cpu._fp8 import widen
from dsa_hal.backends.cpu._product import fp8_product
from dsa_hal.ops.gemm import BLOCK, fp8_gemm


def activations(a: Tensor, a_scale: Tensor) -> Tensor:
    """FP8 activations [m, k] times their scales, in fp32."""
    return widen(a).mul_(a_scale.repeat_interleave(BLOCK, 1)[:, : a.shape[1]])


@fp8_gemm.impl("cpu", "torch", contract=1)
def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    return fp8_product(activations(a, a_scale), b, b_scale).to(out_dtype)
