"""moe_experts in steps that Triton programs serve: FP8 experts, tokens quantised before copying."""

import torch
from torch import Tensor

from dsa_hal.backends.portable.rows import too_many
from dsa_hal.ops.fused import silu_mul_quantize
from dsa_hal.ops.gemm import grouped_fp8_gemm
from dsa_hal.ops.moe import permuted_rows, unpermute
from dsa_hal.ops.quant import quantize_fp8


def why_not(x: Tensor, w13: list[Tensor], w2: list[Tensor], act: str) -> str | None:
    """What `experts` does not take, or None."""
    if act == "none" or len(w13) != 2 or len(w2) != 2:
        return f"act is {act} and the weights are {len(w13)} tensors; it takes FP8 with scales"
    if x.dtype not in (torch.bfloat16, torch.float32):
        return f"x is {x.dtype}; FP8 products give bfloat16 or float32"
    return too_many(w13[0].shape[0])


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor],
    shared: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    """`moe_experts`. Each token is rounded once, and not once per expert; FP8 rows and their scales
    are moved, which are half of bf16's bytes; between the products nothing wider than FP8 is
    stored."""
    from dsa_hal.backends.portable._kernels import moe

    pow2, count = act == "fp8_pow2", w13[0].shape[0]
    values, scale = quantize_fp8(x, pow2=pow2)
    rows = permuted_rows(ids.numel(), count, 1)
    made, layout, position, scales = moe.permuted(
        values, ids, experts=count, align=1, rows=rows, scale=scale
    )
    assert scales is not None
    hidden = grouped_fp8_gemm(made, scales, w13[0], w13[1], layout, out_dtype=x.dtype)
    values, scale = silu_mul_quantize(hidden, pow2=pow2)
    done = grouped_fp8_gemm(values, scale, w2[0], w2[1], layout, out_dtype=x.dtype)
    return unpermute(done, position, weights, shared)
