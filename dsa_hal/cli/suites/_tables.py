"""What a suite's lines say: the best of each side, ratios, means, and their tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsa_hal.cli import output


@dataclass(frozen=True)
class Line:
    """A contender on a workload. Seconds; a line that is not "ok" has none."""

    group: str
    op: str
    shape: str
    name: str
    side: str  # "own", "adapter" or "peer"
    status: str
    detail: str = ""
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    runs: int | None = None
    tflop_s: float | None = None
    gb_s: float | None = None
    floor_s: float | None = None
    selected: bool = False


@dataclass(frozen=True)
class Shape:
    """One workload's best times in seconds: ours, the peers', what selection takes, all."""

    group: str
    label: str
    floor_s: float
    own: tuple[str, float] | None
    peer: tuple[str, float] | None
    selected: tuple[str, float] | None
    best_installed: float | None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the best peer we are."""
        return self.peer[1] / self.own[1] if self.own and self.peer else None

    @property
    def behind(self) -> float | None:
        """By which share what selection takes is slower than the best implementation."""
        if self.selected is None or self.best_installed is None:
            return None
        return self.selected[1] / self.best_installed - 1


def shapes(lines: Sequence[Line]) -> list[Shape]:
    """The lines by workload."""
    grouped: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        grouped.setdefault((line.group, line.op, line.shape), []).append(line)
    return [
        Shape(
            group, shape, max(line.floor_s or 0.0 for line in own), _best(own, "own"),
            _best(own, "peer"), _best([line for line in own if line.selected]),
            min(_times([line for line in own if line.side != "peer"]), default=None),
        )
        for (group, _, shape), own in grouped.items()
    ]  # fmt: skip


def _times(lines: Sequence[Line]) -> list[float]:
    return [line.median_s for line in lines if line.median_s is not None]


def _best(lines: Sequence[Line], side: str | None = None) -> tuple[str, float] | None:
    known = [
        (line.name, line.median_s)
        for line in lines
        if line.median_s is not None and side in (None, line.side)
    ]
    return min(known, key=lambda pair: pair[1], default=None)


def means(found: Sequence[Shape]) -> dict[str, float]:
    """The geometric mean of the ratios of each group that has a peer."""
    ratios: dict[str, list[float]] = {}
    for shape in found:
        if shape.ratio is not None:
            ratios.setdefault(shape.group, []).append(shape.ratio)
    return {g: math.exp(sum(map(math.log, r)) / len(r)) for g, r in ratios.items()}


# -- telling ------------------------------------------------------------------------------------


def heading(header: Mapping[str, Any]) -> str:
    return (
        f"{header['device']}, driver {header['driver']}, torch {header['torch']},"
        f" triton {header['triton']}, dsa_hal {header['dsa_hal']} ({header['commit']})"
    )


def tell(
    header: Mapping[str, Any], lines: Sequence[Line], bars: Mapping[str, float | None]
) -> None:
    """Every line, then `summary`."""
    copy, bf16, fp8 = (header["limits"][name] / 1e12 for name in ("copy", "bf16", "fp8"))
    print(heading(header))
    print(f"limits: copy {copy:.2f} TB/s, bf16 {bf16:.0f} TFLOP/s, FP8 {fp8:.0f} TFLOP/s")
    print(f"absent: {', '.join(header['absent']) or 'nobody'}\n")
    found = shapes(lines)
    peer = {(s.group, s.label): s.peer[1] for s in found if s.peer}
    figures = ("us", "spread", "TFLOP/s", "GB/s", "floor", "to peer")
    columns = ("op", "shape", "implementation", "", *figures, "checked, or why not")
    rows = [
        (line.group, line.shape, line.name, "selected" if line.selected else line.side,
         *_figures(line, peer.get((line.group, line.shape))),
         line.detail if line.status == "ok" else f"{line.status}: {line.detail}")
        for line in lines
    ]  # fmt: skip
    output.table(columns, rows, right=figures)
    print()
    summary(found, bars)


def note(lines: Sequence[Line]) -> str:
    """A workload's times in a line, for whoever waits."""
    times = [f"{i.name} {1e6 * (i.median_s or 0):,.1f}" for i in lines if i.status == "ok"]
    wrong = [i.name for i in lines if i.status == "failed"]
    first = lines[0]
    return f"{first.group}, {first.shape}: {', '.join(times + [f'{n} FAILED' for n in wrong])}"


def _figures(line: Line, peer: float | None) -> tuple[str, ...]:
    if line.median_s is None or line.floor_s is None:
        return ("",) * 6
    spread = ((line.p90_s or 0) - (line.p10_s or 0)) / line.median_s
    return (
        f"{1e6 * line.median_s:,.1f}", f"{100 * spread:.0f}%", output.number(line.tflop_s or 0),
        output.number(line.gb_s or 0), f"{100 * line.floor_s / line.median_s:.0f}%",
        "" if peer is None else f"{peer / line.median_s:.2f}x",
    )  # fmt: skip


def summary(found: Sequence[Shape], bars: Mapping[str, float | None]) -> None:
    """Own best against the best peer, by shape and by group; where selection is behind the best
    implementation that is installed. `bars`: the ratios to reach, by group."""
    rows = []
    average = means(found)
    for shape in found:
        own, peer = (
            "" if best is None else f"{best[0]}, {1e6 * best[1]:,.1f} us"
            for best in (shape.own, shape.peer)
        )
        behind = "" if shape.behind is None else f"{100 * shape.behind:.0f}%"
        ratio = "" if shape.ratio is None else f"{shape.ratio:.2f}x"
        rows.append((shape.group, shape.label, own, peer, ratio, behind))
    columns = ("op", "shape", "own best", "best peer", "ratio", "selection behind")
    output.table(columns, rows, right=("ratio", "selection behind"))
    print()
    verdicts = []
    for group, bar in bars.items():
        mean = average.get(group)
        if bar is None or all(shape.group != group for shape in found):
            continue
        verdict = "no peer" if mean is None else "reached" if mean >= bar else "not reached"
        verdicts.append((group, "" if mean is None else f"{mean:.2f}x", f"{bar:g}x", verdict))
    output.table(
        ("op", "geometric mean", "wanted", ""), verdicts, right=("geometric mean", "wanted")
    )
