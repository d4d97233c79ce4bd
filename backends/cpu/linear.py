"""linear on the processor."""

from torch import Tensor

from dsa_hal.backends.cpu._product import packed_product, rounded
from dsa_hal.ops.packed import linear


@linear.impl("cpu", "torch", contract=1)
def forward(x: Tensor, weight: list[Tensor], *, act: str = "none") -> Tensor:
    """The activations' FP8 rounding in fp32, then one product."""
    return packed_product(rounded(x, act), weight).to(x.dtype)
