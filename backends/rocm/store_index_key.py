"""store_index_key on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.rocm._tiles import ARCHES
from dsa_hal.ops.cache import store_index_key


@store_index_key.impl("rocm", "triton", contract=1, arch=ARCHES, needs=("triton>=3.6",))
def store(pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True) -> None:
    """Quantised and written in one launch."""
    from dsa_hal.backends.portable._kernels.cache import stored

    stored(store_index_key.name, pages, k, slots, layout, pow2)
