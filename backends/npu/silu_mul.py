"""silu_mul on Ascend."""

from torch import Tensor

from dsa_hal.backends.npu._library import call, refusal
from dsa_hal.backends.npu._products import meta
from dsa_hal.ops.norm import silu_mul


def _why_not(x: Tensor) -> str | None:
    return refusal("npu_swiglu", input=meta(1, x.shape[1], dtype=x.dtype), dim=-1)


@silu_mul.impl("npu", "swiglu", contract=1, why_not=_why_not)
def forward(x: Tensor) -> Tensor:
    """The kernel's first half is the gate, as here."""
    if not x.numel():
        return x.new_empty(x.shape[0], x.shape[1] // 2)
    out: Tensor = call("npu_swiglu", input=x.contiguous(), dim=-1)
    return out


silu_mul.impl("npu", "torch", contract=1, rank=-1)(silu_mul.reference)
