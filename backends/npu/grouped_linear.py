"""grouped_linear on Ascend."""

from torch import Tensor

from dsa_hal.backends.npu._fp8 import multiplied_out
from dsa_hal.backends.npu._grouped import by_expert, refused
from dsa_hal.backends.npu._products import half, is_float, is_int8, meta
from dsa_hal.ops.packed import grouped_linear


def _matmul_why_not(
    x: Tensor, weight: list[Tensor], grouped_layout: Tensor, *, act: str = "none"
) -> str | None:
    if is_int8(weight):
        return "weights are int8; quant_grouped_matmul multiplies them"
    flat = weight if is_float(weight) else [meta(*weight[0].shape, dtype=x.dtype)]
    return refused(x.shape[1], 1, flat, x.dtype)


@grouped_linear.impl("npu", "grouped_matmul", contract=1, why_not=_matmul_why_not)
def forward(
    x: Tensor, weight: list[Tensor], grouped_layout: Tensor, *, act: str = "none"
) -> Tensor:
    """Activations are not rounded, which `act` allows. FP8 weights are multiplied out at every
    call."""
    flat = weight if is_float(weight) else [multiplied_out(weight[0], weight[1], x.dtype)]
    return by_expert(x, flat, grouped_layout, x.dtype)


def _quant_why_not(
    x: Tensor, weight: list[Tensor], grouped_layout: Tensor, *, act: str = "none"
) -> str | None:
    if is_float(weight):
        return f"weights are {weight[0].dtype}; quant_grouped_matmul takes int8 and FP8 ones"
    if not is_int8(weight) and act == "none":
        return "activations are not to be rounded; quant_grouped_matmul would round them to FP8"
    return refused(x.shape[1], 1, weight, half(x.dtype))


@grouped_linear.impl("npu", "quant_grouped_matmul", contract=1, rank=1, why_not=_quant_why_not)
def quantised_forward(
    x: Tensor, weight: list[Tensor], grouped_layout: Tensor, *, act: str = "none"
) -> Tensor:
    """Activations as the weights are: int8 per row, or on the 950 FP8 in groups of 128."""
    return by_expert(x, weight, grouped_layout, half(x.dtype)).to(x.dtype)
