"""store_index_key on the processor."""

from torch import Tensor

from dsa_hal.backends.cpu.store_latent import write
from dsa_hal.ops.cache import store_index_key


@store_index_key.impl("cpu", "torch", contract=1)
def store(pages: Tensor, k: Tensor, slots: Tensor, *, layout: str, pow2: bool = True) -> None:
    """The latent's store; the layout says where values and scales go."""
    write(store_index_key.name, pages, k, slots, layout, pow2)
