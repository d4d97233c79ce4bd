"""Why an op is served by what serves it: a verdict per implementation, best rank first.

Four questions are asked in turn: is what it needs importable, does it know this device, does it
keep the promises asked for, does it take the shape. The first implementation that passes all
serves, unless tuning measured another one to be faster in this range of sizes. Name a case, or set
axes (tokens=64), to ask the shape question; nothing is run.
"""

from __future__ import annotations

import argparse
from typing import Any

from dsa_hal.case import Case
from dsa_hal.cli import choose, output
from dsa_hal.errors import BadInput
from dsa_hal.registry import Op
from dsa_hal.selection import Unsupported, Verdict, selection


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", metavar="OP")
    parser.add_argument("axes", nargs="*", metavar="AXIS=VALUE", help="changes to the case's axes")
    parser.add_argument(
        "--case", metavar="NAME", help="default with axes: the op's first true shape"
    )
    parser.add_argument("--backend", metavar="NAME", help="instead of DSA_HAL_BACKEND's")
    parser.add_argument("--format", choices=("table", "json"), default="table")


def run(args: argparse.Namespace) -> int:
    op = choose.ops([args.op])[0]
    case = _case(op, args)
    with choose.target(args.backend):
        verdicts, serves = _ask(op, case)
        if args.format == "json":
            print(output.as_json(_record(op, case, verdicts, serves)), end="")
        else:
            _print(op, case, verdicts, serves)
    return 0


def _case(op: Op[..., Any], args: argparse.Namespace) -> Case | None:
    if args.case is None and not args.axes:
        return None
    base = choose.case(op, args.case) if args.case else choose.true_shape(op)
    if not args.axes:
        return base
    made = choose.custom(op, base, args.axes)
    if len(made) > 1:
        raise BadInput(f"explain asks about one case, {' '.join(args.axes)} makes {len(made)}")
    return made[0]


def _ask(op: Op[..., Any], case: Case | None) -> tuple[list[Verdict], str]:
    """The verdicts, and the label of what would serve ("" for nothing)."""
    if case is None:
        verdicts = selection().verdicts(op)
        return verdicts, next((v.impl.label for v in verdicts if v.question == "ok"), "")
    inputs = choose.inputs_of(op, case, "meta")
    try:
        serves = op.select(**inputs).label
    except Unsupported:
        serves = ""
    return selection().verdicts(op, (), inputs), serves


def _record(
    op: Op[..., Any], case: Case | None, verdicts: list[Verdict], serves: str
) -> dict[str, Any]:
    return {
        "op": op.name,
        "contract": op.version,
        "target": str(selection().target),
        "case": case and {"name": case.name, "axes": dict(case.axes)},
        "serves": serves or None,
        "verdicts": [
            {
                "impl": v.impl.label,
                "rank": v.impl.rank,
                "question": v.question,
                "reason": v.reason,
                "promises": sorted(v.impl.promises),
                "tuned": _tuned(op, v),
            }
            for v in verdicts
        ],
    }


def _tuned(op: Op[..., Any], verdict: Verdict) -> str:
    """What the tables of this target say of an implementation."""
    _, winners = selection().candidates(op)
    timed = [winner for winner in winners if verdict.impl.name in winner.us]
    won = sum(winner.impl == verdict.impl.name for winner in timed)
    return f"fastest in {won} of {len(timed)} calls" if timed else "in no table"


def _print(op: Op[..., Any], case: Case | None, verdicts: list[Verdict], serves: str) -> None:
    print(f"{op.name}: {op.kind}, contract {op.version}, on {selection().target}")
    if op.name in selection().named:
        print(f"named explicitly: {selection().named[op.name]}, nothing else is asked")
    if case is not None:
        print(f"case {case.name}: {' '.join(f'{a}={v}' for a, v in case.axes.items())}")
    print()
    rows = [
        (
            v.impl.label,
            v.impl.rank,
            "ok" if v.question == "ok" else f"no: {v.question}",
            ", ".join(sorted(v.impl.promises)) or "none",
            _tuned(op, v),
            v.reason,
        )
        for v in verdicts
    ]
    output.table(
        ("implementation", "rank", "verdict", "promises", "tuned", "why not"), rows, right=("rank",)
    )
    print()
    if not serves:
        hint = selection().hint(op)
        print(f"nothing serves it: {hint or 'every implementation refuses, as above'}")
    elif case is None:
        cases = ", ".join(c.name for c in op.cases)
        print(f"served by {serves}, if it takes the shape; --case asks that (cases: {cases})")
    else:
        print(f"served by {serves}")
