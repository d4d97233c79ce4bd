"""pack_weight on Ascend: a policy each. `DSA_HAL_IMPL="pack_weight=w8a8"` chooses int8."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._fp8 import multiplied_out, strips
from dsa_hal.backends.npu._library import refusal
from dsa_hal.backends.npu._products import Rows, meta, product
from dsa_hal.ops.packed import pack_weight
from dsa_hal.ops.quant import INT8_MAX


@pack_weight.impl("npu", "fp8", contract=1, arch=("950",), rank=1)
def as_it_is(weight: Tensor, scale: Tensor | None = None) -> list[Tensor]:
    """The checkpoint's own form, no copy: the 950 multiplies FP8 with these blocks."""
    return [weight] if scale is None else [weight, scale]


@pack_weight.impl("npu", "bf16", contract=1)
def as_bf16(weight: Tensor, scale: Tensor | None = None) -> list[Tensor]:
    """[weight], multiplied out to bf16 if it was FP8 and the very same tensor if not."""
    return [weight] if scale is None else [multiplied_out(weight, scale, torch.bfloat16)]


def _why_not(weight: Tensor, scale: Tensor | None = None) -> str | None:
    if scale is None:
        return None
    *_, n, k = weight.shape
    packed = [meta(k, n, dtype=torch.int8), meta(n, dtype=torch.bfloat16)]
    rows = Rows.meta(1, k, packed, torch.bfloat16)
    return refusal("npu_quant_matmul", **product(rows, packed, torch.bfloat16))


@pack_weight.impl("npu", "w8a8", contract=1, rank=-1, why_not=_why_not)
def as_int8(weight: Tensor, scale: Tensor | None = None) -> list[Tensor]:
    """FP8 as symmetric int8 per output, [int8 [(experts,) k, n], bf16 [(experts,) n]]; products
    with it round activations to int8 per token. What is not FP8 stays as it is."""
    if scale is None:
        return [weight]
    *stack, n, k = weight.shape
    codes = torch.empty(*stack, k, n, dtype=torch.int8, device=weight.device)
    scales = torch.empty(*stack, n, dtype=torch.bfloat16, device=weight.device)
    whole, factors = (weight, scale) if stack else (weight[None], scale[None])
    made, steps = (codes, scales) if stack else (codes[None], scales[None])
    for expert, rows, wide in strips(whole, factors):
        steps[expert, rows] = wide.abs().amax(1) / INT8_MAX
        step = steps[expert, rows].float()[:, None]
        code = (wide / step).round_().clamp_(-INT8_MAX, INT8_MAX)
        made[expert, :, rows] = torch.where(step > 0, code, 0).to(torch.int8).T
    return [codes, scales]
