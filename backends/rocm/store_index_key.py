"""store_index_key on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import layouts
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.cache import store_index_key


def _why_not(
    pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True
) -> str | None:
    return layouts.unknown(layout)


@store_index_key.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def store(pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True) -> None:
    """Quantised and written in one launch."""
    from dsa_hal.backends.portable._kernels.cache import stored

    stored(store_index_key.name, pages, k, slots, layout, pow2)
