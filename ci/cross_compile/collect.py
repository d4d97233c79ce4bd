"""The programs to compile: each registered implementation is called with the matrix's cases on meta
tensors, and what it launches is noted."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import dsa_hal.ops  # noqa: F401  declares every op
from dsa_hal import selection
from dsa_hal.autotune import store
from dsa_hal.autotune.space import Space
from dsa_hal.backends.cuda import _nvrtc
from dsa_hal.backends.portable.launches import Launch, name_of, recorded
from dsa_hal.case import Case
from dsa_hal.registry import Impl, Op
from dsa_hal.selection import OPS, _missing, use
from dsa_hal.target import Target, stand_in

TARGETS = ("rocm:gfx950", "rocm:gfx942", "cuda:sm90")
KERNELS = ("portable", "cuda", "rocm")
"""Backends in whose `_kernels` programs stand."""

ELSEWHERE = ("cuda-bindings",)
"""Packages whose absence changes no launch here: CUDA C++ is passed over. An op called by another
does not count on them, so that what is launched is the same wherever this runs."""


@dataclass(frozen=True)
class Program:
    """One compiled program of one implementation, and the first case that launches it.

    required  a case of the model's true shape launches it, or a shipped configuration of one
    """

    target: Target
    op: str
    impl: str
    case: str
    launch: Launch
    required: bool

    @property
    def config(self) -> str:
        """What it is compiled for, in words: the kernel's constants, dtypes, and options."""
        switches = declared(self.launch)
        constants = [
            f"{name}={value}"
            for name, value in self.launch.constants().items()
            if name in switches and value not in ("None", "")
        ]
        types = [kind for kind in self.launch.signature.values() if kind.startswith("*")]
        options = self.launch.options
        chosen = [f"warps={options['num_warps']}", f"stages={options['num_stages']}"]
        for name in ("waves_per_eu", "matrix_instr_nonkdim"):
            if options.get(name):
                chosen.append(f"{name}={options[name]}")
        if options.get("kpack", 1) != 1:
            chosen.append(f"kpack={options['kpack']}")
        pointers = ",".join(kind.removeprefix("*") for kind in types)
        return " ".join([*constants, pointers, *chosen])


def declared(launch: Launch) -> set[str]:
    """Parameters that the kernel itself says are constants. A plain argument that happens to be 1
    is one to Triton too."""
    return {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}


class Collected:
    """Programs of one target, and what kept others from being seen."""

    def __init__(self, text: str) -> None:
        self.target = stand_in(text, "meta")
        self.programs: dict[tuple[Any, ...], Program] = {}
        self.problems: list[str] = []
        self.absent: set[str] = set()

    def add(self, op: Op[..., Any], impl: Impl[..., Any], case: Case, required: bool) -> None:
        inputs = case.make(op.inputs, "meta")
        if impl.why_not(**inputs) is not None:
            return
        with recorded(self.target.arch) as found:
            try:
                impl.fn(**inputs)
            except Exception as error:
                if any("triton" in need for need in impl.needs):
                    self.problems.append(
                        f"{self.target} {op.name} {impl.label}, case {case.name}: cannot be asked"
                        f" what it launches ({type(error).__name__}: {error})"
                    )
        for launch in found:
            key = (op.name, impl.name, launch.key())
            if key not in self.programs or (required and not self.programs[key].required):
                self.programs[key] = Program(
                    self.target, op.name, impl.label, case.name, launch, required
                )


def collect(text: str, ops: Iterable[str] = ()) -> Collected:
    """All programs of a target "backend:arch": first under the shipped tables, then, for the
    model's true shapes, under the best guess, which serves where no table does."""
    found = Collected(text)
    with ExitStack() as stack:
        stack.enter_context(use(target=found.target))
        stack.enter_context(_no_device(found.target))
        stack.enter_context(patch.object(selection, "_missing", _uncounted))
        stack.enter_context(_shipped_tables_alone())
        for op in [OPS[name] for name in ops] or OPS.values():
            for impl in op.implementations(found.target):
                if impl.backend != found.target.backend:
                    continue
                if impl.arch and found.target.arch not in impl.arch:
                    continue
                if absent := _absent(impl):
                    found.absent.add(f"{op.name} {impl.label}: {absent}")
                    continue
                for case in op.cases:
                    found.add(op, impl, case, case.model)
                with _no_tables():
                    for case in op.cases:
                        if case.model:
                            found.add(op, impl, case, True)
    return found


