"""grouped_linear on the processor."""

from torch import Tensor

from dsa_hal.backends.cpu._product import packed_product, rounded, runs
from dsa_hal.ops.packed import grouped_linear


@grouped_linear.impl("cpu", "torch", contract=1)
def forward(
    x: Tensor, weight: list[Tensor], grouped_layout: Tensor, *, act: str = "none"
) -> Tensor:
    """A product per stretch of rows of one expert; experts without rows cost nothing."""
    experts, n = weight[0].shape[:2]
    out = x.new_zeros(x.shape[0], n)
    for expert, begin, end in runs(grouped_layout, experts, "grouped_linear: grouped_layout"):
        mine = [part[expert] for part in weight]
        out[begin:end] = packed_product(rounded(x[begin:end], act), mine)
    return out
