"""How the model of static tuning orders what was measured: `autotune/static.py` evaluated for sm90,
beside the H200's table. A table keeps the fastest configuration of each call and the time of each
implementation; the times of configurations that lost are not kept.

    python -m ci.cross_compile.ranking            print the comparison
    python -m ci.cross_compile.ranking --write    and put it into ci/notes/rocm/static.md

Compiles every configuration of every call measured, some hundred programs; no device is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dsa_hal.ops  # noqa: F401  declares every op
from ci.cross_compile.collect import _no_device, _no_tables
from dsa_hal.autotune import store
from dsa_hal.autotune.space import Space
from dsa_hal.autotune.static import predicted
from dsa_hal.backends.portable.compiled import metrics
from dsa_hal.backends.portable.launches import recorded
from dsa_hal.case import Inputs
from dsa_hal.registry import Impl
from dsa_hal.selection import OPS, use
from dsa_hal.target import stand_in

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "backends" / "cuda" / "tuned" / "h200.yaml"
NOTE = ROOT / "ci" / "notes" / "rocm" / "static.md"
BEGIN, END = "<!-- ranking -->\n", "<!-- end of ranking -->\n"
TARGET = "cuda:sm90"


@dataclass(frozen=True)
class Call:
    """One measured call of a kernel.

    measured   microseconds of the implementation, with the configuration that was fastest
    winner     microseconds predicted for that configuration
    predicted  of all configurations that could be compiled
    """

    measured: float
    winner: float
    predicted: Sequence[float]

    @property
    def place(self) -> float:
        """Where the model puts the fastest: 0 first, 1 last; equals share theirs."""
        others = len(self.predicted) - 1
        below = sum(us < self.winner for us in self.predicted)
        same = sum(us == self.winner for us in self.predicted) - 1
        return (below + same / 2) / others

    @property
    def first(self) -> bool:
        return self.winner == min(self.predicted)


def calls(name: str, table: Mapping[str, Any], most: int) -> Iterator[Call]:
    """What the table has of a space, beside predictions for its configurations."""
    op_name, impl_name = name.split("/")
    op, entry = OPS[op_name], table["ops"][op_name]
    target = stand_in(TARGET, "meta")
    impl = next(i for i in op.implementations(target) if i.label == f"cuda/{impl_name}")
    space = Space.ALL[name]
    for case in (case for case in op.cases if case.model):
        inputs = case.make(op.inputs, "meta")
        call = op.described(**inputs)
        measured = [row["us"] for row in entry["winners"] if row["call"] == call]
        if not measured or impl_name not in measured[0]:
            continue
        space.forget()
        with recorded(target.arch):
            impl.fn(**inputs)
        facts = list(space.asked.values())[-1]
        known = [row["config"] for row in entry["configs"][name] if row["facts"] == facts]
        legal = list(space.choices(**facts))[:most]
        fastest = [config for config in legal if known and asdict(config) == known[-1]]
        if not fastest or len(legal) < 2:
            continue
        times = {config: _us(impl, inputs, space, config) for config in legal}
        yield Call(measured[0][impl_name], times[fastest[0]], list(times.values()))


def _us(impl: Impl[..., Any], inputs: Inputs, space: Space[Any], config: Any) -> float:
    target = stand_in(TARGET, "meta")
    assert target.limits is not None
    with space.forced(config), recorded(target.arch) as found:
        impl.fn(**inputs)
    made = [(launch, metrics(launch, target.arch)) for launch in found]
    return predicted(made, OPS[impl.op].cost(**inputs), target.limits)


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equals share their mean rank. NaN where a side has no order."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(o == value for o in values) - 1) / 2
            for value in values
        ]

    x, y = ranks(a), ranks(b)
    middle = (len(a) - 1) / 2
    both = sum((i - middle) * (j - middle) for i, j in zip(x, y, strict=True))
    spread = (sum((i - middle) ** 2 for i in x) * sum((j - middle) ** 2 for j in y)) ** 0.5
    return both / spread if spread else float("nan")


def comparison(found: Mapping[str, Sequence[Call]]) -> str:
    """The page's table."""
    lines = [
        "| space | calls | configurations | the model's first is the fastest |"
        " place of the fastest, 0 to 1 | rank correlation of calls | predicted / measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, some in found.items():
        ratios = sorted(call.winner / call.measured for call in some)
        order = correlation([c.measured for c in some], [c.winner for c in some])
        place = sum(call.place for call in some) / len(some)
        sizes = sorted({len(call.predicted) for call in some})
        lines.append(
            f"| {name} | {len(some)} | {sizes[0]} to {sizes[-1]} |"
            f" {sum(call.first for call in some)} | {place:.2f} | {order:.2f} |"
            f" {ratios[0]:.2f} to {ratios[-1]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ci.cross_compile.ranking", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--write", action="store_true", help="put it into the note")
    parser.add_argument("--most", type=int, default=24, metavar="N", help="as dsa-hal tune's")
    args = parser.parse_args(arguments)
    table, target = store.read(TABLE), stand_in(TARGET, "meta")
    found: dict[str, list[Call]] = {}
    with ExitStack() as stack:
        stack.enter_context(use(target=target))
        stack.enter_context(_no_device(target))
        stack.enter_context(_no_tables())
        for op in OPS.values():
            op.implementations(target)  # their spaces are known once they are registered
        for entry in table["ops"].values():
            for name in entry.get("configs", {}):
                if name in Space.ALL and name.endswith("/triton"):
                    found[name] = list(calls(name, table, args.most))
                    print(f"{name}: {len(found[name])} calls", file=sys.stderr, flush=True)
    page = comparison({name: some for name, some in found.items() if some})
    print(page, end="")
    if args.write:
        before, _, rest = NOTE.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        temporary = NOTE.with_suffix(".tmp")
        temporary.write_text(before + BEGIN + page + END + after)
        os.replace(temporary, NOTE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
