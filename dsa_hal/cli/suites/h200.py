"""Our kernels on one H200 beside every library found on sys.path, all in one run: time, rate, how
close to the device's own limit, and the ratio to the best peer.

A contender's result is judged before it is timed; a wrong one has no time and makes the exit code
1. References judge some rows of large results (which, `checked` says). The limits are measured in
the same run: bytes by a copy, operations by square products of bf16 and of FP8.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import torch

import dsa_hal
from dsa_hal.case import Cost, Inputs
from dsa_hal.case import run as called
from dsa_hal.cli import choose, output
from dsa_hal.cli.bench import commit
from dsa_hal.cli.suites._peers import absent, peers
from dsa_hal.cli.suites._race import Contender, DeviceMaker, exact_products, race
from dsa_hal.cli.suites._work import Work, inputs_of, workloads
from dsa_hal.errors import Absent
from dsa_hal.measure import roofs
from dsa_hal.selection import selection, use

REPEATS = 15

ADAPTERS = ("flashmla", "deepgemm", "flashinfer", "cublas")
"""Implementations that are libraries behind our contracts: neither ours, nor peers as used."""

LIBRARY_NAMES = "FlashMLA, DeepGEMM, FlashInfer, TileLang"


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
class Limits:
    """What the device reached in this run: bytes and operations per second."""

    copy: float
    bf16: float
    fp8: float

    def floor(self, cost: Cost, rate: str) -> float:
        return max(cost.bytes / self.copy, cost.flop / (self.fp8 if rate == "fp8" else self.bf16))


def run(options: argparse.Namespace) -> int:
    """Time everything, print the tables, write the record and the picture that were asked for."""
    draw = choose.picture("suites._picture", "race") if options.plot else None
    for path in filter(None, (options.output, options.plot)):
        output.must_be_writable(path)
    with choose.backend(options.backend or "cuda"):
        if selection().target.device != "cuda":
            raise Absent("the suite h200 needs an NVIDIA GPU")
        chosen = [w for w in workloads() if options.op in (None, w.op.name)]
        if not chosen:
            raise choose.unknown("op of the suite", options.op, {w.op.name for w in workloads()})
        limits = _limits()
        lines: list[Line] = []
        with output.progress("suite h200") as step:
            for at, work in enumerate(chosen):
                lines += _lines(work, limits)
                torch.cuda.empty_cache()
                step(at + 1, len(chosen))
        record = _record(limits, lines)
    _tell(record, lines)
    if options.output is not None:
        output.write_atomically(options.output, output.as_json(record))
    if draw is not None:
        output.write_atomically(options.plot, draw(_heading(record), shapes(lines)))
    return 1 if any(line.status == "failed" for line in lines) else 0


def _limits() -> Limits:
    """The copy and the bf16 product as `bench` measures them, and one of FP8 with one scale."""
    device = selection().target.device
    found = roofs(device)
    size = 8192
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    contender = Contender("cuBLAS", product, {"a": a, "b": b})
    (timing,) = race([contender], torch.device(device), REPEATS)
    return Limits(
        found.bytes_per_s, found.flop_per_s[torch.bfloat16], 2 * size**3 / min(timing.samples)
    )


# -- one workload -------------------------------------------------------------------------------


def _lines(work: Work, limits: Limits) -> list[Line]:
    """Every contender judged, then those that are right timed in turn."""
    device = torch.device(selection().target.device)
    inputs = inputs_of(work, DeviceMaker(device, 0))
    cost = work.op.cost(**inputs)
    chosen = work.op.select(**inputs).label
    at = work.sample(inputs)
    part = inputs if at is None or work.rows is None else work.rows(inputs, at)
    with exact_products(), use(backend="reference"):
        want = called(work.op.reference, part, ())
    right: list[tuple[Contender, str]] = []
    lines: list[Line] = []
    for contender in _contenders(work, inputs, lines):
        problem = _problem(work, contender, part, at, want)
        if problem is None:
            judged = "all rows" if at is None else f"{len(at)} rows"
            right.append((contender, f"{judged} by the reference"))
        else:
            lines.append(_line(work, contender, "failed", problem))
    del want
    timings = race([contender for contender, _ in right], device, REPEATS)
    for (contender, judged), timing in zip(right, timings, strict=True):
        seconds = timing.median_s
        lines.append(
            _line(
                work, contender, "ok", judged, seconds, *timing.spread, len(timing.samples),
                cost.flop / seconds / 1e12, cost.bytes / seconds / 1e9,
                limits.floor(cost, work.rate), contender.name == chosen,
            )
        )  # fmt: skip
    return lines


def _line(work: Work, contender: Contender, status: str, detail: str, *figures: Any) -> Line:
    side = "own" if contender.own else "peer" if contender.peer else "adapter"
    return Line(
        work.group.name, work.op.name, work.label, contender.name, side, status, detail, *figures
    )


def _contenders(work: Work, inputs: Inputs, lines: list[Line]) -> Iterator[Contender]:
    """The implementations that serve these inputs, then the libraries; what refuses, or cannot be
    prepared, becomes a line at once."""
    for verdict in selection().verdicts(work.op, (), inputs):
        impl = verdict.impl
        own = Contender(impl.label, impl.fn, inputs, own=impl.name not in ADAPTERS)
        if verdict.question != "ok":
            lines.append(_line(work, own, "refused", verdict.reason))
        elif impl.name == "torch" and any(
            v.question == "ok" and v.impl.name not in (*ADAPTERS, "torch", "composite")
            for v in selection().verdicts(work.op, (), inputs)
        ):
            lines.append(_line(work, own, "refused", "plain torch, which a kernel stands in for"))
        else:
            yield own
    try:
        yield from list(peers(work.op.name, inputs))
    except Exception as error:  # of one library: the others' lines follow, the exit code tells
        output.note(f"{work.op.name}, {work.label}:\n{traceback.format_exc()}")
        problem = f"preparing a peer raised {type(error).__name__}: {error}"
        lines.append(_line(work, Contender("a peer", chain, {}, peer=True), "failed", problem))


def _problem(
    work: Work, contender: Contender, part: Inputs, at: torch.Tensor | None, want: Sequence[Any]
) -> str | None:
    """What is wrong with a contender's result, or what it raised: others follow."""
    try:
        found = contender.fn(**(part if work.alone else contender.inputs))
        got: Sequence[torch.Tensor] = contender.results(found)
        if at is not None and not work.alone:
            got = work.taken(got, at) if work.taken else [result[at] for result in got]
        report = work.op.check(got, want[: len(got)], part)
        torch.cuda.synchronize()
    except Exception as error:
        output.note(f"{work.op.name}, {work.label}, {contender.name}:\n{traceback.format_exc()}")
        return f"raised {type(error).__name__}: {' '.join(str(error).split())}"
    return None if report.ok else str(report)


