"""quantize_fp8 on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.rows import power_of_two, too_wide
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.quant import quantize_fp8


def _why_not(x: Tensor, *, group: int = 128, block_rows: int = 1, pow2: bool = True) -> str | None:
    return too_wide(power_of_two(group) * power_of_two(block_rows), "a block (in powers of two)")


@quantize_fp8.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def quantize(
    x: Tensor, *, group: int = 128, block_rows: int = 1, pow2: bool = True
) -> tuple[Tensor, Tensor]:
    """Some blocks per program, in registers: x is read once."""
    from dsa_hal.backends.portable._kernels.quant import quantized

    return quantized(x, group=group, block_rows=block_rows, pow2=pow2)
