"""gather_index_key on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import layouts
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.cache import gather_index_key


def _why_not(pages: Tensor, slots: Tensor, *, layout: str) -> str | None:
    return layouts.unknown(layout)


@gather_index_key.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def gather(pages: Tensor, slots: Tensor, *, layout: str) -> tuple[Tensor, Tensor]:
    """Stored codes and scales as they are."""
    from dsa_hal.backends.portable._kernels.cache import gathered

    k, scale = gathered(gather_index_key.name, pages, slots, layout, None)
    assert scale is not None
    return k, scale