def _absent(impl: Impl[..., Any]) -> str | None:
    """A package it needs that is not here, such as another library's kernels."""
    needs = [need for need in impl.needs if not need.startswith(ELSEWHERE)]
    return next(filter(None, map(_missing, needs)), None)


def _uncounted(need: str) -> str | None:
    """Why an op that another calls may not use an implementation with this need."""
    return f"{need} is not counted on" if need.startswith(ELSEWHERE) else _missing(need)


def representative(programs: Iterable[Program]) -> list[Program]:
    """All required programs, and of the others as many as show every dtype of every argument and
    every way a switch of a kernel can stand (True, False, a dtype; not sizes) once more. The second
    AMD target has the required ones alone: its kernels are those of the first."""
    seen: set[tuple[Any, ...]] = set()
    chosen = []
    for program in sorted(programs, key=lambda p: not p.required):  # stable: cases in their order
        new = set() if str(program.target) == "rocm:gfx942" else _features(program) - seen
        if program.required or new:
            chosen.append(program)
            seen |= new
    return chosen


def _features(program: Program) -> set[tuple[Any, ...]]:
    launch = program.launch
    switches = declared(launch)
    values = {
        (name, value)
        for name, value in launch.constants().items()
        if name in switches and not value.lstrip("-").isdigit()
    }
    kinds = {(name, kind) for name, kind in launch.signature.items() if kind.startswith("*")}
    return {(launch.name, *feature) for feature in values | kinds}


# -- what is put in the place of a device -------------------------------------------------------


@contextmanager
def _no_device(target: Target) -> Iterator[None]:
    """CUDA C++ is neither compiled nor launched; torch is told how many processors there are."""
    nothing: Any = SimpleNamespace(launch=lambda *_, **__: None)
    nothing.kernel = lambda *_: nothing
    with ExitStack() as stack:
        processors = SimpleNamespace(multi_processor_count=getattr(target.limits, "processors", 1))
        about = patch.object(torch.cuda, "get_device_properties", lambda device=None: processors)
        stack.enter_context(about)
        for name, stub in (
            ("module", lambda *_, **__: nothing),
            ("address", lambda t: 0 if t is None else t.data_ptr()),
            ("tensor_map", lambda *_, **__: b""),
            ("available", lambda: None),
        ):
            stack.enter_context(patch.object(_nvrtc, name, stub))
        yield


@contextmanager
def _shipped_tables_alone() -> Iterator[None]:
    """What this user measured on a device does not count."""
    with patch.object(store, "user_file", lambda target: Path("/nonexistent")):
        store._tables.cache_clear()
        _forget()
        yield
    store._tables.cache_clear()
    _forget()


@contextmanager
def _no_tables() -> Iterator[None]:
    with patch.object(store, "configs", lambda space, target: ()):
        _forget()
        yield
    _forget()


def _forget() -> None:
    for space in Space.ALL.values():
        space.forget()


# -- what nobody launched -----------------------------------------------------------------------


def unseen(seen: Iterable[Program]) -> list[str]:
    """Kernels in the backends' `_kernels` that are no part of another and that no program is of."""
    from triton.runtime.jit import JITFunction

    names = {program.launch.name for program in seen}
    functions: dict[str, Any] = {}
    called: set[str] = set()
    for module in _modules():
        for function in vars(module).values():
            if isinstance(function, JITFunction) and function.__module__ == module.__name__:
                functions[name_of(function)] = function
                tree = ast.walk(function.parse())
                own = {node.id for node in tree if isinstance(node, ast.Name)}
                called |= own - {function.__name__}
    return sorted(
        name
        for name, function in functions.items()
        if name not in names and function.__name__ not in called
    )


def _modules() -> Iterator[Any]:
    for backend in KERNELS:
        try:
            home = importlib.import_module(f"dsa_hal.backends.{backend}._kernels")
        except ModuleNotFoundError:
            continue  # a backend that has none
        for found in pkgutil.iter_modules(home.__path__):
            yield importlib.import_module(f"{home.__name__}.{found.name}")
