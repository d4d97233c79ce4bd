"""What is installed here, which devices are seen, what their libraries lack, what the environment
says, and what works.

Ends with a self-test: every op's smallest case on the target in force, against its reference; of a
target that is not in this machine (DSA_HAL_TARGET), what would serve it. Exit code 1 if something
is broken; an absent device or optional package is no defect.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dsa_hal
from dsa_hal import env
from dsa_hal.cli import choose, output
from dsa_hal.errors import DsaHalError
from dsa_hal.matrix import Row, attempt, smallest
from dsa_hal.registry import Op
from dsa_hal.selection import OPS, selection, use
from dsa_hal.target import Target, implements, packages, probe

REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "rich")
OPTIONAL = (
    "triton", "triton-rocm", "transformers", "flash-mla", "deep-gemm", "flashinfer-python",
    "tilelang", "amd-aiter", "torch-npu", "vllm", "sglang",
)  # fmt: skip
FOLDERS = ("ops", "backends", "autotune", "model")


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `state` is "ok", "absent", "warning" or "broken"."""

    section: str
    name: str
    state: str
    text: str


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="instead of DSA_HAL_BACKEND's")
    parser.add_argument("--format", choices=("table", "json"), default="table")


def run(args: argparse.Namespace) -> int:
    found: list[Finding] = []
    for section in (
        _versions(),
        _installation(),
        _environment(),
        _backends(),
        _libraries(),
        _self_test(args.backend),
    ):
        found += section
    if args.format == "json":
        print(output.as_json([asdict(finding) for finding in found]), end="")
    else:
        for section_name in dict.fromkeys(finding.section for finding in found):
            print(f"{section_name}:")
            rows = [(f"  {f.name}", f.state, f.text) for f in found if f.section == section_name]
            output.table(("", "", ""), rows, heading=False)
    broken = [finding for finding in found if finding.state == "broken"]
    names = ", ".join(finding.name for finding in broken)
    output.note(f"\nbroken: {names}" if broken else "\nnothing is broken")
    return 1 if broken else 0


def _versions() -> Iterator[Finding]:
    section = "versions"
    yield Finding(section, "dsa_hal", "ok", dsa_hal.__version__)
    yield Finding(section, "python", "ok", f"{platform.python_version()}, {platform.platform()}")
    for name in REQUIRED:
        found = _version(name)
        text = found or f"not installed; pip install {name}"
        yield Finding(section, name, "ok" if found else "broken", text)
    present = {name: found for name in OPTIONAL if (found := _version(name))}
    for name, found in present.items():
        yield Finding(section, name, "ok", found)
    missing = ", ".join(name for name in OPTIONAL if name not in present)
    yield Finding(section, "optional", "absent", missing or "all are installed")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _installation() -> Iterator[Finding]:
    """Whether the package is whole, and how the processor is used."""
    section = "installation"
    home = Path(dsa_hal.__file__).parent
    for folder in FOLDERS:
        place = home / folder
        if place.is_symlink() and not place.is_dir():
            text = f"the link {place} leads nowhere ({place.readlink()}); check out again"
            yield Finding(section, folder, "broken", text)
        elif place.is_file():
            text = f"{place} is a file, not a link; check out again with core.symlinks true"
            yield Finding(section, folder, "broken", text)
        elif not place.is_dir():
            yield Finding(section, folder, "broken", f"{place} is missing; install dsa_hal again")
        else:
            yield Finding(section, folder, "ok", str(place.resolve()))
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    text = f"{threads} of torch, {cores} cores allowed, {torch.backends.cpu.get_cpu_capability()}"
    if threads > cores:
        text += f"; OMP_NUM_THREADS={cores} would stop them from waiting for each other"
    yield Finding(section, "threads", "warning" if threads > cores else "ok", text)
    cache = env.CACHE.read()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        yield Finding(section, "cache", "ok", str(cache))
    else:
        text = f"{place} is no folder to write to; set {env.CACHE.name} to one"
        yield Finding(section, "cache", "warning", text)


