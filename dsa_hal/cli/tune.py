"""Measure on this device which implementation of an op is fastest for calls of which shapes, and
with which configuration of its kernels; later selections ask the table.

  dsa-hal tune
  dsa-hal tune topk fp8_gemm --case decode_8k prefill_8k
  dsa-hal tune sparse_mla --impl triton gluon --most 8
  dsa-hal tune --derive "NVIDIA H800" --input h200.yaml --output h800.yaml
  DSA_HAL_TARGET=rocm:gfx950 dsa-hal tune --static --output gfx950.yaml

Calls are the true shapes of the model, or --case. Every configuration is checked against the
reference before it is timed. Several runs may share a device: they take turns at timing. The table
is this user's own ($DSA_HAL_CACHE/tuned), or --output; what it says of ops that were not tuned
stays. Exit code 1 if a configuration failed or was wrong.

--derive measures nothing: it writes a table again under the name of another device of the same
architecture, marked as derived. The order of implementations and the configurations are kept: all
contenders of a call move the same bytes and do the same arithmetic, so that a slower memory or
clock adds the same time to each.

--static measures nothing either and needs no device: every configuration is compiled for the target
in force, one that spills registers or exceeds its memory is refused, and a model of the rest, of
their machine code and of the peaks that the target's maker publishes, gives the times. The table is
marked as static; what a device measures replaces it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsa_hal.autotune import store
from dsa_hal.autotune.search import Contender, Search
from dsa_hal.case import Case
from dsa_hal.cli import choose, machine, output
from dsa_hal.errors import BadInput
from dsa_hal.facts import Described
from dsa_hal.matrix import wanted
from dsa_hal.registry import Op
from dsa_hal.selection import selection, use
from dsa_hal.target import Target, stand_in

MOST = 24


@dataclass(frozen=True)
class Race:
    """What one call of an op showed."""

    case: str
    call: Described
    contenders: list[Contender]

    @property
    def times(self) -> dict[str, float]:
        return {c.impl.name: round(c.us, 2) for c in self.contenders if c.us is not None}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to tune; default: all")
    parser.add_argument("--case", nargs="+", action="extend", metavar="NAME", default=[],
                        help="cases whose shapes are measured; default: the model's")  # fmt: skip
    parser.add_argument("--impl", nargs="+", action="extend", metavar="NAME", default=[],
                        help="implementations that take part; default: all")  # fmt: skip
    parser.add_argument("--most", type=choose.whole(1), default=MOST, metavar="N",
                        help=f"configurations per kernel and call; default {MOST}")  # fmt: skip
    parser.add_argument("--backend", metavar="NAME", help="instead of DSA_HAL_BACKEND's")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="the table to write; default: this user's own")  # fmt: skip
    parser.add_argument("--static", action="store_true",
                        help="compile and choose by a model; no device is needed")  # fmt: skip
    parser.add_argument("--derive", metavar="DEVICE", help="copy a table for another device")
    parser.add_argument("--input", type=Path, metavar="FILE",
                        help="the table that --derive reads; default: this user's own")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    with choose.target(args.backend) as target:
        own = store.user_file(target)
        if args.derive is not None:
            if args.output is None:
                raise BadInput("--derive needs --output FILE, the table to write")
            return _derive(args.derive, args.input or own, args.output)
        ops = choose.ops(args.ops)
        known = {c.name for op in ops for c in op.cases}
        for name in args.case:
            if name not in known:
                raise choose.unknown("case", name, known)
        if not args.static:
            target.must_be_here()
        elif target.limits is None:
            raise BadInput(
                f"--static models programs of Triton, and {target} has none;"
                " name a target, as in DSA_HAL_TARGET=rocm:gfx950"
            )
        if args.output is None:
            own.parent.mkdir(parents=True, exist_ok=True)
        output.must_be_writable(args.output or own)
        failed = kept = False
        for op in ops:
            cases = [c for c in op.cases if (c.name in args.case if args.case else c.model)]
            if args.static:
                races = _modelled(op, cases, args.impl, args.most)
            else:
                races = _races(op, cases, args.impl, own.with_suffix(".lock"), args.most)
            if any(race.times for race in races):
                entry = _entry(op, target, races)
                store.keep(args.output or own, target, op.name, entry, static=args.static)
                kept = True
            failed |= _report(op, races)
        nothing = f"nothing is written: {target} has nothing to tune for these ops"
        output.note(f"written to {args.output or own}" if kept else nothing)
    return int(failed)


def _races(
    op: Op[..., Any], cases: Sequence[Case], names: Sequence[str], lock: Path, most: int
) -> list[Race]:
    """A race per case between what may be selected here, or the named implementations of it."""
    impls = [i for i in selection().candidates(op)[0] if not names or i.name in names]
    device = selection().target.device
    races = []
    with output.progress(f"tuning {op.name}") as step:
        for at, case in enumerate(cases if impls else ()):
            inputs = case.make(op.inputs, device)
            search = Search(op, inputs, wanted(op, inputs), device, lock, most)
            races.append(Race(case.name, op.described(**inputs), search.race(impls)))
            step(at + 1, len(cases))
    return races


def _modelled(
    op: Op[..., Any], cases: Sequence[Case], names: Sequence[str], most: int
) -> list[Race]:
    """As `_races`, by the model: on a target without a device, launches are only recorded."""
    from dsa_hal.autotune import static
    from dsa_hal.backends.portable import compiled, launches

    target = selection().target
    assert target.limits is not None

    def programs(run: Callable[[], object]) -> list[tuple[Any, Any]]:
        """What a call launches, and what the compiler makes of it."""
        with launches.recorded(target.arch) as found:
            run()
        return [(launch, compiled.metrics(launch, target.arch)) for launch in found]

    impls = [i for i in selection().candidates(op)[0] if not names or i.name in names]
    races = []
    with use(target=stand_in(str(target), "meta")), output.progress(f"tuning {op.name}") as step:
        impls = [i for i in op.implementations(target) if i.name in {one.name for one in impls}]
        for at, case in enumerate(cases if impls else ()):
            inputs = case.make(op.inputs, "meta")
            found = static.race(op, impls, inputs, programs, target.limits, most)
            races.append(Race(case.name, op.described(**inputs), found))
            step(at + 1, len(cases))
    return races


def _entry(op: Op[..., Any], target: Target, races: Sequence[Race]) -> dict[str, Any]:
    """What the table holds of an op."""
    configs: dict[str, list[Any]] = {}
    for race in races:
        for contender in race.contenders:
            for space, rows in contender.rows().items():
                configs.setdefault(space, []).extend(rows)
    return {
        "contract": op.version,
        "with": machine.versions(target),
        "winners": [{"call": race.call, "us": race.times} for race in races if race.times],
        "configs": configs,
    }


def _report(op: Op[..., Any], races: Sequence[Race]) -> bool:
    """Print what was found; whether anything failed."""
    rows = [
        (race.case, c.impl.name, "" if c.us is None else output.duration(c.us / 1e6),
         c.tried or "", "; ".join([*map(_words, c.chosen.values()), c.refusal, *c.failures[:2]]))
        for race in races for c in race.contenders
    ]  # fmt: skip
    if rows:
        columns = (op.name, "implementation", "median", "tried", "configuration, or why not")
        output.table(columns, rows, right=("median", "tried"))
    return any(c.failures for race in races for c in race.contenders)


def _words(config: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


def _derive(device: str, source: Path, path: Path) -> int:
    """Write the table in `source` for `device`, without its times' claim to be measured there."""
    if not source.is_file():
        raise BadInput(f"{source} does not exist; --input names the table to derive from")
    table = store.read(source)
    stamp = table["stamp"]
    derived = Target(stamp["backend"], stamp["arch"], name=device)
    ops = {
        name: {**entry, "winners": [_ranked(row) for row in entry["winners"]]}
        for name, entry in table["ops"].items()
    }
    store.write(path, derived, ops, derived_from=str(stamp["device"]))
    output.note(f"written to {path}: derived from {stamp['device']}, not measured on {device}")
    return 0


def _ranked(row: dict[str, Any]) -> dict[str, Any]:
    """Times become ranks, 1 the fastest: nobody measured microseconds on that device."""
    order = sorted(row["us"], key=row["us"].get)
    return {"call": row["call"], "rank": {name: at + 1 for at, name in enumerate(order)}}
