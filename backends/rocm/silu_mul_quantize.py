"""silu_mul_quantize on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.fused import silu_mul_quantize


@silu_mul_quantize.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS)
def forward(x: Tensor, *, pow2: bool = True) -> tuple[Tensor, Tensor]:
    """One pass: x is read once, the activation stays in registers."""
    from dsa_hal.backends.portable._kernels.activation import gated_quantized

    return gated_quantized(x, pow2)
