"""What this machine can serve, asked of every implementation and every case, and nothing run."""

from __future__ import annotations

from dataclasses import dataclass

from dsa_hal.selection import OPS, Verdict, selection


@dataclass(frozen=True)
class Support:
    """One implementation of one op on the target in force.

    served   names of the op's cases that it accepts (shapes and options; no data, nothing run)
    refused  case name -> its sentence
    """

    op: str
    impl: str
    verdict: Verdict
    served: tuple[str, ...]
    refused: dict[str, str]


def support(*names: str) -> list[Support]:
    """A row per op and implementation, in order of preference; `names` narrows the ops."""
    rows: list[Support] = []
    for op in (OPS[name] for name in (names or OPS)):
        asked = {
            case.name: selection().verdicts(op, (), case.make(op.inputs, "meta"))
            for case in op.cases
        }
        for at, static in enumerate(selection().verdicts(op)):
            answers = {name: verdicts[at] for name, verdicts in asked.items()}
            rows.append(
                Support(
                    op.name,
                    static.impl.label,
                    static,
                    tuple(n for n, v in answers.items() if v.question == "ok"),
                    {n: v.reason for n, v in answers.items() if v.question != "ok"},
                )
            )
    return rows
