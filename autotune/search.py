"""The search: on this device, the fastest configuration of each kernel for a call, and then which
implementation of the op is fastest for it. Nothing is timed whose result was not checked first."""

from __future__ import annotations

import fcntl
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dsa_hal.autotune.space import Space
from dsa_hal.case import Inputs
from dsa_hal.matrix import compare
from dsa_hal.measure import measure
from dsa_hal.registry import Impl, Op

QUICK, FEW, ROUNDS = 7, 3, 9
"""Timed calls of a configuration, and of a contender in one round of the race; and how many rounds.
Contenders take turns, so that all meet the same clock, which falls with the power that the calls
before have drawn; a contender's time is the median of its rounds."""


@dataclass
class Contender:
    """One implementation in one call.

    us        microseconds of a cold call; None where it took no part
    rounds    microseconds by rounds of the race
    refusal   its why_not, if that is why
    failures  what raised or gave wrong results, with the configuration
    chosen    the configuration of each of its kernels
    tried     configurations timed
    """

    impl: Impl[..., Any]
    us: float | None = None
    rounds: list[float] = field(default_factory=list)
    refusal: str = ""
    failures: list[str] = field(default_factory=list)
    chosen: dict[Space[Any], Any] = field(default_factory=dict)
    facts: dict[Space[Any], list[dict[str, int]]] = field(default_factory=dict)
    tried: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block its kernels take the chosen configurations."""
        with ExitStack() as stack:
            for space, config in self.chosen.items():
                stack.enter_context(space.forced(config))
            yield

    def rows(self) -> dict[str, list[dict[str, dict[str, int]]]]:
        """What a tuning table holds of it: space -> facts and configuration."""
        return {
            space.name: [{"facts": f, "config": asdict(config)} for f in self.facts[space]]
            for space, config in self.chosen.items()
        }


@dataclass(frozen=True)
class Search:
    """One call under study.

    want  the reference's results
    lock  held while timing, so that of several searches on one device one times, others wait
    most  configurations tried per kernel; a space lists its best guesses first
    """

    op: Op[..., Any]
    inputs: Inputs
    want: Sequence[Tensor]
    device: str
    lock: Path
    most: int

    def race(self, impls: Sequence[Impl[..., Any]]) -> list[Contender]:
        """Every implementation with its best configuration, the fastest first."""
        contenders = [self._configured(impl) for impl in impls]
        able = [c for c in contenders if c.tried]
        with _alone(self.lock):
            for _ in range(ROUNDS):
                for contender in able:
                    with contender.running():
                        contender.rounds.append(self._us(contender.impl, FEW))
        for contender in able:
            contender.us = statistics.median(contender.rounds)
        return sorted(contenders, key=lambda c: (c.us is None, c.us))

    def _configured(self, impl: Impl[..., Any]) -> Contender:
        contender = Contender(impl, refusal=impl.why_not(**self.inputs) or "")
        if contender.refusal:
            return contender
        for space in Space.ALL.values():
            space.forget()
        if not self._right(contender, "as it comes"):
            return contender
        contender.tried = 1
        own = f"{self.op.name}/{impl.name}"
        for name, space in Space.ALL.items():
            if name.partition(":")[0] == own and space.asked:
                contender.facts[space] = list(space.asked.values())
        for space, facts in contender.facts.items():
            self._choose(contender, space, facts[-1])
        return contender

    def _choose(self, contender: Contender, space: Space[Any], facts: Mapping[str, int]) -> None:
        """Times the configurations of one kernel and keeps the best in `chosen`. All are compiled
        and checked before the first is timed: those who wait for the lock wait for timing alone."""
        right = []
        for config in space.choices(**facts)[: self.most]:
            with contender.running(), space.forced(config):
                if self._right(contender, str(config)):
                    right.append(config)
        times = {}
        with _alone(self.lock):
            for config in right:
                with contender.running(), space.forced(config):
                    times[config] = self._us(contender.impl, QUICK)
        contender.tried += len(times)
        if times:
            contender.chosen[space] = min(times, key=lambda config: times[config])

    def _right(self, contender: Contender, how: str) -> bool:
        """Whether one call runs and passes the op's check; what does not is told in `failures`."""
        try:
            report = compare(self.op, contender.impl, self.inputs, self.want)
        except Exception as error:  # told with the results; the next configuration may run
            contender.failures.append(f"{how}: {type(error).__name__}: {error}")
            return False
        if not report.ok:
            contender.failures.append(f"{how}: {report}")
        return report.ok

    def _us(self, impl: Impl[..., Any], repeats: int) -> float:
        timing = measure(
            impl.fn, self.inputs, device=self.device, warmup=0.0, repeats=repeats, min_time=0.0,
            mutates=self.op.mutates,
        )  # fmt: skip
        return timing.median_s * 1e6


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
