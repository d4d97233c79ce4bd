"""NVIDIA Hopper: H800 and H200."""

from __future__ import annotations

import shutil
import subprocess

import torch

from dsa_hal.target import Architecture, Target

ARCHITECTURES = (
    Architecture(
        "sm90", "NVIDIA H200", processors=132, shared=227 << 10, lanes=32, registers=255,
        file=1 << 16, threads=2048, fp8=torch.float8_e4m3fn, memory=141e9, bytes_per_s=4.8e12,
        flop_per_s={"bfloat16": 989.4e12, "float8_e4m3fn": 1978.9e12, "float32": 66.9e12},
        source="NVIDIA H200 data sheet; CUDA C++ Programming Guide, compute capability 9.0",
    ),
)  # fmt: skip
"""What is known of them without a device."""


def target() -> Target | str:
    """The first CUDA device of this process, or why there is none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", f"sm{major}{minor}", "cuda", torch.cuda.get_device_name(), score=100)


def driver() -> str | None:
    """The driver's version; None where its tool is not installed or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    ask = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return answer.stdout.split("\n")[0].strip() or None
