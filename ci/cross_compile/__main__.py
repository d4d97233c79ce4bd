"""The command: collect, compile on all cores, judge, compare with the committed table."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ci.cross_compile import rules, table
from ci.cross_compile.collect import TARGETS, Program, collect, representative, unseen
from dsa_hal.autotune.static import Metrics
from dsa_hal.backends.portable.compiled import metrics

_programs: Sequence[Program] = ()
"""What the processes of the pool compile: they inherit it, as programs cannot be sent to them."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.cross_compile", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="a change of the table is an error")
    how.add_argument("--write", action="store_true", help="write the table of this Triton")
    parser.add_argument("--all", action="store_true", help="every program of every case; no table")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET")
    parser.add_argument(
        "--op", nargs="+", default=(), metavar="OP", help="these ops alone; no table"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    args = parser.parse_args(arguments)
    return run(args)


def run(args: argparse.Namespace) -> int:
    import triton

    start, version = time.monotonic(), triton.__version__
    gathered = [collect(target, args.op) for target in args.target]
    every = [program for found in gathered for program in found.programs.values()]
    wrong = [problem for found in gathered for problem in found.problems]
    whole = not args.op and tuple(args.target) == TARGETS
    chosen = (
        every if args.all else [p for f in gathered for p in representative(f.programs.values())]
    )
    print(f"{len(chosen)} of {len(every)} programs, collected in {time.monotonic() - start:.0f} s")
    for absent in sorted(line for found in gathered for line in found.absent):
        print(f"not asked  {absent}")
    compiled = compile_all(chosen, args.jobs)
    known = rules.allowances()
    rows: list[tuple[Program, Metrics]] = []
    for program, found in zip(chosen, compiled, strict=True):
        if isinstance(found, str):
            wrong.append(
                f"{program.target} {program.launch.name} ({program.op} {program.case}): does not"
                f" compile: {found} [{program.config}]"
            )
            continue
        rows.append((program, found))
        wrong += rules.problems(program, found, known, version)
    if whole:
        excused = [a for a in known if a.unseen and version.startswith(a.triton)]
        wrong += [
            f"{name}: no implementation launches it for any case on any target; give its op a case"
            for name in unseen(every)
            if not any(re.fullmatch(a.kernel, name) for a in excused)
        ]
    for problem in dict.fromkeys(wrong):
        print(f"WRONG  {problem}")
    took = time.monotonic() - start
    print(f"triton {version}: {len(rows)} programs, {len(wrong)} problems, {took:.0f} s")
    changed = whole and not args.all and _compare(table.path(version), table.text(rows), args.write)
    return int(bool(wrong) or (args.check and changed))


def _compare(path: Path, now: str, write: bool) -> bool:
    """Show how the table changed, and write it if asked; whether it did."""
    old = path.read_text() if path.is_file() else ""
    diff = table.changes(old, now, path.name)
    print(diff or f"{path.name} is as committed", flush=True)
    if write:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(now)
        os.replace(temporary, path)
    elif diff:
        print(
            "If the change is meant: python -m ci.cross_compile --write, and read the diff",
            file=sys.stderr,
        )
    return bool(diff)


def compile_all(programs: Sequence[Program], jobs: int) -> list[Metrics | str]:
    """Metrics of each, or what the compiler said. Programs that several ops share are compiled
    once; those of matrix products first, as they take longest. Each target has processes of its
    own: Triton 3.6 converts FP8 for every AMD target as for the first that a process compiles."""
    global _programs
    _programs = programs
    first: dict[tuple[object, ...], int] = {}
    same = [first.setdefault((str(p.target), *p.launch.key()), at) for at, p in enumerate(programs)]
    order = sorted(first.values(), key=lambda at: -programs[at].launch.options["num_warps"])
    made: dict[int, Metrics | str] = {}
    for target in dict.fromkeys(str(program.target) for program in programs):
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(jobs, mp_context=fork) as pool:
            made |= pool.map(_one, [at for at in order if str(programs[at].target) == target])
    return [made[at] for at in same]


def _one(at: int) -> tuple[int, Metrics | str]:
    program = _programs[at]
    try:
        return at, metrics(program.launch, program.target.arch)
    except Exception as error:  # told with the results, as other programs may compile
        lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
        return at, " ".join([type(error).__name__, *[line for line in lines if line]][-12:])


if __name__ == "__main__":
    sys.exit(main())
