"""Contenders timed in turn on one device, each checked before.

Every timed call finds cold caches and a device that is still busy with the flush and a pause, so
that the host has launched all of it before its clock starts: what is measured is the device.
`chain` times what stands in a recorded decode step: many calls in a row, replayed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import Inputs, Maker
from dsa_hal.errors import DsaHalError
from dsa_hal.measure import Calls, Timing, cold_inputs, record_calls

PAUSE_S, CYCLES_PER_S = 1e-4, 2e9
"""The pause before a timed call beyond what its launches take the host, and the clock it counts."""

SLOW_S, FEW = 0.03, 3
"""From this on a call is timed a few times only."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a workload.

    name     "cuda/gluon", or a library's name
    own      whether it counts as ours: neither a library nor an adapter to one
    peer     whether it is a library called as its users call it
    fn       called with `inputs`
    results  what fn returned, as the op's results
    """

    name: str
    fn: Callable[..., Any]
    inputs: Inputs
    own: bool = False
    peer: bool = False
    results: Callable[[Any], tuple[Tensor, ...]] = lambda found: (
        (found,) if isinstance(found, Tensor) else tuple(found)
    )


@dataclass
class DeviceMaker(Maker):
    """A Maker whose numbers come from the device's generator: gigabytes in milliseconds, but not
    the same numbers on every device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._generator = torch.Generator(self.device).manual_seed(self.seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, generator=self._generator, device=self.device)
        return made.mul_(scale).to(dtype)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(
            low, high, shape, generator=self._generator, device=self.device, dtype=dtype
        )

    def permutation(self, count: int, *, dtype: torch.dtype = torch.int32) -> Tensor:
        made = torch.randperm(count, generator=self._generator, device=self.device)
        return made.to(dtype)


@dataclass
class Lane:
    """A contender under way."""

    contender: Contender
    cold: Iterator[Inputs]
    pause: int
    samples: list[float] = field(default_factory=list)
    wanted: int = 0


def race(contenders: Sequence[Contender], device: torch.device, repeats: int) -> list[Timing]:
    """Time the contenders in turn, `repeats` rounds; one that is slow drops out early."""
    lanes = [_lane(contender, device, repeats) for contender in contenders]
    for at in range(repeats):
        for lane in lanes:
            if at < lane.wanted:
                lane.samples.append(_sample(lane, device))
    return [Timing.of(lane.samples) for lane in lanes]


def chain(
    contenders: Sequence[Contender], device: torch.device, repeats: int
) -> list[Timing | str]:
    """Time a call of each in a recording of many (`record_calls`), replayed in turn; for one that
    cannot be recorded, why."""
    recordings = [_recording(contender, device) for contender in contenders]
    samples: list[list[float]] = [[] for _ in recordings]
    for _ in range(repeats):
        for recording, own in zip(recordings, samples, strict=True):
            if isinstance(recording, Calls):
                own.append(_replayed(recording, device))
    return [
        recording if isinstance(recording, str) else Timing.of(own)
        for recording, own in zip(recordings, samples, strict=True)
    ]


def _recording(contender: Contender, device: torch.device) -> Calls | str:
    try:
        return record_calls(contender.fn, contender.inputs, device)
    except DsaHalError as error:
        return str(error)


def _replayed(calls: Calls, device: torch.device) -> float:
    """Seconds of one call; the pause hides what the host needs to start the replay."""
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    torch.cuda._sleep(round(PAUSE_S * CYCLES_PER_S))
    begin.record()
    calls.recorded.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls.count


def _lane(contender: Contender, device: torch.device, repeats: int) -> Lane:
    """Warm up; see how long the host takes to launch a call, and the device to run it."""
    lane = Lane(contender, cold_inputs(contender.inputs, device), 0)
    launch = []
    for _ in range(3):
        inputs = next(lane.cold)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        contender.fn(**inputs)
        launch.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        whole = time.perf_counter() - begin
    # A call that runs for long hides its later launches behind its first ones.
    lane.pause = round((PAUSE_S + min(statistics.median(launch), 1e-3)) * CYCLES_PER_S)
    lane.wanted = FEW if whole > SLOW_S else repeats
    return lane


def _sample(lane: Lane, device: torch.device) -> float:
    inputs = next(lane.cold)
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    torch.cuda._sleep(lane.pause)
    begin.record()
    lane.contender.fn(**inputs)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@contextmanager
def exact_products() -> Iterator[None]:
    """References multiply fp32 as fp32 within the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
