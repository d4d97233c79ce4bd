"""fp8_gemm on Ascend."""

from typing import Any

import torch
from torch import Tensor

from dsa_hal.backends.npu._fp8 import multiplied_out, strips
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu._products import Rows, like, meta, product
from dsa_hal.ops.gemm import fp8_gemm


def activations(a: Tensor, a_scale: Tensor) -> Tensor:
    """FP8 activations [..., m, k] times their scales, in fp32."""
    return multiplied_out(a, a_scale, torch.float32, block_rows=1)


def _arguments(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype
) -> dict[str, Any]:
    return product(Rows(a, a_scale), [b, b_scale], out_dtype)


def _why_not(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    one = meta(1, a.shape[1], dtype=a.dtype), meta(1, a_scale.shape[1], dtype=a_scale.dtype)
    return refusal("npu_quant_matmul", **_arguments(*one, like(b), like(b_scale), out_dtype))


@fp8_gemm.impl("npu", "quant_matmul", contract=1, arch=("950",), why_not=_why_not)
def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """The kernel has these very blocks."""
    if not a.shape[0]:
        return a.new_zeros(0, b.shape[0], dtype=out_dtype)
    a, a_scale, b, b_scale = (t.contiguous() for t in (a, a_scale, b, b_scale))
    out: Tensor = call("npu_quant_matmul", **_arguments(a, a_scale, b, b_scale, out_dtype))
    return out


@fp8_gemm.impl("npu", "torch", contract=1, rank=-1)
def multiplied(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """fp32 products with some of the weight's rows at a time."""
    rows = activations(a, a_scale)
    out = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    for _, part, wide in strips(b[None], b_scale[None]):
        out[:, part] = rows @ wide.T
    return out
