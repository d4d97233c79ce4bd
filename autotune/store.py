"""Tables of winners: which implementation of an op was fastest, by ranges of its variable axes.

A table is a YAML file with a stamp that says where it was measured. The tables shipped with a
backend (`backends/<backend>/tuned/*.yaml`) are read first, then this user's own
(`$DSA_HAL_CACHE/tuned/`), op by op, so that a local measurement wins. A table stamped for another
device or contract is passed over with one line in the log; a table that cannot be read is an error
that names the file.

    stamp: {backend: cuda, arch: sm90, device: NVIDIA H200, torch: 2.11.0}
    ops:
      topk:
        contract: 1
        winners:
        - {rows: 1, columns: 131072, impl: radix}
        - {rows: 4096, columns: 32768, impl: threshold}
"""

from __future__ import annotations

import importlib
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dsa_hal import env
from dsa_hal.errors import ConfigError
from dsa_hal.log import logger
from dsa_hal.target import Target, packages


@dataclass(frozen=True)
class Winner:
    """At about these sizes of the variable axes, this implementation was fastest."""

    sizes: Mapping[str, int]
    impl: str

    def distance(self, sizes: Mapping[str, int]) -> float:
        """How far other sizes are: the sum over axes of the ratio's logarithm."""
        return sum(abs(math.log((sizes[a] + 1) / (n + 1))) for a, n in self.sizes.items())


def nearest(winners: Sequence[Winner], sizes: Mapping[str, int]) -> str:
    """The implementation that won nearest to `sizes`; the earlier entry wins a tie."""
    return min(winners, key=lambda winner: winner.distance(sizes)).impl


def winners(op: str, contract: int, axes: Sequence[str], target: Target) -> tuple[Winner, ...]:
    """The winners known for an op on a target; empty if it was never measured there.

    Raises ConfigError for a file that is not a table, or an entry whose axes are not the op's.
    """
    found: tuple[Winner, ...] = ()
    for path, table in _tables(target):
        entry = table["ops"].get(op)
        if entry is None:
            continue
        if entry.get("contract") != contract:
            logger.warning(
                "%s: %s was tuned for contract %s, this is %s; its entry is not used",
                path, op, entry.get("contract"), contract,
            )  # fmt: skip
            continue
        found = tuple(_winner(path, op, axes, row) for row in entry["winners"])
    return found


def user_file(target: Target) -> Path:
    """Where this user's own measurements for a target are kept."""
    return env.CACHE.read() / "tuned" / f"{target.backend}-{target.arch}.yaml"


def write(path: Path, target: Target, torch_version: str, ops: Mapping[str, Any]) -> None:
    """Write a table whole or not at all. `ops` maps op -> {"contract": int, "winners": [...]}."""
    import yaml

    stamp = {**_identity(target), "torch": torch_version}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            yaml.safe_dump({"stamp": stamp, "ops": dict(ops)}, file, sort_keys=False)
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
    """Tables whose stamp fits the target, shipped ones first."""
    fitting = []
    homes = [Path(importlib.import_module(p).__path__[0]) for p in packages()[target.backend]]
    shipped = [path for home in homes for path in sorted((home / "tuned").glob("*.yaml"))]
    own = [path] if (path := user_file(target)).is_file() else []
    for path in (*shipped, *own):
        table = _read(path)
        different = [
            f"{key} {table['stamp'].get(key)!r}, this is {value!r}"
            for key, value in _identity(target).items()
            if table["stamp"].get(key) != value
        ]
        if different:
            logger.warning("%s was measured on %s; not used", path, ", ".join(different))
        else:
            fitting.append((path, table))
    return tuple(fitting)


def _read(path: Path) -> dict[str, Any]:
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
            isinstance(e, dict) and isinstance(e.get("winners"), list)
            for e in table["ops"].values()
        )
    ):
        raise ConfigError(f"{path} is no tuning table (no stamp or ops); delete it or tune anew")
    return table


def _winner(path: Path, op: str, axes: Sequence[str], row: Any) -> Winner:
    if isinstance(row, dict) and isinstance(row.get("impl"), str):
        sizes = {name: value for name, value in row.items() if name != "impl"}
        if set(sizes) == set(axes) and all(isinstance(n, int) for n in sizes.values()):
            return Winner(sizes, row["impl"])
    raise ConfigError(
        f"{path}: {op} has the entry {row!r}; expected impl and whole numbers for"
        f" {', '.join(axes)}; delete the file or tune anew"
    )
