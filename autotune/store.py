"""Tables of what was fastest: which implementation of an op, and which configuration of a kernel,
for calls of which shapes.

A table is a YAML file with a stamp that says where it was measured. The tables shipped with a
backend (`backends/<backend>/tuned/*.yaml`) are read first, then this user's own
(`$DSA_HAL_CACHE/tuned/`), op by op, so that a local measurement wins. A table stamped for another
device or contract is passed over with one line in the log; a table that cannot be read is an error
that names the file.

    stamp: {backend: cuda, arch: sm90, device: NVIDIA H200}
    ops:
      topk:
        contract: 1
        with: {torch: 2.11.0, triton: 3.6.0, driver: 580.159.04}
        winners:
        - call: {logits: "float32[64, 32768]", k: 2048, ties: any}
          us: {radix: 9.1, torch: 88.0}
        configs:
          topk/radix:
          - {facts: {rows: 64, n: 32768}, config: {threads: 512}}

A table derived for a device that nobody measured says so in its stamp (`derived_from`), and has
`rank` (1 the fastest) in the place of `us`. One that was made without any device (`static: true`;
`us` are a model's) fits every device of its architecture, and is read before all others; it chooses
configurations, never implementations.
"""

from __future__ import annotations

import fcntl
import importlib
import math
import os
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from dsa_hal import env
from dsa_hal.errors import ConfigError
from dsa_hal.log import logger
from dsa_hal.target import Target, packages

UNLIKE = 20.0
"""The distance between arguments that no ratio compares: other dtypes, words, or one left out."""


@dataclass(frozen=True)
class Winner:
    """A measured call: its description (see `facts.described`), and what each implementation took,
    in microseconds or as its rank, the fastest first."""

    call: Mapping[str, str | int | float]
    us: Mapping[str, float]

    @property
    def impl(self) -> str:
        return next(iter(self.us))

    def distance(self, call: Mapping[str, str | int | float]) -> float:
        """How far another call is: the sum of the logarithms of all ratios of sizes."""
        names = self.call.keys() | call.keys()
        return sum(_apart(self.call.get(name), call.get(name)) for name in names)


def _apart(a: str | int | float | None, b: str | int | float | None) -> float:
    if a == b:
        return 0.0
    (kind, sizes), (other, others) = _parts(a), _parts(b)
    if kind != other or len(sizes) != len(others):
        return UNLIKE
    return sum(abs(math.log((m + 1) / (n + 1))) for m, n in zip(sizes, others, strict=True))


@lru_cache(maxsize=4096)
def _parts(value: str | int | float | None) -> tuple[str, tuple[float, ...]]:
    """A described argument as a kind and sizes that ratios compare."""
    if isinstance(value, bool) or value is None:
        return str(value), ()
    if isinstance(value, int | float):
        return ("number", (value,)) if value >= 0 else (str(value), ())
    numbers = re.compile(r"\d+(?=[],])")  # the sizes of a shape; not the digits of a dtype's name
    return numbers.sub("", value), tuple(map(int, numbers.findall(value)))


def nearest(
    winners: Sequence[Winner], call: Mapping[str, str | int | float], able: Collection[str]
) -> str | None:
    """The fastest of the `able` implementations in the measurement nearest to `call` that timed
    one of them; the earlier measurement wins a tie. None if none did."""
    fitting = [winner for winner in winners if any(name in able for name in winner.us)]
    if not fitting:
        return None
    best = min(fitting, key=lambda winner: winner.distance(call))
    return next(name for name in best.us if name in able)


def winners(op: str, contract: int, target: Target) -> tuple[Winner, ...]:
    """What was measured of an op on a target; empty if it never was. What a static table says of
    implementations does not count: its model orders the configurations of one kernel, and between
    kernels of different make it knows nothing.

    Raises ConfigError for a file that is not a table, or an entry that is not one.
    """
    found: tuple[Winner, ...] = ()
    for path, table in _tables(target):
        entry = table["ops"].get(op)
        if entry is None or table["stamp"].get("static"):
            continue
        if entry.get("contract") != contract:
            logger.warning(
                "%s: %s was tuned for contract %s, this is %s; its entry is not used",
                path, op, entry.get("contract"), contract,
            )  # fmt: skip
            continue
        found = tuple(_winner(path, op, row) for row in entry["winners"])
    return found


def configs(space: str, target: Target) -> tuple[tuple[dict[str, int], dict[str, int]], ...]:
    """(facts, configuration) pairs measured for a kernel's space on a target; a later table's
    replace an earlier one's."""
    found: tuple[tuple[dict[str, int], dict[str, int]], ...] = ()
    for path, table in _tables(target):
        rows = table["ops"].get(space.partition("/")[0], {}).get("configs", {}).get(space)
        if rows is not None:
            found = tuple(_config(path, space, row) for row in rows)
    return found


