"""Huawei Ascend: 910B (A2), 910C (A3) and 950, through torch_npu."""

from __future__ import annotations

from importlib.util import find_spec

from dsa_hal.target import Target


def target() -> Target | str:
    """The first NPU of this process, or why there is none; torch_npu is imported only to ask it."""
    if find_spec("torch_npu") is None:
        return "torch_npu is not installed; it and CANN are needed for Ascend devices"
    import torch_npu

    if not torch_npu.npu.is_available():
        return "torch_npu finds no NPU; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"
    name = torch_npu.npu.get_device_name()
    return Target("npu", name.removeprefix("Ascend").lower(), "npu", name, score=100)
