"""What a measurement depends on beside the code: versions of what lies under it, in words."""

from __future__ import annotations

import importlib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from dsa_hal.target import Target, packages


def versions(target: Target) -> dict[str, str]:
    """torch, triton and the device's driver, as far as they are here: a backend says what its
    driver is (`driver` of its package)."""
    found = {"torch": str(torch.__version__)}
    for name in ("triton", "triton-rocm"):  # the latter is what torch's builds for ROCm bring
        with suppress(PackageNotFoundError):
            found["triton"] = version(name)
    home = importlib.import_module(packages()[target.backend][0])
    driver = home.driver() if hasattr(home, "driver") and not target.absent else None
    return found if driver is None else {**found, "driver": driver}
