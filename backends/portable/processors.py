"""How many processors a launch may spread over: the device's, or, where there is none, what the
target in force states."""

from functools import cache

import torch

from dsa_hal.selection import selection


def count(device: torch.device) -> int:
    """Multiprocessors or compute units."""
    if device.type == "cuda":
        return _of(device.index)
    limits = selection().target.limits
    return limits.processors if limits is not None else 1


@cache
def _of(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
