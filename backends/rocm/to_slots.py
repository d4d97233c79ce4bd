"""to_slots on AMD Instinct."""

from torch import Tensor

from dsa_hal.backends.portable.select import slots
from dsa_hal.backends.rocm._tiles import ARCHES, NEEDS
from dsa_hal.ops.select import to_slots


@to_slots.impl("rocm", "triton", contract=1, arch=ARCHES, needs=NEEDS)
def tiled(
    indices: Tensor, block_table: Tensor, rows_per_request: int = 1, *, page_size: int
) -> Tensor:
    """One pass. A position past the table reads the table's last entry."""
    return slots(indices, block_table, rows_per_request, page_size)
