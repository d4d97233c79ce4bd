"""unpermute on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.moe import unpermute


@unpermute.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS)
def summed(rows: Tensor, position: Tensor, weights: Tensor, shared: Tensor | None = None) -> Tensor:
    """One program per token, or per part of a wide one."""
    from dsa_hal.backends.portable._kernels import moe

    return moe.summed(rows, position, weights, shared)
