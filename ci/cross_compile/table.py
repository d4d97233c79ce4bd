"""The committed table of one Triton version: a row per program, so that a diff shows each change of
the compiler's or ours."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from pathlib import Path

from ci.cross_compile.collect import Program
from dsa_hal.autotune.static import Metrics

COLUMNS = (
    "target", "op", "impl", "case", "kernel", "registers", "accumulators", "scalars", "shared",
    "occupancy", "spills", "scalar_spills", "matrix", "memory", "bytes", "config",
)  # fmt: skip


def path(version: str) -> Path:
    return Path(__file__).parent / f"table-{version}.csv"


def text(rows: Sequence[tuple[Program, Metrics]]) -> str:
    """All programs as CSV, in an order that does not depend on when they were compiled."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(sorted(_row(*row) for row in rows))
    return file.getvalue()


def _row(program: Program, found: Metrics) -> list[str]:
    limits = program.target.limits
    assert limits is not None
    cells = (
        program.target, program.op, program.impl, program.case, program.launch.name,
        found.registers, found.accumulators, found.scalars, found.shared,
        found.occupancy(limits), found.spills, found.scalar_spills, _counts(found.matrix),
        _counts(found.memory), found.size, program.config,
    )  # fmt: skip
    return [str(cell) for cell in cells]


def _counts(counted: object) -> str:
    assert isinstance(counted, dict)
    return " ".join(f"{name}*{count}" for name, count in counted.items())


def changes(old: str, new: str, name: str) -> str:
    """A unified diff without context; empty if nothing changed."""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), f"{name} as committed", f"{name} as compiled now",
        lineterm="", n=0,
    )  # fmt: skip
    return "\n".join(lines)
