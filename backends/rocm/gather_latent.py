"""gather_latent on AMD Instinct."""

import torch
from torch import Tensor

from dsa_hal.backends.portable import layouts
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.cache import gather_latent


def _why_not(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> str | None:
    return layouts.unknown(layout)


@gather_latent.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS, why_not=_why_not)
def gather(
    pages: Tensor, slots: Tensor, *, layout: str, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Groups of values per program, de-quantised in registers."""
    from dsa_hal.backends.portable._kernels.cache import gathered

    return gathered(gather_latent.name, pages, slots, layout, out_dtype)[0]
