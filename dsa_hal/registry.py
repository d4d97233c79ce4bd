"""Ops, implementations, and the choice between them.

An `Op` is declared by its plain-torch fp32 reference, a `Composite` by a body written with other
ops. Implementations attach from `backends/<backend>/<op>.py`, a file that is imported when the op is
first selected. `select` answers for one call, `bind` once for good. Four questions are kept apart,
and each refusal says which one failed: importable? device? promise? shape?
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic, ParamSpec, TypeVar

from packaging.requirements import Requirement

from dsa_hal import env, log
from dsa_hal.case import Case, Cost, Inputs
from dsa_hal.check import Check
from dsa_hal.errors import BadInput, ConfigError, DsaHalError
from dsa_hal.target import REFERENCE, Target, detect, implements, packages

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op[..., Any]] = {}

DETERMINISTIC = "deterministic"
"""The promise that repeats on the same device and inputs are bitwise equal."""


@dataclass(frozen=True, slots=True)
class Impl(Generic[P, R]):
    """One implementation of one op, and what it states about itself.

    arch      architectures it runs on; empty = all of its backend
    needs     packages that must be importable, as requirement strings ("flash-mla>=1.0")
    rank      the higher is asked first; never a statement about ability
    promises  "deterministic", "ties=lower", "lse=natural": what a request may insist on
    why_not   reads shapes, dtypes and plain arguments; None = it can run, else the sentence why not
    """

    op: str
    backend: str
    name: str
    fn: Callable[P, R]
    why_not: Callable[P, str | None]
    arch: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    rank: int = 0
    promises: frozenset[str] = frozenset({DETERMINISTIC})

    @property
    def label(self) -> str:
        return f"{self.backend}/{self.name}"


@dataclass(frozen=True)
class Verdict:
    """What selection says of one implementation: the question that failed, and the sentence."""

    impl: Impl[..., Any]
    question: str  # "importable" | "device" | "promise" | "shape" | "ok"
    reason: str = ""


class Unsupported(DsaHalError):
    """No implementation can serve a request; the message lists every candidate with its sentence."""

    def __init__(self, op: str, target: Target, verdicts: Sequence[Verdict], hint: str = "") -> None:
        self.op, self.target, self.verdicts = op, target, tuple(verdicts)
        reasons = "; ".join(f"{v.impl.label}: {v.reason}" for v in verdicts if v.question != "ok")
        super().__init__(f"{op} on {target}: {reasons or hint or 'no implementation'}")


def _can_run(*_: Any, **__: Any) -> str | None:
    return None


class Op(Generic[P, R]):
    """An abstract op: its signature and docstring, and the reference that defines it.

    reference  plain torch, fp32 inside; also the shape function, so it never reads tensor data
    version    of the contract; implementations state the one they were written for
    constant   axes that predicates may read (head dims, k, page size)
    variable   axes that only tuning may read (tokens, context, batch)
    inputs     makes the arguments of one case from its axes; works on the meta device too
    cases      small awkward shapes, the traps, and the model's true shapes
    check      compares an implementation's outputs with the reference's
    cost       FLOP and bytes of one call
    outputs    names of the results; arguments in `mutates` are results as well
    invalid    why arguments are no request at all, whoever implements it: raised as BadInput
    requests   promises that these arguments insist on
    requires   promises that the contract itself insists on
    unread     argument -> mask of elements that must not influence any result
    """

    kind = "primitive"

    def __init__(
        self,
        reference: Callable[P, R],
        *,
        version: int,
        constant: Sequence[str],
        variable: Sequence[str],
        inputs: Callable[..., Inputs],
        cases: Sequence[Case],
        check: Check,
        cost: Callable[P, Cost],
        outputs: Sequence[str] = ("out",),
        mutates: Sequence[str] = (),
        invalid: Callable[P, str | None] = _can_run,
        requests: Callable[P, frozenset[str]] | None = None,
        requires: Sequence[str] = (),
        unread: Callable[P, Mapping[str, Any]] | None = None,
    ) -> None:
        self.name: str = reference.__name__
        self.family: str = reference.__module__.rpartition(".")[2]
        self.__doc__ = reference.__doc__
        self.__wrapped__ = reference
        self.reference = reference
        self.version, self.constant, self.variable = version, tuple(constant), tuple(variable)
        self.inputs, self.cases, self.check, self.cost = inputs, tuple(cases), check, cost
        self.outputs, self.mutates = tuple(outputs), tuple(mutates)
        self.invalid, self.requests, self.unread = invalid, requests, unread
        self.requires = frozenset(requires)
        self._impls: dict[str, Impl[P, R]] = {}
        for companion in (cost, invalid, requests, unread):
            if companion not in (None, _can_run):
                _same_arguments(self.name, reference, companion)  # type: ignore[arg-type]
        if OPS.setdefault(self.name, self) is not self:
            raise ValueError(
                f"op {self.name} is declared twice; import it as dsa_hal.ops.{self.family}.{self.name}"
            )

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name} v{self.version}>"

    # -- registering ---------------------------------------------------------------------------

    def impl(
        self,
        backend: str,
        name: str,
        *,
        contract: int,
        why_not: Callable[P, str | None] = _can_run,
        arch: Sequence[str] = (),
        needs: Sequence[str] = (),
        rank: int = 0,
        promises: Sequence[str] = (DETERMINISTIC,),
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function as an implementation.

        Raises ConfigError when the contract version, the argument names, their kinds or their
        defaults differ from the op's: out-of-tree code fails here, not inside a call.
        """

        def register(fn: Callable[P, R]) -> Callable[P, R]:
            label = f"{self.name}: {backend}/{name}"
            if contract != self.version:
                raise ConfigError(
                    f"{label} was written for contract {contract}, this op has {self.version};"
                    " install a version of that backend made for this dsa_hal"
                )
            if f"{backend}/{name}" in self._impls or name in ("reference", "composite"):
                raise ConfigError(f"{label} is registered twice or uses a reserved name")
            _same_arguments(label, self.reference, fn)
            if why_not is not _can_run:
                _same_arguments(f"{label}, why_not", self.reference, why_not)
            self._impls[f"{backend}/{name}"] = Impl(
                self.name, backend, name, fn, why_not,
                tuple(arch), tuple(needs), rank, frozenset(promises),
            )  # fmt: skip
            return fn

        return register

    def implementations(self, target: Target) -> tuple[Impl[P, R], ...]:
        """Everything registered for a target's backend, best rank first; imports this op's files."""
        if target.backend != REFERENCE.backend:
            for package in packages()[target.backend]:
                _load(f"{package}.{self.name}")
        here = [i for i in self._impls.values() if i.backend == target.backend]
        return (*sorted(here, key=lambda i: -i.rank), *self._always())

    def _always(self) -> tuple[Impl[P, R], ...]:
        return (Impl(self.name, "reference", "reference", self.reference, _can_run,
                     promises=frozenset({DETERMINISTIC, *self.requires, "ties=lower"})),)  # fmt: skip

    # -- choosing ------------------------------------------------------------------------------

    def select(self, *args: P.args, **kwargs: P.kwargs) -> Impl[P, R]:
        """The implementation that serves these arguments (tensor data is not read; meta will do).

        Raises BadInput for arguments that break the op's contract, Unsupported if nobody serves them.
        """
        if (wrong := self.invalid(*args, **kwargs)) is not None:
            raise BadInput(f"{self.name}: {wrong}")
        wanted = self.requests(*args, **kwargs) if self.requests is not None else None
        chosen = selection()
        for impl in chosen.candidates(self):
            if wanted and not wanted <= impl.promises:
                continue
            if impl.why_not(*args, **kwargs) is None:
                return impl
        verdicts = chosen.verdicts(self, args, kwargs)
        raise Unsupported(self.name, chosen.target, verdicts, chosen.hint(self))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.select(*args, **kwargs).fn(*args, **kwargs)

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """The function that serves arguments like these: `select` once, then call it directly."""
        return self.select(*args, **kwargs).fn


