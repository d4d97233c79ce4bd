"""grouped_gemm on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import gemm
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.gemm import grouped_gemm


@grouped_gemm.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS)
def tiled(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Tensor:
    """Any shape and stride, one program per tile, once for each group in the tile."""
    return gemm.grouped(a, b, grouped_layout)
