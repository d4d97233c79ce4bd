"""indexer_qk on Ascend for int8 keys; what else a cache may hold is made of the op's parts."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._attention import meta
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu.hadamard import transform
from dsa_hal.backends.npu.layer_norm import forward as normed
from dsa_hal.backends.npu.rope import refused, rotate
from dsa_hal.ops.fused import indexer_qk


def _why_not(
    q: Tensor, k: Tensor, weights: Tensor, k_weight: Tensor, k_bias: Tensor, positions: Tensor,
    cos_sin: Tensor, *, interleaved: bool = False, quantize: str = "fp8", pow2: bool = True,
    eps: float = 1e-6,
) -> str | None:  # fmt: skip
    if quantize != "int8":
        return f"makes int8; quantize is {quantize!r}"
    tokens, heads = weights.shape
    rows = meta(tokens, heads, k.shape[1], dtype=q.dtype)
    return refused(tokens, heads, cos_sin.shape[1], interleaved) or refusal(
        "npu_dynamic_quant", input=rows
    )


@indexer_qk.impl("npu", "dynamic_quant", contract=2, why_not=_why_not)
def forward(
    q: Tensor, k: Tensor, weights: Tensor, k_weight: Tensor, k_bias: Tensor, positions: Tensor,
    cos_sin: Tensor, *, interleaved: bool = False, quantize: str = "fp8", pow2: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The device's quantiser for the queries, by token and head. What it makes of a row of zeros is
    not documented; here its codes are 0."""
    tokens, heads = weights.shape
    dim = k.shape[1]
    turned = rotate(q.view(tokens, heads, dim), positions, cos_sin, interleaved=interleaved)
    key = rotate(normed(k, k_weight, k_bias, eps=eps), positions, cos_sin, interleaved=interleaved)
    weights = weights * (heads * dim) ** -0.5
    if not tokens:
        return turned.to(torch.int8), key, weights
    codes, scale = call("npu_dynamic_quant", input=transform(turned).contiguous())
    return codes.masked_fill(scale[..., None] == 0, 0), transform(key), weights * scale
