"""Device work recorded once and replayed without the host, where a device's own module offers that.

The work must read and write the same memory each time, wait for nothing on the host, and have run
before: what is compiled or loaded on first use cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from dsa_hal.errors import DsaHalError

T = TypeVar("T")

_NAMES = ("CUDAGraph", "NPUGraph", "XPUGraph")
"""What torch's device modules call a graph; beside it they have the context manager `graph`."""


def _graph(device: torch.device) -> Callable[[], Any] | None:
    module = torch.get_device_module(device)
    made = (getattr(module, name, None) for name in _NAMES)
    return next(filter(None, made), None) if hasattr(module, "graph") else None


def can_record(device: torch.device) -> bool:
    """Whether this device records work."""
    return device.type not in ("cpu", "meta") and _graph(device) is not None


class Recorded(Generic[T]):
    """Work as it was recorded; recording does not run it.

    result  what the work returned; tensors in it are written anew by every `replay()`
    """

    def __init__(self, work: Callable[[], T], device: torch.device) -> None:
        made = _graph(device)
        if made is None:
            raise DsaHalError(f"{device.type} records no work with torch {torch.__version__}")
        self._graph: Any = made()
        try:
            with torch.get_device_module(device).graph(self._graph):
                self.result = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            raise DsaHalError(
                f"a step could not be recorded on {device.type} ({said});"
                " an op in it waits for the host: name another implementation of it, or record"
                " nothing (dsa-hal generate --no-recording)"
            ) from error

    def replay(self) -> T:
        """Run the work again."""
        self._graph.replay()
        return self.result
