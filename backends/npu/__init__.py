"""Huawei Ascend: 910B (A2), 910C (A3) and 950, through torch_npu."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from dsa_hal.target import Architecture, Target

ARCHITECTURES = (
    Architecture("910b", "Ascend910B2", processors=24, shared=192 << 10,
                 source="CANN's own limits"),
    Architecture("910c", "Ascend910_9392", processors=24, shared=192 << 10, source="as of 910b"),
    Architecture("950", "Ascend950PR_9589", processors=32, shared=248 << 10,
                 fp8=torch.float8_e4m3fn, source="CANN's own limits"),
)  # fmt: skip
"""What is known of them without a device: cube cores, and the unified buffer as the memory of a
block. 910B and 910C (one of its two dies) multiply no FP8."""


def target() -> Target | str:
    """The first NPU of this process, or why there is none; torch_npu is imported only to ask it."""
    if find_spec("torch_npu") is None:
        return "torch_npu is not installed; it and CANN are needed for Ascend devices"
    import torch_npu

    if not torch_npu.npu.is_available():
        return "torch_npu finds no NPU; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"
    name = torch_npu.npu.get_device_name()
    return Target("npu", name.removeprefix("Ascend").lower(), "npu", name, score=100)
