"""to_slots on Ascend, in plain torch: where the model runs, the kernels translate by themselves."""

from torch import Tensor

from dsa_hal.ops.select import to_slots


@to_slots.impl("npu", "torch", contract=1, rank=-1)
def translate(
    indices: Tensor, block_table: Tensor, rows_per_request: int = 1, *, page_size: int
) -> Tensor:
    """One gather from the table and some arithmetic: the reference."""
    return to_slots.reference(indices, block_table, rows_per_request, page_size=page_size)
