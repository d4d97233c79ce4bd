"""add_rms_norm on the processor."""

from torch import Tensor

from dsa_hal.backends.cpu.rms_norm import normed
from dsa_hal.ops.norm import add_rms_norm


@add_rms_norm.impl("cpu", "torch", contract=1)
def forward(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    total = x.float() + residual
    return normed(total, weight, eps).to(x.dtype), total.to(x.dtype)
