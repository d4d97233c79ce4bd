"""The matrix of ops on the emulated NPU, as `dsa-hal test` gives it for other targets.

    python -m ci.ascend.record [--arch a2 a3 950] [--op OP ...]

Writes ci/support/emulated-<arch>.csv; with --op, prints those rows and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ci.ascend.emulated import ARCHES, emulated
from dsa_hal.cli.output import as_csv
from dsa_hal.cli.test import COLUMNS
from dsa_hal.matrix import Limit, attempt, rows
from dsa_hal.selection import OPS, current

HOME = Path(__file__).parents[1] / "support"

SMALL = Limit(flop=1.1e8, bytes=2e6, products=6e6)
"""What plain torch judges in tenths of a second."""


def judged(arch: str, ops: Sequence[str] = (), impls: str = "") -> list[dict[str, str]]:
    """A record per row of the matrix, each call checked against the constraint table; of some ops,
    and of some implementations: "npu" for those that call the device's ops."""
    found = []
    with emulated(arch, checked=True):
        for row in rows([OPS[name] for name in ops], SMALL):
            if impls and (row.impl.backend != impls or row.impl.name == "torch"):
                continue
            outcome = attempt(row)
            found.append(
                {
                    "target": str(current()),
                    "op": row.op.name,
                    "impl": row.impl.label,
                    "case": row.case.name,
                    "status": outcome.status,
                    "detail": outcome.detail,
                }
            )
    return found


def path(arch: str) -> Path:
    return HOME / f"emulated-{arch}.csv"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.ascend.record", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHES, default=ARCHES, metavar="ARCH")
    parser.add_argument("--op", nargs="+", choices=tuple(OPS), default=(), metavar="OP")
    args = parser.parse_args(arguments)
    failed = 0
    for arch in args.arch:
        found = judged(arch, args.op)
        bad = [record for record in found if record["status"] == "failed"]
        failed += len(bad)
        text = as_csv(COLUMNS, found)
        if args.op:
            print(text, end="")
            continue
        draft = path(arch).with_suffix(".part")
        draft.write_text(text)
        os.replace(draft, path(arch))
        print(f"npu:{arch}: {len(found)} rows, {len(bad)} failed")
        for record in bad:
            print(f"  {record['op']} {record['impl']}, {record['case']}: {record['detail']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
