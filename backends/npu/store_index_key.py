"""store_index_key on Ascend."""

from torch import Tensor

from dsa_hal.backends.npu._slots import refused, write
from dsa_hal.ops.cache import store_index_key


def _why_not(
    pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True
) -> str | None:
    return refused(pages, k, layout)


@store_index_key.impl("npu", "scatter_nd_update", contract=1, why_not=_why_not)
def store(pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True) -> None:
    """Encoded in plain torch: codes are made of the scale as fp16 holds it, which no quantiser of
    the device does."""
    write(store_index_key.name, pages, k, slots, layout, pow2)
