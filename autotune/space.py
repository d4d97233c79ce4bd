"""Configurations of a kernel: which are legal for a call, and which one it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from dsa_hal.autotune import store
from dsa_hal.selection import selection
from dsa_hal.target import Target

C = TypeVar("C")

NEAR = math.log(2)
"""How far the facts of a call may be from those of a measured one, as the sum of the logarithms of
their ratios, for its configuration to be taken: beyond, the best guess knows more."""


class Launched:
    """Base of kinds: frozen dataclasses of whole numbers, of which some are options of Triton's
    compiler. Kinds of one backend add fields for what its compiler alone knows; 0 leaves it to the
    compiler."""

    OPTIONS: ClassVar[dict[str, str]] = {
        "warps": "num_warps",
        "stages": "num_stages",
        "waves": "waves_per_eu",
        "nonkdim": "matrix_instr_nonkdim",
        "kpack": "kpack",
    }
    """Field -> option."""

    @cached_property
    def options(self) -> dict[str, int]:
        """The options to launch with."""
        mine = vars(self)
        return {option: mine[name] for name, option in self.OPTIONS.items() if mine.get(name)}


@dataclass(frozen=True)
class Space(Generic[C]):
    """The configurations of one kernel.

    name   "<op>/<implementation>", as in tuning tables; a kernel that several implementations or
           several launches of one share adds ":<which>"
    kind   a frozen dataclass of whole numbers: tile sizes, stages, warps
    legal  facts of a call (whole numbers by name: sizes, head counts, processors) -> the
           configurations that this kernel can run with, the best guess first; never empty. Of
           backends that stated none of their own, see `on`
    """

    name: str
    kind: type[C]
    legal: Callable[..., Sequence[C]]
    _known: dict[Target, dict[tuple[int, ...], C]] = field(default_factory=dict, compare=False)
    _own: dict[str, Callable[..., Sequence[C]]] = field(default_factory=dict, compare=False)
    _forced: list[C] = field(default_factory=list, compare=False)
    asked: dict[tuple[int, ...], dict[str, int]] = field(default_factory=dict, compare=False)
    """The facts of the calls since `forget`: how a search learns those of its call."""

    ALL: ClassVar[dict[str, Space[Any]]] = {}
    """Every space whose module has been imported, by name."""

    def __post_init__(self) -> None:
        if self.ALL.setdefault(self.name, self) is not self:
            raise ValueError(f"the space {self.name} is declared twice")

    def on(self, backend: str, legal: Callable[..., Sequence[C]]) -> Space[C]:
        """State a backend's own configurations for a kernel that several share: called with what
        the backend states of the target in force (`Target.limits`), and the facts. Its kind may be
        a class derived from this space's."""
        if self._own.setdefault(backend, legal) is not legal:
            raise ValueError(f"the space {self.name} has two lists for {backend}")
        return self

    def choices(self, **facts: int) -> Sequence[C]:
        """The configurations for a call with these facts on the target in force, the best guess
        first."""
        target = selection().target
        own = self._own.get(target.backend)
        return self.legal(**facts) if own is None else own(target.limits, **facts)

    def pick(self, **facts: int) -> C:
        """The configuration for a call with these facts: of those measured on this device the one
        with the nearest facts, or the best guess where none is near. A call site states the same
        facts in the same order every time."""
        if self._forced:
            return self._forced[-1]
        at, target = tuple(facts.values()), selection().target
        try:
            return self._known[target][at]
        except KeyError:
            self.asked[at] = facts
            known = self._known.setdefault(target, {})
            return known.setdefault(at, self._measured(facts) or self.choices(**facts)[0])

    def _measured(self, facts: Mapping[str, int]) -> C | None:
        """The legal configuration measured nearest to these facts."""
        legal = {tuple(asdict(c).items()): c for c in self.choices(**facts)}  # type: ignore[call-overload]
        fitting = [
            (_distance(known, facts), at, config)
            for at, (known, config) in enumerate(store.configs(self.name, selection().target))
            if known.keys() == facts.keys() and tuple(config.items()) in legal
        ]
        near = [entry for entry in fitting if entry[0] <= NEAR]
        return legal[tuple(min(near)[2].items())] if near else None

    @contextmanager
    def forced(self, config: C) -> Iterator[None]:
        """Inside the block every call takes `config`: how a search times one after another."""
        self._forced.append(config)
        try:
            yield
        finally:
            self._forced.pop()

    def forget(self) -> None:
        """Ask the tables anew at the next call of each kind, and note its facts in `asked`."""
        self._known.clear()
        self.asked.clear()


def _distance(known: Mapping[str, int], facts: Mapping[str, int]) -> float:
    return sum(abs(math.log((known[name] + 1) / (size + 1))) for name, size in facts.items())
