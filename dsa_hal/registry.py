"""Ops and their implementations.

An `Op` is declared by its plain-torch fp32 reference, a `Composite` by a body written with other
ops. Implementations attach from `backends/<backend>/<op>.py`, a file that is imported when the op
is first selected. `select` answers for one call, `bind` once for good.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Generic, ParamSpec, TypeVar

from dsa_hal import data
from dsa_hal.autotune import store
from dsa_hal.autotune.store import Winner
from dsa_hal.case import Case, Cost, Inputs
from dsa_hal.check import Check
from dsa_hal.errors import BadInput, ConfigError
from dsa_hal.facts import Described, asking, described, facts_of
from dsa_hal.selection import (
    COMPOSITE,
    DETERMINISTIC,
    OPS,
    Selection,
    Unsupported,
    selection,
    use,
)
from dsa_hal.target import REFERENCE, Target, packages

P = ParamSpec("P")
R = TypeVar("R")

ANSWERS = 4096
"""Answers that selection remembers per op before it starts anew; growing contexts make many."""


@dataclass(frozen=True, slots=True)
class Impl(Generic[P, R]):
    """One implementation of one op, and what it states about itself.

    arch      architectures it runs on; empty = all of its backend
    needs     packages that must be importable, as requirement strings ("triton>=3.6"), several in
              one string if either will do ("flash-mla>=1.0 | sgl-flash-mla>=1.0")
    rank      the higher is asked first; never a statement about ability
    promises  "deterministic", "ties=lower", "lse=natural": what a request may insist on, or a model
              goes by ("varlen=native")
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


def _can_run(*_: Any, **__: Any) -> str | None:
    return None