class Composite(Op[P, R]):
    """An op whose meaning is a body written with other ops (`uses`). Every backend that serves those
    has it; a backend may register one fused implementation, which then ranks before the body."""

    kind = "composite"

    def __init__(self, body: Callable[P, R], *, uses: Sequence[Op[..., Any]], **facts: Any) -> None:
        self.body, self.uses = body, tuple(uses)

        def reference(*args: P.args, **kwargs: P.kwargs) -> R:
            with use(backend=REFERENCE.backend):
                return body(*args, **kwargs)

        reference.__dict__.update(__wrapped__=body)
        for name in ("__name__", "__module__", "__doc__"):
            setattr(reference, name, getattr(body, name))
        super().__init__(reference, **facts)

    def _always(self) -> tuple[Impl[P, R], ...]:
        made_of = Impl(self.name, "any", "composite", self.body, _can_run, rank=-1,
                       promises=frozenset({DETERMINISTIC, *self.requires, "ties=lower"}))  # fmt: skip
        return (made_of, *super()._always())


def op(**facts: Any) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorator: the function below is the fp32 reference of an op. `facts` as in `Op`."""
    return lambda reference: Op(reference, **facts)


def composite(**facts: Any) -> Callable[[Callable[P, R]], Composite[P, R]]:
    """Decorator: the function below is the body of a composite op. `facts` as in `Composite`."""
    return lambda body: Composite(body, **facts)


# -- the state of selection --------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What is chosen from: a target, implementations named per op, and a wish for determinism."""

    target: Target
    named: Mapping[str, str] = field(default_factory=dict)
    deterministic: bool = False
    logging: bool = False
    _candidates: dict[str, tuple[Impl[..., Any], ...]] = field(default_factory=dict, compare=False)

    def candidates(self, op: Op[P, R]) -> tuple[Impl[P, R], ...]:
        """Implementations whose static facts fit, in order of preference; worked out once per op."""
        try:
            return self._candidates[op.name]
        except KeyError:
            pass
        fit = [v.impl for v in self._static(op) if v.question == "ok"]
        if self.logging:
            fit = [replace(i, fn=log.logged(f"{op.name} {i.label}", i.fn)) for i in fit]
        return self._candidates.setdefault(op.name, tuple(fit))

    def verdicts(self, op: Op[P, R], args: Any = None, kwargs: Any = None) -> list[Verdict]:
        """A verdict per implementation; with arguments, the shape question is asked as well."""
        verdicts = self._static(op)
        if args is None:
            return verdicts
        wanted = op.requests(*args, **kwargs) if op.requests is not None else frozenset()
        asked = []
        for v in verdicts:
            if v.question == "ok" and not wanted <= v.impl.promises:
                v = Verdict(v.impl, "promise", _broken(wanted, v.impl))
            if v.question == "ok" and (reason := v.impl.why_not(*args, **kwargs)) is not None:
                v = Verdict(v.impl, "shape", reason)
            asked.append(v)
        return asked

    def hint(self, op: Op[..., Any]) -> str:
        """Why there may be no verdict at all."""
        if op.name not in self.named and op.name not in implements(self.target.backend):
            return (
                f"backend {self.target.backend} has no implementation of it in this version;"
                f" DSA_HAL_BACKEND=cpu computes on the processor, DSA_HAL_IMPL={op.name}=reference"
                " runs the plain fp32 reference"
            )
        return ""

    def _static(self, op: Op[P, R]) -> list[Verdict]:
        registered = op.implementations(self.target)
        name = self.named.get(op.name)
        if name is not None:
            found = [i for i in registered if i.name == name]
            if not found:
                known = ", ".join(i.name for i in registered)
                raise ConfigError(
                    f"{op.name} has no implementation {name!r} on {self.target}; known are {known}"
                )
            return [self._judge(op, i) for i in found]
        if self.target.backend != REFERENCE.backend:  # nobody gets the reference unasked
            registered = tuple(i for i in registered if i.name != "reference")
        return [self._judge(op, i) for i in registered]

    def _judge(self, op: Op[P, R], impl: Impl[P, R]) -> Verdict:
        for need in impl.needs:
            if (reason := _missing(need)) is not None:
                return Verdict(impl, "importable", reason)
        if impl.arch and self.target.arch not in impl.arch:
            known = ", ".join(impl.arch)
            return Verdict(impl, "device", f"made for {known}, this is {self.target.arch}")
        if impl.name == "composite" and isinstance(op, Composite):
            for part in op.uses:
                if not self.candidates(part):
                    return Verdict(impl, "device", f"needs {part.name}, which nothing serves here")
        must = op.requires | ({DETERMINISTIC} if self.deterministic else frozenset())
        if not must <= impl.promises:
            return Verdict(impl, "promise", _broken(must, impl))
        return Verdict(impl, "ok")


