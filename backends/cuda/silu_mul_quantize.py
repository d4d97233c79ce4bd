"""silu_mul_quantize on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.ops.fused import silu_mul_quantize


@silu_mul_quantize.impl("cuda", "triton", contract=1, arch=("sm90",), needs=("triton>=3.6",))
def forward(x: Tensor, *, pow2: bool = True) -> tuple[Tensor, Tensor]:
    """One pass: x is read once, the activation stays in registers."""
    from dsa_hal.backends.portable._kernels.activation import gated_quantized

    return gated_quantized(x, pow2)
