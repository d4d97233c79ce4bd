"""gather_index_key on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.rocm._tiles import ARCHES
from dsa_hal.ops.cache import gather_index_key


@gather_index_key.impl("rocm", "triton", contract=1, arch=ARCHES, needs=("triton>=3.6",))
def gather(pages: Tensor, slots: Tensor, *, layout: str) -> tuple[Tensor, Tensor]:
    """Stored codes and scales as they are."""
    from dsa_hal.backends.portable._kernels.cache import gathered

    k, scale = gathered(gather_index_key.name, pages, slots, layout, None)
    assert scale is not None
    return k, scale
