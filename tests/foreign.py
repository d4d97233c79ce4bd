"""Cases for devices of another kind than those of CUDA and ROCm."""

from __future__ import annotations

from dsa_hal.case import Case


def foreign(case: Case) -> bool:
    """Whether a case is about int8 or about a pool in split order."""
    words = [value for value in case.axes.values() if isinstance(value, str)]
    return any("int8" in word or "_split" in word for word in words)
