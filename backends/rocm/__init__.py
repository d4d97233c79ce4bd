"""AMD Instinct: MI350 and MI355 (gfx950), MI300 (gfx942). torch calls these devices "cuda" too."""

from __future__ import annotations

import torch

from dsa_hal.target import Target


def target() -> Target | str:
    """The first ROCm device of this process, or why there is none."""
    if torch.version.hip is None:
        return f"torch {torch.__version__} is built without ROCm; install a ROCm build of torch"
    if not torch.cuda.is_available():
        return "torch finds no ROCm device; check `rocm-smi` and HIP_VISIBLE_DEVICES"
    arch = torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
    return Target("rocm", arch, "cuda", torch.cuda.get_device_name(), score=100)
