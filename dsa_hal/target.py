"""Which device this process computes on: `Target`, and how one is found."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType

from dsa_hal.errors import Absent, ConfigError

ENTRY_POINTS = "dsa_hal.backends"


@dataclass(frozen=True)
class Target:
    """A backend and one architecture of it, as in `Target("cuda", "sm90")`.

    backend  name of the folder under backends/, or of an installed package's entry point
    arch     what implementations state in `arch=`: "sm90", "gfx950", "910b", "any"
    device   torch device type of the tensors ("cpu", "cuda", "npu")
    name     what the maker calls the device; for people
    score    `auto` takes the present target with the highest score
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


def detect(choice: str) -> Target:
    """The Target for DSA_HAL_BACKEND=`choice`.

    Raises ConfigError for a name that is not known, Absent for a known backend with no device here.
    """
    known = packages()
    if choice == "auto":
        present = [t for b in known if isinstance(t := probe(b), Target) and implements(b)]
        if not present:
            reasons = "; ".join(f"{b}: {probe(b)}" for b in known)
            raise Absent(f"no backend can serve this machine ({reasons})")
        return max(present, key=lambda target: target.score)
    if choice not in known:
        raise ConfigError(f"unknown backend {choice!r}; known are auto, {', '.join(sorted(known))}")
    answer = probe(choice)
    if isinstance(answer, str):
        raise Absent(f"backend {choice} was asked for, but {answer}")
    return answer
