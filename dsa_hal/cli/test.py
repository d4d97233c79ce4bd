"""Judge implementations against the references on this device: op x implementation x case x twist.

Twists: fences around every tensor, bitwise repeats, strided inputs, NaN in all that must not be
read and in fresh memory. Exit code 1 if a row fails. With --jobs every implementation of an op has
a process of its own, so that one which takes its process down, or hangs, fails alone.

With --interpret no device is wanted: the implementations of a target that are made of Triton's
programs or of torch's operations run on the processor, the former in Triton's interpreter. All
twists are in two calls then, the second with the programs in reverse order; every address is
checked. What only a compiler or a device does wrong does not show.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from dsa_hal.backends.portable import interpreter
from dsa_hal.case import Case
from dsa_hal.cli import choose, output
from dsa_hal.errors import BadInput
from dsa_hal.matrix import (
    DEFAULT_RUN,
    INTERPRETED,
    Limit,
    Outcome,
    Row,
    attempt,
    interpreted,
    judge_at_once,
    rows,
)
from dsa_hal.registry import Op
from dsa_hal.selection import current, selection, use
from dsa_hal.target import stand_in

COLUMNS = ("target", "op", "impl", "case", "status", "detail")
"""Of the CSV; the committed results in ci/support are made of it."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to judge; default: all")
    parser.add_argument("--impl", metavar="NAME", help="this implementation alone")
    parser.add_argument("--case", nargs="+", action="extend", metavar="NAME", default=[],
                        help="these cases alone, whatever they cost")  # fmt: skip
    parser.add_argument("--max-gflop", type=choose.real(0), metavar="X",
                        help=f"leave out costlier cases; default {DEFAULT_RUN.flop / 1e9:g}, and"
                        f" {DEFAULT_RUN.bytes / 1e6:g} MB; interpreted {INTERPRETED.flop / 1e9:g},"
                        f" and {INTERPRETED.bytes / 1e6:g} MB, or {INTERPRETED.products / 1e6:g}"
                        " of products")  # fmt: skip
    parser.add_argument("--repeats", type=choose.whole(1), default=1, metavar="N",
                        help="calls that must agree to the bit where that is promised, beside the"
                        " first; default 1")  # fmt: skip
    parser.add_argument("--jobs", type=choose.whole(1), metavar="N",
                        help="judge in N processes at a time")  # fmt: skip
    parser.add_argument("--patience", type=choose.real(0, above=True), default=600,
                        metavar="SECONDS",
                        help="what a process of --jobs may take; default 600")  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--backend", metavar="NAME", help="instead of DSA_HAL_BACKEND's")
    where.add_argument("--interpret", metavar="TARGET",
                       help="interpret this target's programs here, as in rocm:gfx950")  # fmt: skip
    parser.add_argument("--format", choices=output.FORMATS, default="table")


def run(args: argparse.Namespace) -> int:
    ops = choose.ops(args.ops)
    known = {c.name for op in ops for c in op.cases}
    for name in args.case:
        if name not in known:
            raise choose.unknown("case", name, known)
    limit = None if args.max_gflop is None else Limit(flop=args.max_gflop * 1e9)
    with _target(args):
        chosen = _chosen(ops, args, limit)
        if not chosen:
            raise BadInput(f"nothing to judge on {current()}: no implementation has such a case")
        began = time.monotonic()
        judged = _judge_all(chosen, args) if args.jobs is None else _apart(chosen, args)
        _report(judged, args.format)
        counts = Counter(outcome.status for _, outcome in judged)
        words = ", ".join(f"{counts[status]} {status}" for status in ("ok", "refused", "failed"))
        took = output.duration(time.monotonic() - began)
        how = ", interpreted," if args.interpret else ""
        output.note(f"\n{words} on {current()}{how} in {took}{_left_out(ops, chosen, args)}")
    return 1 if counts["failed"] else 0


@contextmanager
def _target(args: argparse.Namespace) -> Iterator[None]:
    if args.interpret is None:
        with choose.backend(args.backend):
            yield
    else:
        target = stand_in(args.interpret, "cpu")
        interpreter.start()
        with use(target=target):
            yield


def _rows(
    ops: list[Op[..., Any]], args: argparse.Namespace, limit: Limit | None, cases: list[str]
) -> list[Row]:
    """Rows of the matrix within a limit or the usual one; under --interpret, of what runs there."""
    if args.interpret is None:
        return list(rows(ops, limit or DEFAULT_RUN, cases))
    found = [row for op in ops for row in rows([op], limit or interpreted(op), cases)]
    return [row for row in found if interpreter.can_run(row.impl)]


