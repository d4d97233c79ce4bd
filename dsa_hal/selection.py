"""What is chosen from, and by whose wish: the selection in force, `use()`, and the verdicts that
say why an implementation serves or does not.

Four questions are kept apart, and each refusal says which one failed: importable? device? promise?
shape?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from dsa_hal import data, env, log
from dsa_hal.autotune import store
from dsa_hal.autotune.store import Winner
from dsa_hal.errors import Absent, ConfigError, DsaHalError
from dsa_hal.target import REFERENCE, Target, detect, implements, named

if TYPE_CHECKING:
    from dsa_hal.registry import Impl, Op

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op[..., Any]] = {}
"""Every op declared so far, by name."""

DETERMINISTIC = "deterministic"
"""The promise that repeats on the same device and inputs are bitwise equal."""

COMPOSITE = "composite"
"""Name of the implementation that is a composite op's own body."""


@dataclass(frozen=True)
class Verdict:
    """What selection says of one implementation: the question that failed, and the sentence."""

    impl: Impl[..., Any]
    question: str  # "importable" | "device" | "promise" | "shape" | "ok"
    reason: str = ""


class Unsupported(DsaHalError):
    """No implementation can serve a request; the message holds every candidate's sentence."""

    def __init__(
        self, op: str, target: Target, verdicts: Sequence[Verdict], hint: str = ""
    ) -> None:
        self.op, self.target, self.verdicts = op, target, tuple(verdicts)
        reasons = [f"{v.impl.label}: {v.reason}" for v in verdicts if v.question != "ok"]
        super().__init__(f"{op} on {target}: {'; '.join(filter(None, (*reasons, hint)))}")


@dataclass(frozen=True)
class Selection:
    """What is chosen from: a target, implementations named per op, and wishes: for determinism, for
    a line per call, for a look at each call's data.

    answers  what was chosen: op -> facts of a call -> implementation; `Op.select` fills it
    """

    target: Target
    named: Mapping[str, str] = field(default_factory=dict)
    deterministic: bool = False
    logging: bool = False
    checked: bool = False
    _known: dict[str, tuple[tuple[Any, ...], tuple[Winner, ...]]] = field(
        default_factory=dict, compare=False
    )
    answers: defaultdict[str, dict[tuple[Hashable, ...], Any]] = field(
        default_factory=lambda: defaultdict(dict), compare=False
    )

    def candidates(self, op: Op[P, R]) -> tuple[tuple[Impl[P, R], ...], tuple[Winner, ...]]:
        """Implementations whose static facts fit, in order of preference, and what tuning knows of
        them (nothing where one is named explicitly). Worked out once per op."""
        try:
            return self._known[op.name]
        except KeyError:
            pass
        fit: list[Any] = [v.impl for v in self._static(op) if v.question == "ok"]
        fit = [self._scope(i) if i.name == COMPOSITE else i for i in fit]
        if self.checked:
            fit = [replace(i, fn=data.looked_at(op.name, op.reference, i.fn)) for i in fit]
        if self.logging:
            fit = [replace(i, fn=log.logged(f"{op.name} {i.label}", i.fn)) for i in fit]
        if self.target.absent:
            fit = [replace(i, fn=_refused(op.name, self.target)) for i in fit]
        winners: tuple[Winner, ...] = ()
        if op.name not in self.named and self.target.backend != REFERENCE.backend:
            names = {impl.name for impl in fit}
            tuned = store.winners(op.name, op.version, self.target)
            winners = tuple(w for w in tuned if not names.isdisjoint(w.us))
        return self._known.setdefault(op.name, (tuple(fit), winners))

    def _scope(self, impl: Impl[P, R]) -> Impl[P, R]:
        """A composite's body chooses its parts when it runs: let it choose from here, wherever it
        was bound and whatever is in force by then."""
        body = impl.fn

        def scoped(*args: P.args, **kwargs: P.kwargs) -> R:
            token = _scoped.set(self)
            try:
                return body(*args, **kwargs)
            finally:
                _scoped.reset(token)

        return replace(impl, fn=scoped)

    def verdicts(self, op: Op[..., Any], args: Any = None, kwargs: Any = None) -> list[Verdict]:
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
        """What to do where a backend does not implement an op."""
        backend = self.target.backend
        if op.name in self.named or backend == REFERENCE.backend or op.name in implements(backend):
            return ""
        what = "it" if implements(backend) else "any op"
        return (
            f"backend {backend} has no implementation of {what} in this version;"
            f" DSA_HAL_BACKEND=cpu computes on the processor, DSA_HAL_IMPL={op.name}=reference runs"
            " the plain fp32 reference"
        )

    def _static(self, op: Op[..., Any]) -> list[Verdict]:
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

    def _judge(self, op: Op[..., Any], impl: Impl[..., Any]) -> Verdict:
        for need in impl.needs:
            if (reason := _missing(need)) is not None:
                return Verdict(impl, "importable", reason)
        if impl.arch and self.target.arch not in impl.arch:
            known = ", ".join(impl.arch)
            return Verdict(impl, "device", f"made for {known}, this is {self.target.arch}")
        if impl.name == COMPOSITE:
            for part in op.uses:
                if not self.candidates(part)[0]:
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
    """What the environment says apart from the device, which need not be present to be left
    alone."""
    named = env.IMPL.read()
    _known_ops(named, env.IMPL.name)
    logging = env.LOG.read() == "ops"
    if logging:
        log.enable()
    return Selection(REFERENCE, named, env.DETERMINISTIC.read(), logging, env.CHECK.read())


