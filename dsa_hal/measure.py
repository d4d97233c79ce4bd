"""Times as a caller in a model sees them: cold caches, medians, and beside what the device can do.

Between two runs a buffer several times the size of the last cache is written, and the inputs rotate
through copies, so that no run finds what it reads in a cache. Device timers are used where a device
has them; there the write of the buffer also keeps the device busy while the host launches the run.

`record_calls` is for what runs inside a recorded decode step: calls one behind the other, without
the host, each with inputs of its own. They are as cold, but no written buffer leaves a cache full
of lines that must go to memory before anything can come.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_hal.case import Cost, Inputs, copied, tree_map
from dsa_hal.graphs import Recorded

FLUSH = 4
"""The flush buffer's size in last-level caches."""

UNKNOWN_CACHE = {"cpu": 16 << 20, "other": 64 << 20}
"""Bytes assumed for a last-level cache of which the system says nothing."""

RECORDED = 32
"""Calls in one recording at least: they share the time that a replay takes to begin."""

COPIES = 64
"""Most copies of the inputs; small inputs leave the cache through the flush alone."""

COPY_BYTES = 1 << 30
"""Most memory for copies of the inputs; the first copy is made whatever its size."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    median_s  the number to report
    spread    (10th, 90th percentile)
    samples   every timed call, in order
    """

    median_s: float
    spread: tuple[float, float]
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        last = len(ordered) - 1
        low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        return cls(statistics.median(ordered), (low, high), tuple(samples))


@dataclass(frozen=True)
class Roofs:
    """What this device reached here: bytes read plus written per second by a copy, and operations
    per second (a multiply-add is two) by a square matrix product, for each dtype of its factors."""

    bytes_per_s: float
    flop_per_s: dict[torch.dtype, float]


def measure(
    fn: Callable[..., Any],
    inputs: Inputs,
    *,
    device: torch.device | str = "cpu",
    warmup: float = 0.05,
    repeats: int = 20,
    min_time: float = 0.2,
    mutates: Sequence[str] = (),
) -> Timing:
    """The time of `fn(**inputs)` with cold caches.

    device    where the inputs lie
    warmup    seconds of untimed calls, at least one
    repeats   timed calls at least
    min_time  seconds of wall clock at least for all timed calls together with what lies between
    mutates   arguments that fn writes: they are restored before every call, outside the timing
    """
    device = torch.device(device)
    cold = cold_inputs(inputs, device, mutates)
    timer = _host_timed if device.type == "cpu" else _device_timed

    def run() -> float:
        return timer(fn, next(cold), device)

    begin = time.perf_counter()
    run()
    while time.perf_counter() - begin < warmup:
        run()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < max(1, repeats) or time.perf_counter() - begin < min_time:
        samples.append(run())
    return Timing.of(samples)


def cold_inputs(
    inputs: Inputs, device: torch.device, mutates: Sequence[str] = ()
) -> Iterator[Inputs]:
    """Inputs without end, equal to `inputs` and each time in no cache: copies in turn, arguments
    in `mutates` restored, and then the flush buffer written."""
    buffer = torch.zeros(FLUSH * last_level_cache(device), dtype=torch.uint8, device=device)
    for own in _rotation(inputs, device):
        for name in mutates:
            own[name].copy_(inputs[name])
        buffer.add_(1)
        yield own


@dataclass(frozen=True)
class Calls:
    """Many calls as one recording.

    recorded  runs all of them
    count     how many they are
    inputs    what they read: the recording holds addresses alone
    """

    recorded: Recorded[None]
    count: int
    inputs: list[Inputs]


def record_calls(fn: Callable[..., Any], inputs: Inputs, device: torch.device) -> Calls:
    """Calls of `fn` one behind the other, as in a recorded decode step. Copies of the inputs take
    turns which together are `FLUSH` caches: what a call reads has left the cache since the last
    call that read it, and no cache is full of lines to be written back.

    Raises DsaHalError where the device records nothing, or `fn` waits for the host.
    """
    copies = _copies(inputs, FLUSH * last_level_cache(device))
    count = len(copies) * -(-RECORDED // len(copies))

    def work() -> None:
        for own in islice(cycle(copies), count):
            fn(**own)

    fn(**copies[0])  # what is compiled or loaded at a first call cannot be recorded
    return Calls(Recorded(work, device), count, copies)


def percent_of_roof(
    cost: Cost, seconds: float, roofs: Roofs, dtype: torch.dtype | None = None
) -> float:
    """How close a call came to the device's limit, in percent: the time that its bytes or its
    operations need at least, whichever is longer, over the time it took.

    dtype  whose rate counts for operations; None = the fastest dtype measured
    """
    rates = roofs.flop_per_s
    rate = rates[dtype] if dtype is not None else max(rates.values())
    return 100 * max(cost.flop / rate, cost.bytes / roofs.bytes_per_s) / seconds


def roofs(device: torch.device | str) -> Roofs:
    """The device's limits as measured here, once per process; each is the fastest of a few runs."""
    return _roofs(str(torch.device(device)))


@cache
def _roofs(device: str) -> Roofs:
    def fastest(fn: Callable[..., Any], **inputs: Tensor) -> float:
        return min(measure(fn, inputs, device=device, repeats=5, min_time=0.1).samples)

    source = torch.zeros(FLUSH * last_level_cache(torch.device(device)) // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    bytes_per_s = moved / fastest(_copy, source=source, target=target)
    del source, target
    size = 512 if torch.device(device).type == "cpu" else 8192
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[dtype] = 2 * size**3 / fastest(torch.mm, input=a, mat2=b)
    return Roofs(bytes_per_s, rates)


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


@cache
def last_level_cache(device: torch.device) -> int:
    """Bytes of the device's largest cache: what the system says, else `UNKNOWN_CACHE`."""
    if device.type != "cpu":
        facts = torch.get_device_module(device).get_device_properties(device)
        return int(getattr(facts, "L2_cache_size", 0) or UNKNOWN_CACHE["other"])
    found = [
        _bytes(path.read_text())
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    with suppress(ValueError, OSError, AttributeError):  # names that this system does not know
        found.append(os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    return max(found, default=0) or UNKNOWN_CACHE["cpu"]


def _bytes(text: str) -> int:
    """A size as Linux writes it: "512K", "32M", "64"."""
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("KMG") or 0) * unit


def _rotation(inputs: Inputs, device: torch.device) -> Iterator[Inputs]:
    """Copies of the inputs in turn, together larger than the cache where `COPY_BYTES` allows."""
    return cycle(_copies(inputs, last_level_cache(device)))


def _copies(inputs: Inputs, beyond: int) -> list[Inputs]:
    """Copies of the inputs: even without one of them they have `beyond` bytes, where `COPIES` and
    `COPY_BYTES` allow."""
    sizes: list[int] = []

    def weigh(_: str, tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    tree_map(weigh, inputs)
    each = max(1, sum(sizes))
    wanted = 1 + -(-beyond // each)
    count = max(1, min(wanted, COPIES, COPY_BYTES // each))
    return [copied(inputs) for _ in range(count)]


def _host_timed(fn: Callable[..., Any], inputs: Inputs, device: torch.device) -> float:
    begin = time.perf_counter()
    fn(**inputs)
    return time.perf_counter() - begin


def _device_timed(fn: Callable[..., Any], inputs: Inputs, device: torch.device) -> float:
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    begin.record()
    fn(**inputs)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3  # events count milliseconds
