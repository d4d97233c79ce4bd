"""store_latent on NVIDIA GPUs."""

from torch import Tensor

from dsa_hal.ops.cache import store_latent


@store_latent.impl("cuda", "triton", contract=1, arch=("sm90",), needs=("triton>=3.6",))
def store(pages: Tensor, latent: Tensor, slots: Tensor, *, layout: str) -> None:
    """Quantised and written in one launch."""
    from dsa_hal.backends.portable._kernels.cache import stored

    stored(store_latent.name, pages, latent, slots, layout, True)