_scoped: ContextVar[Selection | None] = ContextVar("dsa_hal_selection", default=None)


def selection() -> Selection:
    """The selection in force: the innermost `use()` of this context, else the environment's."""
    return _scoped.get() or _from_environment()


@cache
def _wishes() -> Selection:
    """What the environment says apart from the device, which need not be present to be left alone."""
    named = env.IMPL.read()
    _known_ops(named, env.IMPL.name)
    logging = env.LOG.read() == "ops"
    if logging:
        log.enable()
    return Selection(REFERENCE, named, env.DETERMINISTIC.read(), logging)


@cache
def _from_environment() -> Selection:
    wishes = _wishes()
    return Selection(
        detect(env.BACKEND.read()), wishes.named, wishes.deterministic, wishes.logging
    )


@contextmanager
def use(
    *, backend: str | None = None, deterministic: bool | None = None, **named: str
) -> Iterator[Selection]:
    """Choose within a `with` block (and this thread or task): a backend ("reference" is one too),
    determinism, and implementations by op name, as in `use(sparse_mla="torch")`.

    Explicit choices are strict: what is named runs or raises. Blocks nest; the inner one wins.
    """
    _known_ops(named, "use()")
    if backend is None:
        outer = selection()
        named = {**outer.named, **named}
    else:  # names of implementations mean nothing on another backend, so none are kept
        target = REFERENCE if backend == REFERENCE.backend else detect(backend)
        outer = replace(_scoped.get() or _wishes(), target=target)
    wish = outer.deterministic if deterministic is None else deterministic
    inner = Selection(outer.target, named, wish, outer.logging)
    token = _scoped.set(inner)
    try:
        yield inner
    finally:
        _scoped.reset(token)


