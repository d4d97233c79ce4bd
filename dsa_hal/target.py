"""Which device this process computes on: `Target`, and how one is found."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsa_hal.errors import Absent, ConfigError

if TYPE_CHECKING:
    from dsa_hal.registry import Op

ENTRY_POINTS = "dsa_hal.backends"


@dataclass(frozen=True)
class Target:
    """A backend and one architecture of it, as in `Target("cuda", "sm90")`.

    backend  name of the folder under backends/, or of an installed package's entry point
    arch     what implementations state in `arch=`: "sm90", "gfx950", "910b", "any"
    device   torch device type of the tensors ("cpu", "cuda", "npu")
    name     what the maker calls the device; for people
    score    `auto` takes the highest among the present targets that serve all a model needs
    """

    backend: str
    arch: str
    device: str = "cpu"
    name: str = ""
    score: int = 0

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}"


REFERENCE = Target("reference", "any", name="fp32 references in plain torch")


@cache
def packages() -> dict[str, tuple[str, ...]]:
    """Backend name -> the packages that hold its implementations: the folders of backends/, then
    installed packages of the entry-point group `dsa_hal.backends` (name = backend, value =
    package)."""
    home = importlib.import_module("dsa_hal.backends")
    found: dict[str, tuple[str, ...]] = {
        module.name: (f"{home.__name__}.{module.name}",)
        for module in pkgutil.iter_modules(home.__path__)
        if module.ispkg and module.name != "portable"
    }
    for point in entry_points(group=ENTRY_POINTS):
        found[point.name] = (*found.get(point.name, ()), point.value)
    return found


def implements(backend: str) -> frozenset[str]:
    """Names of the ops for which a backend has a file; looks at file names, imports no file."""
    names: set[str] = set()
    for package in packages()[backend]:
        home: ModuleType = importlib.import_module(package)
        names |= {m.name for m in pkgutil.iter_modules(home.__path__) if not m.name.startswith("_")}
    return frozenset(names)


@cache
def probe(backend: str) -> Target | str:
    """The Target of this machine under `backend`, or the sentence why there is none. An exception
    inside a backend's own probe is a defect of that backend and is not swallowed."""
    answer = importlib.import_module(packages()[backend][0]).target()
    assert isinstance(answer, Target | str)
    return answer


def _lacks(backend: str) -> list[str]:
    """The ops of this package, but those of the family "training", for which a backend has neither
    a file nor, if they are composites, all parts: what a model would ask of it in vain."""
    from dsa_hal.selection import OPS

    files = implements(backend)

    def served(op: Op[..., Any]) -> bool:
        return op.name in files or (op.kind == "composite" and all(map(served, op.uses)))

    asked = [op for op in OPS.values() if op.reference.__module__.startswith("dsa_hal.ops.")]
    return [op.name for op in asked if op.family != "training" and not served(op)]


def detect(choice: str) -> Target:
    """The Target for DSA_HAL_BACKEND=`choice`; "auto" takes the present one with the highest score
    that serves every op a model needs, or the only one present.

    Raises ConfigError for a name that is not known, Absent for a known backend with no device here.
    """
    known = packages()
    if choice == "auto":
        present = [t for b in known if isinstance(t := probe(b), Target)]
        for target in sorted(present, key=lambda target: -target.score):
            if len(present) == 1 or not _lacks(target.backend):
                return target
        reasons = [
            f"{b}: it has no {_lacks(b)[0]}" if isinstance(p := probe(b), Target) else f"{b}: {p}"
            for b in known
        ]
        raise Absent(f"no backend can serve this machine ({'; '.join(reasons)})")
    if choice not in known:
        raise ConfigError(f"unknown backend {choice!r}; known are auto, {', '.join(sorted(known))}")
    answer = probe(choice)
    if isinstance(answer, str):
        raise Absent(f"backend {choice} was asked for, but {answer}")
    return answer
