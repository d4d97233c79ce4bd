"""store_latent on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import layouts
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.cache import store_latent


def _why_not(pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str) -> str | None:
    return layouts.unknown(layout)


@store_latent.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def store(pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str) -> None:
    """Quantised and written in one launch."""
    from dsa_hal.backends.portable._kernels.cache import stored

    stored(store_latent.name, pages, latent, slots, layout, True)
