"""linear on Ascend."""

import torch
from torch import Tensor
from torch.nn import functional

from dsa_hal.backends.npu._fp8 import multiplied_out
from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu._products import (
    Rows,
    half,
    is_float,
    is_int8,
    like,
    meta,
    product,
    quantised,
    quantising,
)
from dsa_hal.ops.packed import linear


def _matmul_why_not(x: Tensor, weight: list[Tensor], *, act: str = "none") -> str | None:
    if is_int8(weight):
        return "the weight is int8; npu_quant_matmul multiplies it"
    return None


@linear.impl("npu", "matmul", contract=1, why_not=_matmul_why_not)
def forward(x: Tensor, weight: list[Tensor], *, act: str = "none") -> Tensor:
    """torch's own product, which torch_npu maps to the device's. It rounds activations less than
    `act` asks: not at all. An FP8 weight is multiplied out at every call."""
    matrix = weight[0] if is_float(weight) else multiplied_out(weight[0], weight[1], x.dtype)
    both = torch.promote_types(x.dtype, matrix.dtype)
    return functional.linear(x.to(both), matrix.to(both)).to(x.dtype)


def _quant_why_not(x: Tensor, weight: list[Tensor], *, act: str = "none") -> str | None:
    if is_float(weight):
        return f"the weight is {weight[0].dtype}; npu_quant_matmul takes int8 and FP8 ones"
    if not is_int8(weight) and act == "none":
        return "activations are not to be rounded; npu_quant_matmul would round them to FP8"
    k = x.shape[1]
    if is_int8(weight) and k != weight[0].shape[0]:
        return f"x has {k} columns, the packed weight {weight[0].shape[0]} rows"
    dtype, flat = half(x.dtype), [like(part) for part in weight]
    name, arguments = quantising(meta(1, k, dtype=dtype), flat)
    rows = Rows.meta(1, k, flat, dtype)
    return refusal(name, **arguments) or refusal("npu_quant_matmul", **product(rows, flat, dtype))


@linear.impl("npu", "quant_matmul", contract=1, rank=1, why_not=_quant_why_not)
def quantised_forward(x: Tensor, weight: list[Tensor], *, act: str = "none") -> Tensor:
    """Activations as the weight is: int8 per token, or on the 950 FP8 in groups of 128."""
    if not x.shape[0]:
        n = weight[0].shape[1 if is_int8(weight) else 0]
        return x.new_zeros(0, n)
    dtype, dense = half(x.dtype), [part.contiguous() for part in weight]
    rows = quantised(x.to(dtype), dense)
    out: Tensor = call("npu_quant_matmul", **product(rows, dense, dtype))
    return out.to(x.dtype)
