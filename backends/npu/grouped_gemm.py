"""grouped_gemm on Ascend."""

from torch import Tensor

from dsa_hal.backends.npu._grouped import by_expert, refused
from dsa_hal.backends.npu._products import stretches
from dsa_hal.ops.gemm import grouped_gemm


def _why_not(a: Tensor, b: Tensor, grouped_layout: Tensor) -> str | None:
    return refused(a.shape[1], 1, [b], a.dtype)


@grouped_gemm.impl("npu", "grouped_matmul", contract=1, why_not=_why_not)
def gemm(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Tensor:
    """Routed as tokens are, so that rows may stand in any order."""
    return by_expert(a, [b], grouped_layout, a.dtype)


@grouped_gemm.impl("npu", "torch", contract=1, rank=-1)
def by_stretches(a: Tensor, b: Tensor, grouped_layout: Tensor) -> Tensor:
    """A product per stretch of rows of one group; the host waits for the layout."""
    out = a.new_zeros(a.shape[0], b.shape[1])
    for group, rows in stretches(grouped_layout):
        out[rows] = a[rows] @ b[group].T
    return out
