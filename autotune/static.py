"""Configurations chosen without a device: every one is compiled, and a model of the processor says
which would be fastest. It orders configurations of one kernel; as a time it is a rough guess.

The model is a roofline that pays for what compile metrics show. A launch takes

    LAUNCH + balance * spills
        * max(flop / (peak * busy), (bytes + reread / CACHE) / (bandwidth * under_way))

balance    the busiest processor's programs over the mean
busy       how much of the matrix peak so many warps per scheduler reach
reread     operands that tiles load again: halved when a tile's edge doubles
under_way  bytes that resident programs have under way over those that hide memory's latency
spills     1 + registers in memory / SPILLED

`ci/notes/rocm/static.md` says where each constant comes from and how far the model was checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dsa_hal.autotune.search import Contender
from dsa_hal.autotune.space import Space
from dsa_hal.case import Cost, Inputs
from dsa_hal.registry import Impl, Op
from dsa_hal.target import Architecture

SCHEDULERS = 4
"""SIMDs of a compute unit, or parts of a multiprocessor, each with its share of the registers."""

BLOCKS = 32
"""Programs that one processor holds at most."""

GRANULE = 8
"""Registers of a thread are handed out in so many."""


@dataclass(frozen=True)
class Metrics:
    """What can be read off a compiled program.

    registers      of a thread, accumulators included
    accumulators   of those, AMD's AGPRs
    scalars        of a wavefront, AMD's SGPRs
    spills         registers of a thread that went to memory; NVIDIA: words of its stack
    scalar_spills  scalar registers that went to lanes of vector registers
    scratch        bytes of memory per thread
    size           bytes of code
    shared         bytes of shared memory or LDS of a program
    warps          of a program
    matrix         matrix instruction -> how often the code has it
    memory         kind of access -> how many instructions
    dots           products of tiles, "dtype*dtype MxNxK", as the source states them
    """

    registers: int
    accumulators: int
    scalars: int
    spills: int
    scalar_spills: int
    scratch: int
    size: int
    shared: int
    warps: int
    matrix: Mapping[str, int]
    memory: Mapping[str, int]
    dots: tuple[str, ...]

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Metrics:
        return cls(**{**stored, "dots": tuple(stored["dots"])})

    def resident(self, limits: Architecture) -> int:
        """Programs that one processor holds at once; 0 if it cannot run one."""
        held = -(-self.registers // GRANULE) * GRANULE
        most = limits.threads // limits.lanes // SCHEDULERS
        waves = min(most, limits.file // SCHEDULERS // limits.lanes // max(GRANULE, held))
        # NVIDIA's keeps 1 KiB for itself beside each program, which `shared` of one leaves out
        beside = 1024 if limits.lanes == 32 else 0
        room = (limits.shared + beside) // max(1, self.shared + beside)
        return min(BLOCKS, waves * SCHEDULERS // self.warps, room)

    def occupancy(self, limits: Architecture) -> int:
        """Warps that each scheduler chooses from while programs abound; 0 if some have none."""
        return self.resident(limits) * self.warps // SCHEDULERS


# -- the model ----------------------------------------------------------------------------------

LAUNCH = 3e-6
"""Seconds that one more launch takes."""

LATENCY = 1e-6
"""Seconds from a load to its data, under load."""

CACHE = 3.2
"""The last cache's bandwidth over memory's: 17.2 TB/s and 5.3 TB/s as published for MI300X."""

BUSY = {0: 0.0, 1: 0.5, 2: 0.75, 3: 0.85}
"""Share of the matrix peak by warps per scheduler; more reach 0.9. One warp alone waits for its own
loads and its own softmax."""

WIDE = 16
"""Bytes that a lane loads with one instruction."""

DEEP = 8
"""Loads of one warp that are under way at once, at most."""

SPILLED = 64
"""Spilled registers that double the time."""

SIZES = {"f8": 1, "i8": 1, "bf": 2, "f1": 2, "f3": 4, "f6": 8}
"""Bytes of a dtype of Triton's by how its name begins."""

PEAKS = {"f8": "float8", "i8": "float8", "bf": "bfloat16", "f1": "bfloat16", "f3": "float32"}
"""Whose published peak counts for it: that of the first dtype with this beginning."""