def current() -> Target:
    """The target in force."""
    return selection().target


def explain(op_: Op[P, R], *args: P.args, **kwargs: P.kwargs) -> list[Verdict]:
    """A verdict per implementation of an op on the target in force, best rank first. The first "ok"
    is the one that serves; without arguments only the static questions are asked."""
    asked = (args, kwargs) if args or kwargs else (None, None)
    return selection().verdicts(op_, *asked)


# -- small print -------------------------------------------------------------------------------


def _known_ops(named: Mapping[str, str], where: str) -> None:
    for name in named:
        if name not in OPS:
            raise ConfigError(f"{where}: unknown op {name!r}; known are {', '.join(sorted(OPS))}")


def _broken(wanted: frozenset[str], impl: Impl[..., Any]) -> str:
    return f"does not promise {', '.join(sorted(wanted - impl.promises))}, which was asked for"


@cache
def _missing(need: str) -> str | None:
    requirement = Requirement(need)
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed (needs {need})"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found} is installed, needs {need}"
    return None


@cache
def _load(module: str) -> None:
    """Import an op's file of a backend. No such file means "not implemented here"; an import error
    inside the file is an error."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise


def _same_arguments(
    label: str, reference: Callable[..., Any], other: Callable[..., Any]
) -> None:
    """Refuse a function whose argument names, kinds or defaults differ from the reference's."""

    def shape(fn: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(fn).parameters.values()]

    if shape(reference) != shape(other):
        raise ConfigError(
            f"{label}: arguments {inspect.signature(other)} differ from the op's"
            f" {inspect.signature(reference)}"
        )
