"""grouped_gemm on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.backends.portable import gemm
from dsa_hal.ops.gemm import grouped_gemm


@grouped_gemm.impl("cuda", "triton", contract=1, needs=("triton>=3.6",))
def tiled(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Tensor:
    """Any shape and stride, one program per tile, once for each group in the tile."""
    return gemm.grouped(a, b, grouped_layout)
