"""store_latent on Ascend."""

from torch import Tensor

from dsa_hal.backends.npu._slots import refused, write
from dsa_hal.ops.cache import store_latent


def _why_not(pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str) -> str | None:
    return refused(pages, latent, layout)


@store_latent.impl("npu", "scatter_nd_update", contract=1, why_not=_why_not)
def store(pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str) -> None:
    """Encoded as the contract says, in plain torch: `npu_dynamic_quant` does not say how it
    divides, and the stored bytes are the contract's."""
    write(store_latent.name, pages, latent, slots, layout, pow2=True)
