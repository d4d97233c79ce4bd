"""add_rms_norm on Ascend, by `npu_rms_norm` of an fp32 sum. `npu_add_rms_norm` takes a weight of
the rows' dtype alone, which the model's is not, and gives no word that it norms the sum before it
is rounded."""

import torch
from torch import Tensor

from dsa_hal.backends.npu._library import refusal
from dsa_hal.backends.npu._products import meta
from dsa_hal.backends.npu.rms_norm import normed
from dsa_hal.ops.norm import add_rms_norm


def _why_not(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6) -> str | None:
    width = x.shape[-1]
    return refusal(
        "npu_rms_norm", input=meta(1, width, dtype=torch.float32),
        gamma=meta(width, dtype=torch.float32),
    )  # fmt: skip


@add_rms_norm.impl("npu", "rms_norm", contract=1, why_not=_why_not)
def forward(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """In fp32, each result rounded once."""
    total = x.float() + residual
    if not x.numel():
        return total.to(x.dtype), total.to(x.dtype)
    return normed(total, weight.float(), eps).to(x.dtype), total.to(x.dtype)


add_rms_norm.impl("npu", "torch", contract=1, rank=-1)(add_rms_norm.reference)
