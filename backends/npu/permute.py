"""permute on Ascend, in plain torch: the device's routing knows no alignment of experts and leaves
rows unwritten where this one has zeros. `moe_experts` does without."""

from dsa_hal.ops.moe import permute

permute.impl("npu", "torch", contract=1, rank=-1)(permute.reference)