def _chosen(ops: list[Op[..., Any]], args: argparse.Namespace, limit: Limit | None) -> list[Row]:
    """What is judged; a named implementation that cannot be used here is an error."""
    chosen, impl = _rows(ops, args, limit, args.case), args.impl
    if impl is None:
        return chosen
    named = [i for op in ops for i in op.implementations(current()) if i.name == impl]
    if not named:
        known = {i.name for op in ops for i in op.implementations(current())}
        raise choose.unknown(f"implementation on {current()}", impl, known)
    if impl == "reference":
        raise BadInput(
            "the reference is what the others are judged by; name another implementation"
        )
    mine = [row for row in chosen if row.impl.name == impl]
    if not mine:
        verdicts = [v for op in ops for v in selection().verdicts(op) if v.impl.name == impl]
        reasons = "; ".join(f"{v.impl.op}: {v.reason}" for v in verdicts if v.reason)
        raise BadInput(f"{impl} has nothing to judge on {current()}: {reasons or 'no such case'}")
    return mine


def _judge_all(chosen: list[Row], args: argparse.Namespace) -> list[tuple[Row, Outcome]]:
    """Judge row by row; the traceback of what an implementation raises goes to stderr."""
    judged = []
    how = partial(judge_at_once, order=interpreter.backwards) if args.interpret else None
    with output.progress("judging") as step:
        for at, row in enumerate(chosen):
            outcome = attempt(row, args.repeats, how)
            if outcome.trace:
                output.note(f"{row.id}:\n{outcome.trace}")
            judged.append((row, outcome))
            step(at + 1, len(chosen))
    return judged


def _apart(chosen: list[Row], args: argparse.Namespace) -> list[tuple[Row, Outcome]]:
    """Judge each implementation of each op in a process of its own, some at a time."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in chosen:
        groups.setdefault((row.op.name, row.impl.name), []).append(row)
    judged: list[tuple[Row, Outcome]] = []
    with output.progress("judging") as step, ThreadPoolExecutor(args.jobs) as pool:
        tasks = [
            pool.submit(_in_a_process, rows, current().backend, args) for rows in groups.values()
        ]
        for task in tasks:
            judged += task.result()
            step(len(judged), len(chosen))
    return judged


def _in_a_process(
    rows: list[Row], backend: str, args: argparse.Namespace
) -> list[tuple[Row, Outcome]]:
    """Rows of one implementation, judged by another `dsa-hal test`."""
    first = rows[0]
    command = [
        sys.executable, "-m", "dsa_hal", "test", first.op.name, "--impl", first.impl.name,
        "--format", "json", "--repeats", str(args.repeats),
        *(("--interpret", args.interpret) if args.interpret else ("--backend", backend)),
        "--case", *(row.case.name for row in rows),
    ]  # fmt: skip
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=args.patience, check=False
        )
    except subprocess.TimeoutExpired:
        late = Outcome("failed", f"its process was not done after {args.patience:g} s")
        return [(row, late) for row in rows]
    if asked.returncode not in (0, 1) or not asked.stdout.startswith("["):
        output.note(f"{first.op.name} {first.impl.label}:\n{asked.stderr}")
        died = Outcome("failed", f"its process ended with exit code {asked.returncode}")
        return [(row, died) for row in rows]
    if asked.returncode:
        output.note(asked.stderr)
    found = {record["case"]: record for record in json.loads(asked.stdout)}
    told = [found[row.case.name] for row in rows]
    return [
        (row, Outcome(record["status"], record["detail"]))
        for row, record in zip(rows, told, strict=True)
    ]


def _report(judged: list[tuple[Row, Outcome]], form: str) -> None:
    if form == "table":
        _table(judged)
        return
    records = [
        {
            "target": str(current()),
            "op": row.op.name,
            "impl": row.impl.label,
            "case": row.case.name,
            "status": outcome.status,
            "detail": outcome.detail,
        }
        for row, outcome in judged
    ]
    text = output.as_json(records) if form == "json" else output.as_csv(COLUMNS, records)
    print(text, end="")


def _table(judged: list[tuple[Row, Outcome]]) -> None:
    """A line per op and implementation, then every row that failed."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row, outcome in judged:
        counts.setdefault((row.op.name, row.impl.label), Counter())[outcome.status] += 1
    lines = [
        (
            *names,
            count["ok"],
            count["refused"],
            count["failed"],
            "failed" if count["failed"] else "ok",
        )
        for names, count in counts.items()
    ]
    columns = ("op", "implementation", "ok", "refused", "failed", "")
    output.table(columns, lines, right=("ok", "refused", "failed"))
    failed = [(r, o) for r, o in judged if o.status == "failed"]
    for row, outcome in failed:
        print(f"\n{row.op.name} {row.impl.label}, case {row.case.name}: {outcome.detail}")
        print(f"  axes: {_axes(row.case)}")


def _axes(case: Case) -> str:
    return " ".join(f"{axis}={value}" for axis, value in case.axes.items())


def _left_out(ops: list[Op[..., Any]], judged: list[Row], args: argparse.Namespace) -> str:
    """What was not judged and why, for the closing line."""
    words = ""
    everything = _rows(ops, args, Limit(), [])
    served = {row.op.name for row in everything}
    asked = [
        row
        for row in everything
        if args.impl in (None, row.impl.name) and (not args.case or row.case.name in args.case)
    ]
    if costly := len(asked) - len(judged):
        words += f"; {costly} costlier left out (--max-gflop)"
    if nobody := [op.name for op in ops if op.name not in served]:
        words += f"; nothing serves {', '.join(nobody)}"
    return words
