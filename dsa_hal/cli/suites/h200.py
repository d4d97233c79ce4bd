"""Our kernels on one H200 beside every library found on sys.path, all in one run: time, rate, how
close to the device's own limit, and the ratio to the best peer.

A contender's result is judged before it is timed; a wrong one has no time and makes the exit code
1. References judge some rows of large results (which, `checked` says). The limits are measured in
the same run: bytes by a copy, operations by square products of bf16 and of FP8.
"""

from __future__ import annotations

import argparse
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

import dsa_hal
from dsa_hal.case import Cost, Inputs
from dsa_hal.case import run as called
from dsa_hal.cli import choose, output
from dsa_hal.cli.bench import commit
from dsa_hal.cli.suites._peers import absent, peers
from dsa_hal.cli.suites._race import (
    Contender,
    DeviceMaker,
    chain,
    exact_products,
    race,
)
from dsa_hal.cli.suites._tables import Line, heading, means, note, shapes, tell
from dsa_hal.cli.suites._work import Work, inputs_of, workloads
from dsa_hal.errors import Absent
from dsa_hal.measure import roofs
from dsa_hal.registry import Op
from dsa_hal.selection import COMPOSITE, selection, use

REPEATS = 15

ADAPTERS = ("flashmla", "deepgemm", "flashinfer", "cublas")
"""Implementations that are libraries behind our contracts: neither ours, nor peers as used."""


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
        header = _header(limits)
        lines: list[Line] = []
        with output.progress("suite h200") as step:
            for at, work in enumerate(chosen):
                found = _tried(work, limits)
                output.note(note(found))
                lines += found
                if options.output is not None:  # what was measured outlives a run cut short
                    output.write_atomically(options.output, output.as_json(_record(header, lines)))
                torch.cuda.empty_cache()
                step(at + 1, len(chosen))
    tell(header, lines, {work.group.name: work.group.bar for work in workloads()})
    if draw is not None:
        output.write_atomically(options.plot, draw(heading(header), shapes(lines)))
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


def _tried(work: Work, limits: Limits) -> list[Line]:
    """`_lines`, but a workload that raises is a failed line: the others follow."""
    try:
        return _lines(work, limits)
    except Exception as error:
        output.note(f"{work.op.name}, {work.label}:\n{traceback.format_exc()}")
        raised = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
        return [Line(work.group.name, work.op.name, work.label, "all", "own", "failed", raised)]


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
    timed = chain if work.recorded else race
    timings = timed([contender for contender, _ in right], device, REPEATS)
    for (contender, judged), timing in zip(right, timings, strict=True):
        if isinstance(timing, str):
            lines.append(_line(work, contender, "refused", timing))
            continue
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
        ours = impl.name not in ADAPTERS
        if impl.name == COMPOSITE and (body := _of_own_parts(work.op)) is not None:
            yield Contender(f"{impl.label}, own parts", body, inputs, own=True)
            ours = False
        own = Contender(impl.label, impl.fn, inputs, own=ours)
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
        lines.append(_line(work, Contender("a peer", peers, {}, peer=True), "failed", problem))


def _of_own_parts(op: Op[..., Any]) -> Callable[..., Any] | None:
    """A composite's body with parts of our own, where selection would take a library for some."""
    named: dict[str, Any] = {}
    for part in op.uses:
        names = [impl.name for impl in selection().candidates(part)[0]]
        if names[0] in ADAPTERS:
            named[part.name] = next(name for name in names if name not in ADAPTERS)
    if not named:
        return None
    with use(**named) as chosen:
        fit = chosen.candidates(op)[0]
    return next(impl.fn for impl in fit if impl.name == COMPOSITE)


def _problem(
    work: Work, contender: Contender, part: Inputs, at: torch.Tensor | None, want: Sequence[Any]
) -> str | None:
    """What is wrong with a contender's result, or what it raised: others follow."""
    try:
        found = contender.fn(**(part if work.alone else contender.inputs))
        got: Sequence[torch.Tensor] = contender.results(found)
        if at is not None and not work.alone:
            got = work.taken(got, at) if work.taken else [result[at] for result in got]
        report = work.op.check(got, want, part)
        torch.cuda.synchronize()
    except Exception as error:
        output.note(f"{work.op.name}, {work.label}, {contender.name}:\n{traceback.format_exc()}")
        return f"raised {type(error).__name__}: {' '.join(str(error).split())}"
    return None if report.ok else str(report)


# -- the record ---------------------------------------------------------------------------------


def _record(header: dict[str, Any], lines: Sequence[Line]) -> dict[str, Any]:
    return {**header, "groups": means(shapes(lines)), "lines": [asdict(line) for line in lines]}


def _header(limits: Limits) -> dict[str, Any]:
    """What was measured on, with what, and when."""
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
    }


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip().partition("\n")[0] or None
