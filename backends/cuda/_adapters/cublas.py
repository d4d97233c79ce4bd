"""cuBLAS' block-scaled FP8 product behind `fp8_gemm`, through torch."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsa_hal.backends.portable.library import dense
from dsa_hal.ops.gemm import fp8_gemm

ROWS = 4
"""Rows of a, and of b's scales transposed, are filled up to multiples of this."""


def _why_not(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    n, k = b.shape
    if out_dtype == torch.float16:
        return f"out_dtype is {out_dtype}; cuBLAS writes bfloat16 or float32"
    if k % 128 or not k:
        return f"k is {k}; the cuBLAS adapter takes multiples of 128"
    return f"n is {n}; cuBLAS takes multiples of 16" if n % 16 or not n else None


@fp8_gemm.impl(
    "cuda", "cublas", contract=1, arch=("sm90",), needs=("torch>=2.10",), rank=-2, why_not=_why_not
)
def product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`scaled_mm`, for which a's scales are transposed at every call."""
    from torch.nn.functional import ScalingType, scaled_mm

    m = a.shape[0]
    if not m:
        return torch.empty(0, b.shape[0], dtype=out_dtype, device=a.device)
    missing = (0, 0, 0, -m % ROWS)
    if missing[-1]:
        a, a_scale = pad(a.view(torch.uint8), missing).view(a.dtype), pad(a_scale, missing)
    b_scale = dense(pad(b_scale, (0, -b_scale.shape[1] % ROWS)))
    found = scaled_mm(
        dense(a), dense(b).t(), a_scale.t().contiguous().t(), ScalingType.BlockWise1x128,
        b_scale.t(), ScalingType.BlockWise128x128, output_dtype=out_dtype,
    )  # fmt: skip
    return found[:m]
