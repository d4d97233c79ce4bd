"""plan on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable import plan as portable
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.schedule import plan


@plan.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS)
def split(lengths: Tensor, *, workers: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """One program: rows are few, and the host waits for nothing."""
    return portable.split(lengths, workers, block)
