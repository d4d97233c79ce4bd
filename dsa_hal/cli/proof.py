"""`dsa-hal report proof`: what was proved of which op on which target and how, from the results
that a checkout keeps. Nothing is run, and nothing is typed.

reference    what the op means; every other result is a comparison with it
ran          cases equal to the reference on the device itself, under the matrix's twists
interpreted  cases equal to it on the processor: Triton's programs in its interpreter, torch's as
             they are
emulated     cases equal to it on the processor: the backend as it is, over implementations of its
             library's operations written from their documentation
compiled     programs compiled for the device without one, within the assertions on instructions,
             memory, spills and occupancy
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dsa_hal
from dsa_hal.cli import output
from dsa_hal.errors import BadInput
from dsa_hal.registry import Op
from dsa_hal.selection import OPS
from dsa_hal.target import architectures

TARGETS = ("cpu:any", "cuda:sm90", "rocm:gfx950", "rocm:gfx942", "npu:a2", "npu:a3", "npu:950")
WAYS = ("ran", "interpreted", "emulated", "compiled")
PAGE = Path("ci/support/proof.md")
BEGIN, END = "<!-- dsa-hal report proof -->\n", "<!-- end of dsa-hal report proof -->\n"


@dataclass
class Proof:
    """What the results say.

    counts    (target, op) -> way -> cases of implementations, or programs
    failed    (target, op) -> what did not equal the reference
    judged    target -> op -> cases interpreted or emulated
    compilers versions of Triton that compiled
    """

    counts: dict[tuple[str, str], Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    judged: dict[str, dict[str, set[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )
    compilers: list[str] = field(default_factory=list)

    def total(self, target: str, way: str) -> int:
        return sum(count[way] for (of, _), count in self.counts.items() if of == target)

    def ops(self, target: str, way: str) -> int:
        return sum(bool(count[way]) for (of, _), count in self.counts.items() if of == target)


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("proof").add_argument
    add("--write", action="store_true",
        help=f"write {PAGE} and the README's part; default: print the page")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    root = Path(dsa_hal.__file__).parent.parent
    if not (root / PAGE.parent).is_dir():
        raise BadInput(f"{root} is no checkout: it has no {PAGE.parent}, where results are kept")
    proof = gather(root)
    if not args.write:
        print(page(proof), end="")
        return 0
    output.write_atomically(root / PAGE, page(proof))
    readme = root / "README.md"
    output.write_atomically(readme, placed(readme.read_text(), summary(proof)))
    output.note(f"written to {root / PAGE} and {readme}")
    return 0


def gather(root: Path) -> Proof:
    """Read ci/support and ci/cross_compile of a checkout."""
    proof = Proof()
    for record in _records(root / "ci" / "support" / "cpu.csv"):
        if record["answer"] == "served" and record["default_run"] == "yes":
            _count(proof, record, "ran")  # by the tests, which judge every such row
    for way in ("ran", "interpreted", "emulated"):
        for path in sorted((root / "ci" / "support").glob(f"{way}-*.csv")):
            for record in _records(path):
                if way != "ran":
                    proof.judged[record["target"]][record["op"]].add(record["case"])
                if record["status"] == "ok":
                    _count(proof, record, way)
                elif record["status"] == "failed":
                    proof.failed[record["target"], record["op"]] += 1
    programs: dict[tuple[str, str], set[tuple[str, ...]]] = defaultdict(set)
    for path in sorted((root / "ci" / "cross_compile").glob("table-*.csv")):
        proof.compilers.append(path.stem.removeprefix("table-"))
        for record in _records(path):
            key = record["kernel"], record["config"], record["impl"], record["case"]
            programs[record["target"], record["op"]].add(key)
    for where, found in programs.items():
        proof.counts[where]["compiled"] = len(found)
    return proof


def _records(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _count(proof: Proof, record: dict[str, str], way: str) -> None:
    proof.counts[record["target"], record["op"]][way] += 1


# -- what is written ----------------------------------------------------------------------------


def page(proof: Proof) -> str:
    """All of it: a row per op, then the cases that were not interpreted."""
    ops = [op for op in OPS.values() if op.reference.__module__.startswith("dsa_hal.ops.")]
    compilers = ", ".join(proof.compilers) or "no version"
    lines = [
        "# What was proved, and how",
        "",
        "Written by `dsa-hal report proof --write` from the results in ci/support and"
        " ci/cross_compile; a test compares.",
        "",
        "- **reference**: every op has one, in fp32; all else is compared with it",
        "- **ran n**: n cases of implementations equal to it on the device, under the matrix's"
        " twists; on the processor in CI",
        "- **interpreted n**: n cases equal to it on the processor, in Triton's interpreter as"
        " corrected here, or as operations of torch",
        "- **emulated n**: n cases equal to it on the processor, the backend's calls of torch_npu"
        " served by implementations written from its documentation",
        f"- **compiled n**: n programs compiled for the device without one, by Triton {compilers},"
        " within assertions on matrix instructions, shared memory, spills and occupancy",
        "- **by parts**: a composite whose parts are served; what is said of them holds",
        "- **nothing**: no implementation",
        "",
        *_table(
            ("op", *TARGETS), [[op.name, *(_cell(proof, t, op) for t in TARGETS)] for op in ops]
        ),
        "",
        "## Cases that are neither interpreted nor emulated",
        "",
        "They cost more than CI has time for; `dsa-hal test OP --interpret TARGET --case NAME`"
        " takes them, where the target's programs are Triton's.",
        "",
        *_table(("op", "cases"), list(_left_out(proof, ops))),
    ]
    return "\n".join(lines) + "\n"


def summary(proof: Proof) -> str:
    """A row per target, for the README."""
    rows = []
    for target in TARGETS:
        counts = [_summed(proof, target, way) for way in WAYS]
        if target == "cpu:any":
            counts[0] += ", in CI"
        rows.append([f"`{target}`", _device(target), *counts])
    return "\n".join(_table(("target", "device", *WAYS), rows)) + "\n"


def placed(text: str, part: str) -> str:
    """`text` with what stands between the marks replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise BadInput(f"the README has no single place for it, between {BEGIN!r} and {END!r}")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: BEGIN + part + END, text, flags=re.DOTALL)


def _device(target: str) -> str:
    backend, _, arch = target.partition(":")
    stated = architectures(backend).get(arch)
    return "any processor" if stated is None else stated.device


def _summed(proof: Proof, target: str, way: str) -> str:
    unit = "programs" if way == "compiled" else "cases"
    total = proof.total(target, way)
    if total:
        failed = sum(n for (of, _), n in proof.failed.items() if of == target)
        wrong = f", {failed} failed" if failed and way != "compiled" else ""
        return f"{total} {unit} of {proof.ops(target, way)} ops{wrong}"
    return "not recorded" if way == "ran" else "no"


def _cell(proof: Proof, target: str, op: Op[..., object]) -> str:
    count = proof.counts.get((target, op.name), Counter())
    words = [f"{way} {count[way]}" for way in WAYS if count[way]]
    if wrong := proof.failed[target, op.name]:
        words.append(f"**failed {wrong}**")
    if not words and op.uses:
        words = ["by parts"]
    return ", ".join(words) or "nothing"


def _left_out(proof: Proof, ops: list[Op[..., object]]) -> Iterator[list[str]]:
    for op in ops:
        judged = [cases[op.name] for cases in proof.judged.values() if op.name in cases]
        left = [c.name for c in op.cases if judged and not any(c.name in cases for cases in judged)]
        if left:
            yield [op.name, ", ".join(left)]


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [columns, ("---",) * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