def _environment() -> Iterator[Finding]:
    """Every variable, and every DSA_HAL_ name that is none, which may be a typing error."""
    section = "environment"
    for variable in env.VARIABLES:
        given = os.environ.get(variable.name, "").strip()
        text = given or f"{variable.default or 'empty'} (default)"
        try:
            variable.read()
            yield Finding(section, variable.name, "ok", text)
        except DsaHalError as error:
            yield Finding(section, variable.name, "broken", str(error))
    known = {variable.name for variable in env.VARIABLES}
    for name in sorted(n for n in os.environ if n.startswith("DSA_HAL_") and n not in known):
        yield Finding(
            section, name, "warning", f"{os.environ[name]!r} is set, but there is no such variable"
        )


def _backends() -> Iterator[Finding]:
    for name in packages():
        answer = probe(name)
        count = len(implements(name) & set(OPS))
        has = f"implements {count} of {len(OPS)} ops"
        if isinstance(answer, Target):
            yield Finding("backends", name, "ok", f"{answer} {answer.name}, {has}")
        else:
            yield Finding("backends", name, "absent", f"{answer}; {has}")


def _libraries() -> Iterator[Finding]:
    """What the libraries of present backends lack of what implementations would call of them, and
    what serves instead: a finding per such function. A backend that can tell says so (`missing` of
    its package)."""
    section = "libraries"
    for name, (home, *_) in packages().items():
        target, package = probe(name), importlib.import_module(home)
        if not isinstance(target, Target) or not hasattr(package, "missing"):
            continue
        absent: dict[str, str] = package.missing()
        if not absent:
            yield Finding(section, name, "ok", "they have every function that is called")
            continue
        with use(target=target):
            passed = [found for op in OPS.values() for found in _passed_over(op)]
        for function, reason in absent.items():
            instead = dict.fromkeys(served for why, served in passed if reason in why)
            text = "; ".join([reason, *instead])
            yield Finding(section, f"{name} {function}", "warning", text)


def _passed_over(op: Op[..., Any]) -> Iterator[tuple[str, str]]:
    """For each implementation that refuses a case: why, and what serves instead."""
    for case in op.cases:
        verdicts = selection().verdicts(op, (), case.make(op.inputs, "meta"))
        served = next((v.impl.label for v in verdicts if v.question == "ok"), "nothing")
        for verdict in verdicts:
            if verdict.question == "shape":
                yield verdict.reason, f"{op.name} is served by {served}"


def _self_test(backend: str | None) -> Iterator[Finding]:
    """A finding per family of ops on the target in force."""
    section = "self-test"
    try:
        with choose.target(backend) as target:
            state = "absent" if target.absent else "ok"
            yield Finding(section, "target", state, target.absent or f"{target} {target.name}")
            families: dict[str, list[Op[..., Any]]] = {}
            for op in OPS.values():
                families.setdefault(op.family, []).append(op)
            for family, ops in families.items():
                yield _family(section, family, ops)
    except DsaHalError as error:  # the environment's own choice fails, above all
        yield Finding(section, "target", "broken", str(error))


def _family(section: str, family: str, ops: list[Op[..., Any]]) -> Finding:
    wrong, works, nobody = [], [], []
    for op in ops:
        case = smallest(op)
        serving = [v.impl for v in selection().verdicts(op) if v.question == "ok"]
        serving = [i for i in serving if i.why_not(**case.make(op.inputs, "meta")) is None][:1]
        if not serving:
            nobody.append(op.name)
            continue
        if selection().target.absent:
            works.append(f"{op.name} by {serving[0].name}")
            continue
        outcome = attempt(Row(op, serving[0], case))
        if outcome.status == "ok":
            works.append(op.name)
        else:
            wrong.append(f"{op.name} {serving[0].label}, case {case.name}: {outcome.detail}")
    text = "; ".join(wrong) or ", ".join(works)
    if nobody:
        text += f"{'; ' if text else ''}not served here: {', '.join(nobody)}"
    state = "broken" if wrong else "ok" if works and not selection().target.absent else "absent"
    return Finding(section, family, state, text)