@cache
def _from_environment() -> Selection:
    w = _wishes()
    backend, asked = env.BACKEND.read(), env.TARGET.read()
    if asked and backend not in ("auto", asked.partition(":")[0]):
        raise ConfigError(
            f"{env.TARGET.name}={asked} and {env.BACKEND.name}={backend} contradict each other;"
            " unset one of them"
        )
    return Selection(_chosen(backend), w.named, w.deterministic, w.logging, w.checked)


def _chosen(backend: str) -> Target:
    """The target of a backend, or of "auto": the environment's where it names one of that
    backend."""
    asked = env.TARGET.read()
    if asked and backend in ("auto", asked.partition(":")[0]):
        return named(asked)
    return detect(backend)


@contextmanager
def use(
    *, backend: str | None = None, target: Target | str | None = None,
    deterministic: bool | None = None, checked: bool | None = None, **impls: str,
) -> Iterator[Selection]:  # fmt: skip
    """Choose within a `with` block (and this thread or task): a backend ("reference" is one too) or
    a target ("rocm:gfx950", which need not be here to be asked about), determinism, a look at each
    call's data (`dsa_hal.data`), and implementations by op name, as in `use(sparse_mla="torch")`.

    Explicit choices are strict: what is named runs or raises. Blocks nest; the inner one wins.
    """
    _known_ops(impls, "use()")
    if backend is not None and target is None:
        target = REFERENCE if backend == REFERENCE.backend else _chosen(backend)
    if target is None:
        outer = selection()
        impls = {**outer.named, **impls}
    else:  # names of implementations mean nothing on another target, so none are kept
        target = named(target) if isinstance(target, str) else target
        outer = replace(_scoped.get() or _wishes(), target=target)
    wish = outer.deterministic if deterministic is None else deterministic
    look = outer.checked if checked is None else checked
    inner = Selection(outer.target, impls, wish, outer.logging, look)
    token = _scoped.set(inner)
    try:
        yield inner
    finally:
        _scoped.reset(token)


def current() -> Target:
    """The target in force."""
    return selection().target


def explain(op: Op[..., Any], *args: Any, **kwargs: Any) -> list[Verdict]:
    """A verdict per implementation of an op on the target in force, best rank first. The first "ok"
    is the one that serves; without arguments only the static questions are asked."""
    asked = (args, kwargs) if args or kwargs else (None, None)
    return selection().verdicts(op, *asked)


# -- small print -------------------------------------------------------------------------------


def _refused(op: str, target: Target) -> Any:
    """In the place of an implementation whose device is absent."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise Absent(f"{op}: {target.absent}")

    return refuse


def _known_ops(named: Mapping[str, str], where: str) -> None:
    for name in named:
        if name not in OPS:
            raise ConfigError(f"{where}: unknown op {name!r}; known are {', '.join(sorted(OPS))}")


def _broken(wanted: frozenset[str], impl: Impl[..., Any]) -> str:
    return f"does not promise {', '.join(sorted(wanted - impl.promises))}, which was asked for"


@cache
def _missing(need: str) -> str | None:
    """Why a need is not met; it may name alternatives, "a>=1 | b>=2", of which one is enough."""
    absent = [_absent(alternative.strip()) for alternative in need.split("|")]
    return None if None in absent else "; ".join(filter(None, absent))


def _absent(need: str) -> str | None:
    from packaging.requirements import Requirement  # here, as most processes never ask

    requirement = Requirement(need)
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed (needs {need})"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found} is installed, needs {need}"
    return None
