"""Timing: what is timed is cold, the median is one, and percents follow from cost and roofs."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
import torch

from dsa_hal import measure as module
from dsa_hal.case import Cost
from dsa_hal.measure import Roofs, Timing, last_level_cache, measure, percent_of_roof, roofs


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of 64 KiB, so that no test writes hundreds of megabytes."""
    monkeypatch.setattr(module, "last_level_cache", lambda device: 1 << 16)


QUICK: dict[str, Any] = dict(device="cpu", warmup=0.0, repeats=5, min_time=0.0)


def test_slower_takes_longer() -> None:
    def wait(seconds: float) -> None:
        time.sleep(seconds)

    short, long = (measure(wait, {"seconds": s}, **QUICK) for s in (0.001, 0.01))
    assert 0.001 <= short.median_s < long.median_s
    assert long.median_s >= 0.01


def test_inputs_rotate_through_copies_larger_than_the_cache() -> None:
    seen: list[int] = []
    x = torch.arange(4096.0)

    def note(x: torch.Tensor) -> None:
        assert torch.equal(x, torch.arange(4096.0))
        seen.append(x.data_ptr())

    measure(note, {"x": x}, **QUICK)
    places = set(seen)
    assert len(places) * x.numel() * 4 > 1 << 16
    assert x.data_ptr() not in places
    assert all(a != b for a, b in pairwise(seen))


def test_large_inputs_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COPY_BYTES", 1000)
    seen: set[int] = set()
    measure(lambda x: seen.add(x.data_ptr()), {"x": torch.zeros(4096)}, **QUICK)
    assert len(seen) == 1


def test_a_flush_goes_before_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer holds the number of flushes so far, and is several caches large."""
    made: list[torch.Tensor] = []
    zeros = torch.zeros

    def remember(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(zeros(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", remember)
    counts: list[int] = []
    measure(lambda: counts.append(int(made[0][-1])), {}, **QUICK)
    assert made[0].numel() == module.FLUSH * (1 << 16)
    assert counts == list(range(1, len(counts) + 1))
    assert len(counts) == 1 + QUICK["repeats"]


def test_recorded_calls_find_what_has_left_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two calls with one copy, the others read `FLUSH` caches."""

    class Recorded:
        def __init__(self, work: Any, device: torch.device) -> None:
            work()

    monkeypatch.setattr(module, "Recorded", Recorded)
    seen: list[int] = []
    x = torch.zeros(4096)
    calls = module.record_calls(lambda x: seen.append(x.data_ptr()), {"x": x}, torch.device("cpu"))
    first, recorded = seen[0], seen[1:]
    assert first in recorded, "what is recorded has run before"
    assert len(recorded) == calls.count >= module.RECORDED
    assert {own["x"].data_ptr() for own in calls.inputs} == set(recorded)
    turn = len(calls.inputs)
    assert (turn - 1) * x.numel() * 4 >= module.FLUSH * (1 << 16)
    assert recorded[turn:] == recorded[:-turn] and len(set(recorded[:turn])) == turn


def test_written_arguments_are_restored() -> None:
    start: list[float] = []

    def write(out: torch.Tensor) -> None:
        start.append(float(out.sum()))
        out += 1

    given = torch.zeros(8)
    measure(write, {"out": given}, mutates=("out",), **QUICK)
    assert set(start) == {0.0}
    assert float(given.sum()) == 0


def test_tensors_in_lists_rotate_too() -> None:
    seen: set[int] = set()
    weight = [torch.zeros(4096), torch.zeros(4)]
    measure(lambda weight: seen.add(weight[0].data_ptr()), {"weight": weight}, **QUICK)
    assert len(seen) > 1


def test_warm_up_and_length_go_by_time() -> None:
    calls: list[float] = []
    begin = time.perf_counter()
    timing = measure(
        lambda: calls.append(0), {}, device="cpu", warmup=0.05, repeats=1, min_time=0.05
    )
    assert time.perf_counter() - begin >= 0.1
    assert 1 < len(timing.samples) < len(calls)


def test_median_and_spread() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 100.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert timing.median_s == 6.0
    assert timing.spread == (2.0, 10.0)
    assert timing.samples[0] == 5.0


def test_percent_of_roof() -> None:
    top = Roofs(100.0, {torch.float32: 10.0, torch.bfloat16: 40.0})
    assert percent_of_roof(Cost(flop=80, bytes=100), 4.0, top) == 50  # 2 s of operations
    assert percent_of_roof(Cost(flop=80, bytes=300), 4.0, top) == 75  # 3 s of bytes
    assert percent_of_roof(Cost(flop=80, bytes=100), 16.0, top, torch.float32) == 50


def test_roofs_are_measured_once() -> None:
    here = roofs("cpu")
    assert here.bytes_per_s > 1e8
    assert set(here.flop_per_s) == {torch.float32, torch.bfloat16}
    assert min(here.flop_per_s.values()) > 1e8
    assert roofs(torch.device("cpu")) is here


@pytest.mark.parametrize(
    ("text", "size"), [("512K\n", 512 << 10), ("32M", 32 << 20), ("64", 64), ("1G", 1 << 30)]
)
def test_cache_sizes_as_linux_writes_them(text: str, size: int) -> None:
    assert module._bytes(text) == size


def test_the_cache_of_this_processor_is_plausible() -> None:
    assert 1 << 18 <= last_level_cache(torch.device("cpu")) <= 4 << 30
