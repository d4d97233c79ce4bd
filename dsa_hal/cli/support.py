"""Which implementation serves which case of which op on the target in force. Nothing is run.

The table counts; json and csv list every case with the sentence of each refusal, and whether the
default run of the tests judges it or leaves it, too large, to `dsa-hal test --max-gflop`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dsa_hal.cli import choose, output
from dsa_hal.matrix import DEFAULT_RUN, cost_of
from dsa_hal.selection import OPS, current
from dsa_hal.support import Support, support

COLUMNS = ("target", "op", "impl", "case", "answer", "default_run", "reason")
"""Of the CSV; the committed tables in ci/support are made of it."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to ask for; default: all")
    parser.add_argument("--backend", metavar="NAME", help="instead of DSA_HAL_BACKEND's")
    parser.add_argument("--format", choices=output.FORMATS, default="table")


def run(args: argparse.Namespace) -> int:
    names = [op.name for op in choose.ops(args.ops)]
    with choose.target(args.backend):
        found = support(*names)
        if args.format == "json":
            print(output.as_json(records(found)), end="")
        elif args.format == "csv":
            print(output.as_csv(COLUMNS, records(found)), end="")
        else:
            _table(found, names)
    return 0


def records(found: Sequence[Support]) -> list[dict[str, Any]]:
    """A record per op, implementation and case; the order of cases is the op's own."""
    return [
        {
            "target": str(current()),
            "op": row.op,
            "impl": row.impl,
            "case": case.name,
            "answer": "served" if case.name in row.served else "refused",
            "default_run": "yes" if DEFAULT_RUN.admits(cost_of(OPS[row.op], case)) else "too large",
            "reason": row.refused.get(case.name, ""),
        }
        for row in found
        for case in OPS[row.op].cases
    ]


def _table(found: Sequence[Support], names: Sequence[str]) -> None:
    rows = [
        (row.op, row.impl, f"{len(row.served)}/{len(row.served) + len(row.refused)}", _why(row))
        for row in found
    ]
    nobody = sorted(set(names) - {row.op for row in found})
    rows += [
        (name, "none", f"0/{len(OPS[name].cases)}", "nothing serves it here") for name in nobody
    ]
    output.table(("op", "implementation", "cases", "refusals"), rows, right=("cases",))
    served = {row.op for row in found if row.served}
    output.note(f"\n{len(served)} of {len(names)} ops are served on {current()}")


def _why(row: Support) -> str:
    """The sentences of the refusals, each once, with the number of cases it turns away."""
    counts: dict[str, int] = {}
    for reason in row.refused.values():
        counts[reason] = counts.get(reason, 0) + 1
    return "; ".join(f"{reason} ({n}x)" if n > 1 else reason for reason, n in counts.items())
