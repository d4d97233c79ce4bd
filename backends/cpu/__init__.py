"""The processor: plain torch, vectorised, works everywhere. The embedded default."""

from __future__ import annotations

import platform

from dsa_hal.target import Target


def target() -> Target | str:
    """The processor is always present."""
    return Target("cpu", "any", "cpu", platform.processor() or platform.machine(), score=0)
