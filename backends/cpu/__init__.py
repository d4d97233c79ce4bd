"""The processor: plain torch, vectorised, works everywhere. The embedded default."""

from __future__ import annotations

import platform
from pathlib import Path

from dsa_hal.target import Target


def target() -> Target | str:
    """The processor is always present."""
    return Target("cpu", "any", "cpu", _model() or platform.machine(), score=0)


def _model() -> str:
    """What the maker calls it, where the system says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