def user_file(target: Target) -> Path:
    """Where this user's own measurements for a target are kept."""
    return env.CACHE.read() / "tuned" / f"{target.backend}-{target.arch}.yaml"


def keep(
    path: Path, target: Target, op: str, entry: Mapping[str, Any], static: bool = False
) -> None:
    """Put an op's entry into a table, in the place of its earlier one. Entries of other ops stay,
    unless the table is of another device or of another kind. Several processes may do so at
    once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".keep").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = read(path) if path.is_file() else {"stamp": {}, "ops": {}}
        same = table["stamp"] == _stamp(target, static)
        write(path, target, {**(table["ops"] if same else {}), op: dict(entry)}, static=static)


def _stamp(target: Target, static: bool, derived_from: str = "") -> dict[str, Any]:
    derived: dict[str, Any] = {"derived_from": derived_from} if derived_from else {}
    return {**_identity(target), **derived, **({"static": True} if static else {})}


def write(
    path: Path, target: Target, ops: Mapping[str, Any], derived_from: str = "",
    static: bool = False,
) -> None:  # fmt: skip
    """Write a table whole or not at all. `ops` maps op -> {"contract": int, "with": {...},
    "winners": [...], "configs": {...}}."""
    import yaml

    stamp = _stamp(target, static, derived_from)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            table = {"stamp": stamp, "ops": dict(ops)}
            yaml.safe_dump(table, file, sort_keys=False, width=100, default_flow_style=None)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _tables.cache_clear()


def _identity(target: Target) -> dict[str, str]:
    return {"backend": target.backend, "arch": target.arch, "device": target.name}


@cache
def _tables(target: Target) -> tuple[tuple[Path, dict[str, Any]], ...]:
    """Tables whose stamp fits the target, shipped ones first. A user's table of another device, or
    a backend with shipped tables of other devices alone, is passed over with one line."""
    fitting = []
    homes = [Path(importlib.import_module(p).__path__[0]) for p in packages()[target.backend]]
    shipped = [path for home in homes for path in sorted((home / "tuned").glob("*.yaml"))]
    own = [path] if (path := user_file(target)).is_file() else []
    tables = [(path, read(path)) for path in (*shipped, *own)]
    for path, table in sorted(tables, key=lambda each: not each[1]["stamp"].get("static", False)):
        asked = _identity(target)
        if table["stamp"].get("static"):
            del asked["device"]
        different = [
            f"{key} {table['stamp'].get(key)!r}, this is {value!r}"
            for key, value in asked.items()
            if table["stamp"].get(key) != value
        ]
        if not different:
            fitting.append((path, table))
        elif path in own:
            logger.warning("%s was measured on %s; not used", path, ", ".join(different))
    if shipped and not fitting:
        names = ", ".join(path.stem for path in shipped)
        logger.warning(
            "the shipped tuning tables (%s) are of other devices than %s; not used:"
            " `dsa-hal tune` measures this one", names, target.name or target,
        )  # fmt: skip
    return tuple(fitting)


def read(path: Path) -> dict[str, Any]:
    """A table as it stands in its file. Raises ConfigError if it is none."""
    import yaml  # here, as a process without tables need not pay for it

    try:
        table = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is no tuning table ({reason}); delete it or tune anew") from None
    if not (
        isinstance(table, dict)
        and isinstance(table.get("stamp"), dict)
        and isinstance(table.get("ops"), dict)
        and all(
            isinstance(e, dict)
            and isinstance(e.get("winners"), list)
            and isinstance(e.get("configs", {}), dict)
            for e in table["ops"].values()
        )
    ):
        raise ConfigError(f"{path} is no tuning table (no stamp or ops); delete it or tune anew")
    return table


def _winner(path: Path, op: str, row: Any) -> Winner:
    if isinstance(row, dict) and isinstance(row.get("call"), dict) and len(row) == 2:
        times = row.get("us", row.get("rank"))
        if isinstance(times, dict) and times and all(_is_time(t) for t in times.values()):
            return Winner(row["call"], dict(sorted(times.items(), key=lambda item: item[1])))
    raise ConfigError(
        f"{path}: {op} has the entry {row!r}; expected call (argument: description) and us"
        " (implementation: microseconds); delete the file or tune anew"
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _config(path: Path, space: str, row: Any) -> tuple[dict[str, int], dict[str, int]]:
    if isinstance(row, dict) and row.keys() == {"facts", "config"}:
        facts, config = row["facts"], row["config"]
        both = (*facts.values(), *config.values()) if isinstance(facts, dict) else (None,)
        if isinstance(config, dict) and all(isinstance(n, int) for n in both):
            return facts, config
    raise ConfigError(
        f"{path}: {space} has the configuration {row!r}; expected facts and config, each a map to"
        " whole numbers; delete the file or tune anew"
    )
