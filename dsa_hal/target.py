"""Which device this process computes on: `Target`, and how one is found; or which one it only
answers for, because no such device is here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from dsa_hal.errors import Absent, ConfigError

if TYPE_CHECKING:
    from dsa_hal.registry import Op

ENTRY_POINTS = "dsa_hal.backends"
EXAMPLE = "rocm:gfx950"


@dataclass(frozen=True)
class Architecture:
    """What a backend states of an architecture, as of the device that is named. Nothing is asked of
    a device: kernels are chosen and compiled by it where there is none.

    name         as in `Target.arch`
    device       what the maker calls the device of which the other numbers are
    processors   compute units or multiprocessors
    lanes        threads of a warp or wavefront
    shared       bytes of shared memory or LDS that one block may take
    registers    of 32 bits, that one thread may take
    file         registers of 32 bits of one processor
    threads      that one processor holds at most
    fp8          the 8-bit float that its matrix units multiply; None if they take none
    memory       bytes of memory
    bytes_per_s  of that memory, peak
    flop_per_s   of dense matrix products at their peak, by the operands' dtype ("bfloat16")
    page_size    tokens per page of the caches that its kernels take
    caches       formats of the caches that they take ("index_int8") and the layout that each is
                 kept in ("index_int8_split"); empty = every format, in the layout of its own name
    source       where the numbers stand

    A number is 0 where the notion does not apply or the maker publishes none.
    """

    name: str
    device: str
    processors: int
    shared: int
    lanes: int = 0
    registers: int = 0
    file: int = 0
    threads: int = 0
    fp8: torch.dtype | None = None
    memory: float = 0
    bytes_per_s: float = 0
    flop_per_s: Mapping[str, float] = field(default_factory=dict)
    page_size: int = 64
    caches: Mapping[str, str] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Target:
    """A backend and one architecture of it, as in `Target("cuda", "sm90")`.

    backend  name of the folder under backends/, or of an installed package's entry point
    arch     what implementations state in `arch=`: "sm90", "gfx950", "910b", "any"
    device   torch device type of the tensors ("cpu", "cuda", "npu"); "meta" where it is absent
    name     what the maker calls the device; for people
    score    `auto` takes the highest among the present targets that serve all a model needs
    limits   what its backend states of the architecture; None if it states nothing
    absent   why nothing can be executed on it, one sentence; "" if it is here
    """

    backend: str
    arch: str
    device: str = "cpu"
    name: str = ""
    score: int = 0
    limits: Architecture | None = field(default=None, compare=False, repr=False)
    absent: str = ""

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}"

    def __hash__(self) -> int:  # asked for at every launch of a kernel with configurations
        return hash((self.backend, self.arch, self.name))

    def must_be_here(self) -> Target:
        """Itself. Raises Absent where it only answers questions."""
        if self.absent:
            raise Absent(self.absent)
        return self


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
    if isinstance(answer, Target):
        return replace(answer, limits=architectures(backend).get(answer.arch))
    return answer


def architectures(backend: str) -> dict[str, Architecture]:
    """What a backend states of its architectures (`ARCHITECTURES` of its package), by name."""
    stated = getattr(importlib.import_module(packages()[backend][0]), "ARCHITECTURES", ())
    return {architecture.name: architecture for architecture in stated}


def named(text: str) -> Target:
    """The target "backend:arch": this machine's own where it is one, else one that is absent.

    Raises ConfigError for a backend that is not known, or an architecture its backend states
    nothing of.
    """
    backend, _, arch = text.partition(":")
    if backend not in packages():
        known = ", ".join(sorted(packages()))
        raise ConfigError(
            f"target {text!r} is not of the form backend:arch, as in {EXAMPLE}; backends are"
            f" {known}"
        )
    here = probe(backend)
    if isinstance(here, Target) and here.arch == arch:
        return here
    stated = architectures(backend)
    if arch not in stated:
        known = ", ".join(f"{backend}:{name}" for name in stated) or "none"
        raise ConfigError(f"unknown target {text!r}; of backend {backend} there are {known}")
    reason = here if isinstance(here, str) else f"this machine has {here}"
    absent = (
        f"{text} is not in this machine ({reason}), so that nothing can be executed on it; what"
        " would serve it can be asked, tuned statically and compiled"
    )
    return Target(backend, arch, "meta", stated[arch].device, limits=stated[arch], absent=absent)


def stand_in(text: str, device: str) -> Target:
    """The target "backend:arch" for those who put something in the place of a device: ops execute
    on tensors of `device`, "cpu" under an interpreter, "meta" where launches are only recorded."""
    return replace(named(text), device=device, absent="")


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
