"""grouped_gemm on the processor."""

from torch import Tensor

from dsa_hal.backends.cpu._product import product, runs
from dsa_hal.ops.gemm import grouped_gemm


@grouped_gemm.impl("cpu", "torch", contract=1)
def gemm(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Tensor:
    """A product per stretch of rows of one group; groups without rows cost nothing."""
    out = a.new_zeros(a.shape[0], b.shape[1])
    for group, begin, end in runs(grouped_layout, b.shape[0], "grouped_gemm: grouped_layout"):
        out[begin:end] = product(a[begin:end], b[group])
    return out
