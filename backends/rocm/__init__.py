"""AMD Instinct: MI350 and MI355 (gfx950), MI300 (gfx942). torch calls these devices "cuda" too."""

from __future__ import annotations

from pathlib import Path

import torch

from dsa_hal.target import Architecture, Target

ARCHITECTURES = (
    Architecture(
        "gfx950", "AMD Instinct MI350X", processors=256, shared=160 << 10, lanes=64, registers=512,
        file=4 * 512 * 64, threads=2048, fp8=torch.float8_e4m3fn, memory=288e9, bytes_per_s=8e12,
        flop_per_s={"bfloat16": 2306.9e12, "float8_e4m3fn": 4613.7e12, "float32": 144.2e12},
        source="AMD Instinct MI350X data sheet (2.2 GHz); CDNA 4 architecture white paper",
    ),
    Architecture(
        "gfx942", "AMD Instinct MI300X", processors=304, shared=64 << 10, lanes=64, registers=512,
        file=4 * 512 * 64, threads=2048, fp8=torch.float8_e4m3fnuz, memory=192e9,
        bytes_per_s=5.3e12,
        flop_per_s={"bfloat16": 1307.4e12, "float8_e4m3fnuz": 2614.9e12, "float32": 163.4e12},
        source="AMD Instinct MI300X data sheet (2.1 GHz); CDNA 3 instruction set reference",
    ),
)  # fmt: skip
"""What is known of them without a device. A compute unit has four SIMDs of 512 registers for each
of 64 lanes, and holds 8 wavefronts on each."""


def target() -> Target | str:
    """The first ROCm device of this process, or why there is none."""
    if torch.version.hip is None:
        return f"torch {torch.__version__} is built without ROCm; install a ROCm build of torch"
    if not torch.cuda.is_available():
        return "torch finds no ROCm device; check `rocm-smi` and HIP_VISIBLE_DEVICES"
    arch = torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
    return Target("rocm", arch, "cuda", torch.cuda.get_device_name(), score=100)


def driver() -> str | None:
    """The kernel driver's version and ROCm's; None where neither is known."""
    kernel = Path("/sys/module/amdgpu/version")
    known = [kernel.read_text().strip()] if kernel.is_file() else []
    return (
        ", ".join([*known, *([f"ROCm {torch.version.hip}"] if torch.version.hip else [])]) or None
    )
