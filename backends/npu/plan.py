"""plan on Ascend, in plain torch: the device's kernels divide their work themselves."""

from torch import Tensor

from dsa_hal.ops.schedule import plan


@plan.impl("npu", "torch", contract=1, rank=-1)
def split(lengths: Tensor, *, workers: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """The reference; it does not wait for the device."""
    return plan.reference(lengths, workers=workers, block=block)