# -- what the lines say -------------------------------------------------------------------------


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


def _record(limits: Limits, lines: Sequence[Line]) -> dict[str, Any]:
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "absent"
    target = selection().target
    return {
        "suite": "h200",
        "device": target.name,
        "arch": target.arch,
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton_version,
        "dsa_hal": dsa_hal.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "absent": absent(),
        "limits": asdict(limits),
        "groups": means(shapes(lines)),
        "lines": [asdict(line) for line in lines],
    }


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip().partition("\n")[0] or None


# -- telling ------------------------------------------------------------------------------------


def _heading(record: dict[str, Any]) -> str:
    return (
        f"{record['device']}, driver {record['driver']}, torch {record['torch']},"
        f" triton {record['triton']}, dsa_hal {record['dsa_hal']} ({record['commit']})"
    )


def _tell(record: dict[str, Any], lines: Sequence[Line]) -> None:
    limits = Limits(**record["limits"])
    print(_heading(record))
    print(
        f"limits: copy {limits.copy / 1e12:.2f} TB/s, bf16 {limits.bf16 / 1e12:.0f} TFLOP/s,"
        f" FP8 {limits.fp8 / 1e12:.0f} TFLOP/s"
    )
    print(f"absent: {', '.join(record['absent']) or 'none of ' + LIBRARY_NAMES}\n")
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
    _summary(found)


def _figures(line: Line, peer: float | None) -> tuple[str, ...]:
    if line.median_s is None or line.floor_s is None:
        return ("",) * 6
    spread = ((line.p90_s or 0) - (line.p10_s or 0)) / line.median_s
    return (
        f"{1e6 * line.median_s:,.1f}", f"{100 * spread:.0f}%", output.number(line.tflop_s or 0),
        output.number(line.gb_s or 0), f"{100 * line.floor_s / line.median_s:.0f}%",
        "" if peer is None else f"{peer / line.median_s:.2f}x",
    )  # fmt: skip


def _summary(found: Sequence[Shape]) -> None:
    """Own best against the best peer, by shape and by group; where selection is behind."""
    rows = []
    bars = {work.group.name: work.group.bar for work in workloads()}
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
