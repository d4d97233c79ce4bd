"""What a measurement depends on beside the code: versions of what lies under it, in words."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from dsa_hal.target import Target


def versions(target: Target) -> dict[str, str]:
    """torch, triton and the device's driver, as far as they are here."""
    found = {"torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    driver = _driver() if target.device == "cuda" else None
    return found if driver is None else {**found, "driver": driver}


def _driver() -> str | None:
    """The NVIDIA driver's version; None where its tool is not installed or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    ask = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return answer.stdout.split("\n")[0].strip() or None