def score(metrics: Metrics, work: Cost, programs: int, limits: Architecture) -> float:
    """Predicted microseconds of one launch that does `work` with so many programs; infinite if no
    processor can hold a program."""
    resident = metrics.resident(limits)
    if resident == 0 or programs == 0 or metrics.shared > limits.shared:
        return math.inf
    busiest = -(-programs // limits.processors)
    balance = busiest * limits.processors / programs
    held = min(resident, busiest)
    warps = -(-held * metrics.warps // SCHEDULERS)
    under_way = held * metrics.warps * limits.lanes * WIDE * _depth(metrics)
    needed = limits.bytes_per_s / limits.processors * LATENCY
    move = (work.bytes + _reread(metrics, work) / CACHE) / limits.bytes_per_s
    # What is balanced over processors already counts in how few bytes they have under way.
    move /= min(1.0, under_way / needed)
    compute = work.flop / (_peak(metrics, limits) * BUSY.get(warps, 0.9))
    slower = 1 + metrics.spills / SPILLED
    return 1e6 * (LAUNCH + balance * slower * max(compute, move))


def _depth(metrics: Metrics) -> int:
    """Loads of a warp under way at once: those its code has, as the compiler may issue them before
    the first is waited for."""
    loads = metrics.memory.get("read", 0) + metrics.memory.get("direct", 0)
    return max(1, min(DEEP, loads))


def _reread(metrics: Metrics, work: Cost) -> float:
    """Bytes of operands that all tiles load. A product alone loads both operands for each tile of
    its result; in a chain of products, as of attention, one of them stays in registers."""
    if not metrics.dots:
        return 0.0
    edges = [(*map(int, dot.split()[1].split("x")), SIZES.get(dot[:2], 2)) for dot in metrics.dots]
    if len(edges) == 1:
        m, n, _, size = edges[0]
        return work.flop / 2 * size * (1 / m + 1 / n)
    tallest = max(min(m, n, k) for m, n, k, _ in edges)
    return work.flop / 2 * edges[0][3] / tallest


def _peak(metrics: Metrics, limits: Architecture) -> float:
    """The published peak of the slowest dtype that the program multiplies, or of fp32."""
    kinds = {PEAKS.get(dot[:2], "float32") for dot in metrics.dots} or {"float32"}
    found = [
        flop for kind in kinds for name, flop in limits.flop_per_s.items() if name.startswith(kind)
    ]
    return min(found, default=0.0) or max(limits.flop_per_s.values(), default=1.0)


def predicted(launches: Sequence[tuple[Any, Metrics]], work: Cost, limits: Architecture) -> float:
    """Microseconds of a call: its work is that of the launch with the most lanes at products, or at
    anything; the others prepare and join, and pay for being launched."""
    if not launches:
        return math.inf

    def weight(entry: tuple[Any, Metrics]) -> tuple[bool, int]:
        launch, found = entry
        return bool(found.dots), launch.programs * found.warps * found.registers

    main = max(range(len(launches)), key=lambda at: weight(launches[at]))
    return sum(
        score(found, work if at == main else Cost(0, 0), launch.programs, limits)
        for at, (launch, found) in enumerate(launches)
    )


# -- the search ---------------------------------------------------------------------------------

Programs = Callable[[Callable[[], object]], Sequence[tuple[Any, Metrics]]]
"""Runs a call and says what it launched (`.programs`: how many), and the metrics of each."""


def race(
    op: Op[..., Any], impls: Sequence[Impl[..., Any]], inputs: Inputs, programs: Programs,
    limits: Architecture, most: int,
) -> list[Contender]:  # fmt: skip
    """As `search.Search.race`, by prediction: every implementation that is Triton's with its best
    configuration, the fastest first. What launches no program of Triton takes no part, as nothing
    is known of it."""
    work = op.cost(**inputs)
    contenders = [
        _configured(op, impl, inputs, programs, work, limits, most)
        for impl in impls
        if any("triton" in need for need in impl.needs)
    ]
    return sorted(contenders, key=lambda c: (c.us is None, c.us))


def _configured(
    op: Op[..., Any], impl: Impl[..., Any], inputs: Inputs, programs: Programs, work: Cost,
    limits: Architecture, most: int,
) -> Contender:  # fmt: skip
    contender = Contender(impl, refusal=impl.why_not(**inputs) or "")
    if contender.refusal:
        return contender

    def us(how: str) -> float | None:
        try:
            took = predicted(programs(lambda: impl.fn(**inputs)), work, limits)
        except Exception as error:  # told with the results; the next configuration may compile
            contender.failures.append(f"{how}: {type(error).__name__}: {error}")
            return None
        contender.tried += 1
        return None if math.isinf(took) else took

    for space in Space.ALL.values():
        space.forget()
    contender.us = us("as it comes")
    own = f"{op.name}/{impl.name}"
    for name, space in Space.ALL.items():
        if name.partition(":")[0] == own and space.asked:
            contender.facts[space] = list(space.asked.values())
    for space, facts in contender.facts.items():
        times: dict[Any, float] = {}
        for config in list(space.choices(**facts[-1]))[:most]:
            with ExitStack() as stack:
                stack.enter_context(contender.running())
                stack.enter_context(space.forced(config))
                took = us(str(config))
            if took is not None:
                times[config] = took
        if times:  # of equals the first, which is the better guess
            contender.chosen[space] = min(times, key=lambda config: times[config])
            contender.us = min(times.values())
    return contender