class Op(Generic[P, R]):
    """An abstract op: its signature and docstring, and the reference that defines it.

    reference  plain torch, fp32 inside; also the shape function, so it never reads tensor data
    version    of the contract; implementations state the one they were written for
    constant   axes that predicates may read (head dims, k, page size)
    variable   axes that only tuning may read (tokens, context, batch), and where each is found in a
               call: "q[0]" is the size of argument q along its first axis, "max_len" a plain
               argument
    inputs     makes the arguments of one case from its axes; works on the meta device too
    cases      small awkward shapes, the traps, and the model's true shapes
    check      compares an implementation's outputs with the reference's
    cost       FLOP and bytes of one call
    outputs    names of the results; arguments in `mutates` are results as well
    invalid    why arguments are no request at all, whoever implements it: raised as BadInput; like
               every predicate it reads shapes, dtypes and plain arguments, never data or strides
    requests   promises that these arguments insist on
    requires   promises that the contract itself insists on
    unread     argument -> mask of elements that must not influence any result
    """

    kind = "primitive"
    uses: tuple[Op[..., Any], ...] = ()

    def __init__(
        self,
        reference: Callable[P, R],
        *,
        version: int,
        constant: Sequence[str],
        variable: Mapping[str, str],
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
        self._axes = _axes(reference, variable)
        self.inputs, self.cases, self.check, self.cost = inputs, tuple(cases), check, cost
        self.outputs, self.mutates = tuple(outputs), tuple(mutates)
        self.invalid, self.requests, self.unread = invalid, requests, unread
        self.requires = frozenset(requires)
        self._impls: dict[str, Impl[P, R]] = {}
        for companion in (cost, invalid, requests, unread):
            if companion not in (None, _can_run):
                _same_arguments(self.name, reference, companion)
        if OPS.setdefault(self.name, self) is not self:
            raise ValueError(
                f"op {self.name} is declared twice; import it from dsa_hal.ops.{self.family}"
            )

    @cached_property
    def _facts(self) -> Callable[P, tuple[Hashable, ...]]:
        return facts_of(inspect.unwrap(self.reference))

    @cached_property
    def _sizes(self) -> Callable[P, tuple[int, ...]]:
        return asking(inspect.unwrap(self.reference), self._axes)

    def sizes(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, int]:
        """The sizes of a call's variable axes."""
        return dict(zip(self.variable, self._sizes(*args, **kwargs), strict=True))

    @cached_property
    def described(self) -> Callable[P, Described]:
        """A function that says a call's shapes, dtypes and plain arguments in words."""
        return described(inspect.unwrap(self.reference))

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
            if f"{backend}/{name}" in self._impls or name in ("reference", COMPOSITE):
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
        """Everything registered for a target's backend, best rank first; imports this op's
        files."""
        if target.backend != REFERENCE.backend:
            for package in packages()[target.backend]:
                _load(f"{package}.{self.name}")
        here = [i for i in self._impls.values() if i.backend == target.backend]
        return (*sorted(here, key=lambda i: -i.rank), *self._always())

    def _always(self) -> tuple[Impl[P, R], ...]:
        return (self._all_promises("reference", "reference", self.reference),)

    def _all_promises(
        self, backend: str, name: str, fn: Callable[P, R], rank: int = 0
    ) -> Impl[P, R]:
        """An implementation that keeps whatever the op can be asked to keep."""
        promises = frozenset({DETERMINISTIC, "ties=lower", *self.requires})
        return Impl(self.name, backend, name, fn, _can_run, rank=rank, promises=promises)

    # -- choosing ------------------------------------------------------------------------------

    def select(self, *args: P.args, **kwargs: P.kwargs) -> Impl[P, R]:
        """The implementation that serves these arguments (tensor data is not read; meta will do).

        Raises BadInput for arguments that break the op's contract, Unsupported if nobody can serve.
        """
        chosen = selection()
        known: dict[Any, Impl[P, R]] = chosen.answers[self.name]
        facts = self._facts(*args, **kwargs)
        if facts not in known:
            if len(known) >= ANSWERS:
                known.clear()
            known[facts] = self._select(chosen, args, kwargs)
        return known[facts]

    def _select(self, chosen: Selection, args: Any, kwargs: Any) -> Impl[P, R]:
        if (wrong := self.invalid(*args, **kwargs)) is not None:
            raise BadInput(f"{self.name}: {wrong}")
        candidates, winners = chosen.candidates(self)
        fit = self._fit(candidates, args, kwargs)
        if not fit:
            verdicts = chosen.verdicts(self, args, kwargs)
            raise Unsupported(self.name, chosen.target, verdicts, chosen.hint(self))
        return _nearest(fit, winners, self.described(*args, **kwargs)) if winners else fit[0]

    def _fit(self, candidates: Sequence[Impl[P, R]], args: Any, kwargs: Any) -> list[Impl[P, R]]:
        """The implementations that can serve these arguments, best rank first."""
        wanted = self.requests(*args, **kwargs) if self.requests is not None else frozenset()
        return [
            i for i in candidates if wanted <= i.promises and i.why_not(*args, **kwargs) is None
        ]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the implementation that serves these arguments. A call like an earlier one takes the
        short way, without passing its arguments on to `select`."""
        try:
            impl: Impl[P, R] = selection().answers[self.name][self._facts(*args, **kwargs)]
        except KeyError:
            impl = self.select(*args, **kwargs)
        try:
            return impl.fn(*args, **kwargs)
        except (
            Exception
        ) as error:  # what a launcher says of a pointer to the wrong memory is no help
            bound = inspect.signature(inspect.unwrap(self.reference)).bind(*args, **kwargs)
            wrong = data.misplaced(bound.arguments, _device(selection().target))
            if wrong is None:
                raise
            raise BadInput(f"{self.name}: {wrong}") from error

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """The function that serves arguments like these: `select` once, then call it directly.
        Where tuning found different winners in different ranges of the variable axes, a function
        that looks up the range of each call."""
        first = self.select(*args, **kwargs)
        candidates, winners = selection().candidates(self)
        if winners:
            fit = self._fit(candidates, args, kwargs)
            able = {impl.name for impl in fit}
            if len({store.nearest([w], {}, able) for w in winners} - {None}) > 1:
                return self._by_range(fit, winners)
        return first.fn

    def _by_range(self, fit: Sequence[Impl[P, R]], winners: tuple[Winner, ...]) -> Callable[P, R]:
        by_range: dict[tuple[int, ...], Callable[P, R]] = {}
        powers = [f"({axis}).bit_length()" for axis in self._axes]
        range_of = asking(inspect.unwrap(self.reference), powers)

        def ranged(*args: P.args, **kwargs: P.kwargs) -> R:
            at = range_of(*args, **kwargs)
            fn = by_range.get(at)
            if fn is None:
                fn = by_range[at] = _nearest(fit, winners, self.described(*args, **kwargs)).fn
            return fn(*args, **kwargs)

        return ranged


Call = tuple["Op[..., Any]", Sequence[Any], Mapping[str, Any]]
"""An op and its arguments, of which only shapes, dtypes and plain values count."""


class Composite(Op[P, R]):
    """An op whose meaning is a body written with other ops (`uses`). Every backend that serves
    those has it; a backend may register one fused implementation, which then ranks before the
    body.

    asks  the calls of its parts that a backend may refuse though it has the part, like a cache in a
          layout that it does not know; the body refuses what they do
    """

    kind = "composite"

    def __init__(
        self,
        body: Callable[P, R],
        *,
        uses: Sequence[Op[..., Any]],
        asks: Callable[P, Sequence[Call]] | None = None,
        **facts: Any,
    ) -> None:
        self.body, self.uses, self.asks = body, tuple(uses), asks

        def reference(*args: P.args, **kwargs: P.kwargs) -> R:
            with use(backend=REFERENCE.backend):
                return body(*args, **kwargs)

        reference.__dict__.update(__wrapped__=body)
        for name in ("__name__", "__module__", "__doc__"):
            setattr(reference, name, getattr(body, name))
        super().__init__(reference, **facts)
        if asks is not None:
            _same_arguments(self.name, reference, asks)

    def _why_not(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        for part, given, options in self.asks(*args, **kwargs) if self.asks is not None else ():
            try:
                part.select(*given, **options)
            except Unsupported as error:
                reasons = [v.reason for v in error.verdicts if v.question != "ok"]
                return f"it needs {part.name}: {next(iter(reasons), error)}"
        return None

    def _always(self) -> tuple[Impl[P, R], ...]:
        made_of_parts = replace(
            self._all_promises("any", COMPOSITE, self.body, rank=-1), why_not=self._why_not
        )
        return (made_of_parts, *super()._always())


def op(**facts: Any) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorator: the function below is the fp32 reference of an op. `facts` as in `Op`."""
    return lambda reference: Op(reference, **facts)


def composite(**facts: Any) -> Callable[[Callable[P, R]], Composite[P, R]]:
    """Decorator: the function below is the body of a composite op. `facts` as in `Composite`."""
    return lambda body: Composite(body, **facts)


# -- small print -------------------------------------------------------------------------------


def _device(target: Target) -> str | None:
    """Where a target's tensors lie; the reference computes anywhere, an absent one nowhere."""
    return None if target.backend == REFERENCE.backend or target.absent else target.device


def _nearest(fit: Sequence[Impl[P, R]], winners: Sequence[Winner], call: Described) -> Impl[P, R]:
    """The fitting implementation that was fastest nearest to this call; without one, the best by
    rank."""
    by_name = {impl.name: impl for impl in fit}
    name = store.nearest(winners, call, by_name)
    return fit[0] if name is None else by_name[name]


def _axes(reference: Callable[..., Any], variable: Mapping[str, str]) -> list[str]:
    """The sizes of variable axes as expressions: "q[0]" becomes "q.shape[0]"."""
    names = _arguments(reference)[0]
    for axis, where in variable.items():
        if where.partition("[")[0] not in names:
            raise ValueError(f"{reference.__name__}: axis {axis} is sought in {where!r}")
    return [where.replace("[", ".shape[") for where in variable.values()]


@cache
def _load(module: str) -> None:
    """Import an op's file of a backend. No such file means "not implemented here"; an import error
    inside the file is an error."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise


def _same_arguments(label: str, reference: Callable[..., Any], other: Callable[..., Any]) -> None:
    """Refuse a function whose argument names, kinds or defaults differ from the reference's."""
    if _arguments(reference) != _arguments(other):
        raise ConfigError(
            f"{label}: arguments {inspect.signature(other)} differ from the op's"
            f" {inspect.signature(reference)}"
        )


def _arguments(fn: Callable[..., Any]) -> Any:
    """What two functions must share to take the same calls. Read off the code object, since
    hundreds of `inspect.signature` would be felt at import."""
    fn = inspect.unwrap(fn)
    code = getattr(fn, "__code__", None)
    if code is None:
        return inspect.signature(fn)
    count = code.co_argcount + code.co_kwonlyargcount
    variadic = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    defaults = fn.__defaults__, fn.__kwdefaults__
    return code.co_varnames[:count], code.co_argcount, variadic, *defaults
