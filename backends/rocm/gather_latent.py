"""gather_latent on AMD Instinct."""

import torch
from torch import Tensor

from dsa_hal.backends.rocm._tiles import ARCHES
from dsa_hal.ops.cache import gather_latent


@gather_latent.impl("rocm", "triton", contract=1, arch=ARCHES, needs=("triton>=3.6",))
def gather(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Groups of values per program, de-quantised in registers."""
    from dsa_hal.backends.portable._kernels.cache import gathered

    return gathered(gather_latent.name, pages, slots, layout, out_dtype)[0]
