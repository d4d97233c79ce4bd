"""Time implementations of an op side by side. Every timed shape is first checked against the
reference: a red case prints no time. Without --case or axes: the op's true shapes of the model.

  dsa-hal bench topk
  dsa-hal bench topk rows=1,16,256 --impl torch reference
  dsa-hal bench sparse_mla --case decode --format json --output decode.json
  dsa-hal bench --suite h200 --output record.json --plot record.png

Times are medians over cold caches; spread, the 10th to the 90th percentile, is in percent of the
median. GB/s and TFLOP/s count what the op must do at least, whatever an implementation does. Roof
is the percentage of what this device reaches at best, as measured here: of its memory for ops that
memory bounds, of its arithmetic for the others. Exit code 1 if a case is red.

A suite is a set of measurements with tables of its own; an op named beside it restricts it to that
op, and --output takes its record, as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import io
import pkgutil
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

import dsa_hal
from dsa_hal import env
from dsa_hal.case import Case, Cost, Inputs
from dsa_hal.cli import choose, output, suites
from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.matrix import Limit, compare, cost_of, wanted
from dsa_hal.measure import measure, percent_of_roof, roofs
from dsa_hal.registry import Impl, Op
from dsa_hal.selection import Verdict, selection, use

PROCESSOR = Limit(flop=1e11, bytes=2e9)
"""Unnamed cases above this would take a processor minutes and are left out there."""

REPEATS, FEW, PATIENCE_S = 20, 3, 10.0
"""Timed calls where calls are short, where they are long, and the seconds that tell these apart."""


@dataclass(frozen=True)
class Result:
    """One line: an implementation on a case. Times in seconds; a line that is not "ok" has none."""

    case: str
    impl: str
    status: str
    detail: str = ""
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    runs: int | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    roof: float | None = None


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", metavar="OP", nargs="?")
    parser.add_argument("axes", nargs="*", metavar="AXIS=VALUE",
                        help="changes to the case; AXIS=1,16,256 makes one of each")  # fmt: skip
    parser.add_argument("--case", nargs="+", action="extend", metavar="NAME", default=[],
                        help="cases of the op; `dsa-hal explain OP` lists them")  # fmt: skip
    parser.add_argument("--impl", nargs="+", action="extend", metavar="NAME", default=[],
                        help="default: all but the reference")  # fmt: skip
    parser.add_argument("--backend", metavar="NAME", help="instead of DSA_HAL_BACKEND's")
    parser.add_argument("--warmup", type=choose.real(0), default=0.05, metavar="SECONDS",
                        help="calls before the clock starts; default 0.05")  # fmt: skip
    parser.add_argument("--repeats", type=choose.whole(1), metavar="N",
                        help=f"timed calls at least; default {REPEATS},"
                        f" {FEW} where a call takes seconds")  # fmt: skip
    parser.add_argument("--min-time", type=choose.real(0), default=0.2, metavar="SECONDS",
                        help="keep timing until then; default 0.2")  # fmt: skip
    parser.add_argument("--format", choices=output.FORMATS, default="table")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="write there, whole or not at all, instead of to stdout")  # fmt: skip
    parser.add_argument("--suite", metavar="NAME", help=f"one of {', '.join(_suites())}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the suite's picture, as PNG")


def _suites() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(suites.__path__) if not m.name.startswith("_")]


def run(args: argparse.Namespace) -> int:
    if args.suite is not None:
        if args.suite not in _suites():
            raise choose.unknown("suite", args.suite, _suites())
        suite = importlib.import_module(f"dsa_hal.cli.suites.{args.suite}")
        code: int = suite.run(args)
        return code
    if args.op is None:
        raise ConfigError("bench needs an op or --suite; `dsa-hal support` lists the ops")
    if args.plot is not None:
        raise ConfigError("--plot draws a suite; name one with --suite")
    args.case, swallowed = choose.axes_apart(args.case)
    args.impl, more = choose.axes_apart(args.impl)
    args.axes += swallowed + more
    op = choose.ops([args.op])[0]
    if args.output is not None:
        output.must_be_writable(args.output)
    with choose.backend(args.backend):
        cases, left_out = _cases(op, args)
        impls = choose.implementations(op, args.impl)
        results = list(_results(op, cases, impls, args))
        _report(op, cases, results, args)
        for text in left_out:
            output.note(text)
    return 1 if any(result.status == "failed" for result in results) else 0


def _cases(op: Op[..., Any], args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """The cases to time, and a sentence on those left out because nobody named them."""
    bases = [choose.case(op, name) for name in args.case]
    if args.axes:
        bases = bases or [choose.true_shape(op)]
        return [case for base in bases for case in choose.custom(op, base, args.axes)], []
    if bases:
        return bases, []
    shapes = [c for c in op.cases if c.model] or [choose.true_shape(op)]
    if selection().target.device != "cpu":
        return shapes, []
    costs = {c.name: cost_of(op, c) for c in op.cases}
    affordable = [c for c in op.cases if PROCESSOR.admits(costs[c.name])]
    costly = [
        f"{c.name} ({costs[c.name].flop / 1e9:,.0f} GFLOP, {costs[c.name].bytes / 1e9:.1f} GB)"
        for c in shapes
        if c not in affordable
    ]
    kept = [c for c in shapes if c in affordable]
    kept = kept or sorted(affordable, key=lambda c: costs[c.name].flop)[-1:]
    left_out = f"left out, too costly for a processor unless --case names it: {', '.join(costly)}"
    return kept, [left_out] if costly else []


def _results(
    op: Op[..., Any],
    cases: Sequence[Case],
    impls: Sequence[Impl[..., Any]],
    args: argparse.Namespace,
) -> Iterator[Result]:
    static = {v.impl.name: v for v in _verdicts(op)}
    done, total = 0, len(cases) * len(impls)
    with output.progress(f"timing {op.name}") as step:
        for case in cases:
            inputs = choose.inputs_of(op, case, selection().target.device)
            if (wrong := op.invalid(**inputs)) is not None:
                raise BadInput(f"{op.name}, case {case.name}: {wrong}")
            want = wanted(op, inputs)
            for impl in impls:
                yield _result(op, case, impl, static.get(impl.name), inputs, want, args)
                done += 1
                step(done, total)


def _verdicts(op: Op[..., Any]) -> list[Verdict]:
    """Static verdicts, whatever DSA_HAL_IMPL names: bench takes its implementations from --impl."""
    others: dict[str, Any] = {
        name: impl for name, impl in selection().named.items() if name != op.name
    }
    with use(backend=selection().target.backend, **others):
        return selection().verdicts(op)


def _result(
    op: Op[..., Any], case: Case, impl: Impl[..., Any], static: Verdict | None, inputs: Inputs,
    want: Sequence[torch.Tensor], args: argparse.Namespace,
) -> Result:  # fmt: skip
    """One implementation on one case: refused, red, or timed."""
    refusal = static.reason if static is not None and static.question != "ok" else None
    refusal = refusal or impl.why_not(**inputs)
    if refusal:
        return Result(case.name, impl.label, "refused", refusal)
    began = time.monotonic()
    report = compare(op, impl, inputs, want)
    if not report.ok:
        return Result(case.name, impl.label, "failed", str(report))
    enough = min(REPEATS, max(FEW, round(PATIENCE_S / (time.monotonic() - began))))
    device = selection().target.device
    timing = measure(
        impl.fn, inputs, device=device, warmup=args.warmup, repeats=args.repeats or enough,
        min_time=args.min_time, mutates=op.mutates,
    )  # fmt: skip
    cost: Cost = op.cost(**inputs)
    seconds = timing.median_s
    return Result(
        case.name, impl.label, "ok", "", seconds, *timing.spread, len(timing.samples),
        cost.bytes / seconds / 1e9, cost.flop / seconds / 1e12,
        percent_of_roof(cost, seconds, roofs(device)),
    )  # fmt: skip


# -- telling -----------------------------------------------------------------------------------


def _report(
    op: Op[..., Any], cases: Sequence[Case], results: Sequence[Result], args: argparse.Namespace
) -> None:
    header = {
        "op": op.name,
        "contract": op.version,
        "device": f"{selection().target} {selection().target.name}".strip(),
        "torch": torch.__version__,
        "dsa_hal": dsa_hal.__version__,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "command": _command(args),
    }
    if args.format == "json":
        axes = {c.name: dict(c.axes) for c in cases}
        text = output.as_json({**header, "cases": axes, "results": [asdict(r) for r in results]})
    elif args.format == "csv":
        same = {k: header[k] for k in ("op", "device", "torch", "dsa_hal", "commit", "command")}
        records = [{**same, **asdict(r)} for r in results]
        text = output.as_csv((*same, *Result.__dataclass_fields__), records)
    else:
        text = _table(header, results, sys.stdout if args.output is None else io.StringIO())
    if args.output is None:
        print(text, end="")
    else:
        output.write_atomically(args.output, text)
        output.note(f"written to {args.output}")


def _table(header: dict[str, Any], results: Sequence[Result], terminal: TextIO) -> str:
    device = f"{header['op']} on {header['device']}, {header['threads']} threads"
    versions = (
        f"dsa_hal {header['dsa_hal']} ({header['commit'] or 'no commit'}), torch {header['torch']}"
    )
    figures = ("median", "spread", "GB/s", "TFLOP/s", "roof")
    columns = ("case", "implementation", "", *figures, "why no time")
    rows = [(r.case, r.impl, r.status, *_figures(r), r.detail) for r in results]
    table = output.render(columns, rows, right=figures, terminal=terminal)
    return f"{device}\n{versions}\n\n{table}\n\nagain: {header['command']}\n"


def _figures(result: Result) -> tuple[str, ...]:
    if result.median_s is None:
        return ("",) * 5
    roof = "" if result.roof is None else f"{result.roof:.{int(result.roof < 10)}f}%"
    rates = output.number(result.gb_s or 0), output.number(result.tflop_s or 0)
    spread = ((result.p90_s or 0) - (result.p10_s or 0)) / result.median_s
    return (output.duration(result.median_s), f"{100 * spread:.0f}%", *rates, roof)


def _command(args: argparse.Namespace) -> str:
    """The line that repeats this run: choices in force, and every option that matters in full."""
    chosen = selection()
    words = ["dsa-hal", "bench", args.op, *args.axes]
    for option, values in (("--case", args.case), ("--impl", args.impl)):
        words += [option, *values] if values else []
    words += ["--warmup", f"{args.warmup:g}", "--min-time", f"{args.min_time:g}"]
    words += ["--repeats", args.repeats] if args.repeats else []
    if not chosen.named and not chosen.deterministic:
        return shlex.join(map(str, [*words, "--backend", chosen.target.backend]))
    named = ",".join(f"{op}={impl}" for op, impl in chosen.named.items())
    variables = {  # --backend would drop the named implementations
        env.BACKEND.name: chosen.target.backend,
        env.IMPL.name: named,
        env.DETERMINISTIC.name: "1" if chosen.deterministic else "",
    }
    before = [f"{name}={shlex.quote(value)}" for name, value in variables.items() if value]
    return " ".join([*before, shlex.join(map(str, words))])


def commit() -> str | None:
    """The commit of the checkout that this package runs from, "+" behind it if files differ;
    None for an installed copy, or without git."""
    home = Path(dsa_hal.__file__).parents[1]
    if not (home / ".git").exists():
        return None
    try:
        asked = subprocess.run(
            ["git", "-C", str(home), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
