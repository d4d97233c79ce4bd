"""Configurations of a kernel: which are legal for a call, and which one it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from dsa_hal.autotune import store

C = TypeVar("C")

NEAR = math.log(2)
"""How far the facts of a call may be from those of a measured one, as the sum of the logarithms of
their ratios, for its configuration to be taken: beyond, the best guess knows more."""


@dataclass(frozen=True)
class Space(Generic[C]):
    """The configurations of one kernel.

    name   "<op>/<implementation>", as in tuning tables; a kernel that several implementations or
           several launches of one share adds ":<which>"
    kind   a frozen dataclass of whole numbers: tile sizes, stages, warps
    legal  facts of a call (whole numbers by name: sizes, head counts, processors) -> the
           configurations that this kernel can run with, the best guess first; never empty
    """

    name: str
    kind: type[C]
    legal: Callable[..., Sequence[C]]
    _known: dict[tuple[int, ...], C] = field(default_factory=dict, compare=False)
    asked: dict[tuple[int, ...], dict[str, int]] = field(default_factory=dict, compare=False)
    """The facts of the calls since `forget`: how a search learns those of its call."""

    ALL: ClassVar[dict[str, Space[Any]]] = {}
    """Every space whose module has been imported, by name."""

    def __post_init__(self) -> None:
        if self.ALL.setdefault(self.name, self) is not self:
            raise ValueError(f"the space {self.name} is declared twice")

    def pick(self, **facts: int) -> C:
        """The configuration for a call with these facts: of those measured on this device the one
        with the nearest facts, or the best guess where none is near. A call site states the same
        facts in the same order every time."""
        at = tuple(facts.values())
        try:
            return self._known[at]
        except KeyError:
            self.asked[at] = facts
            return self._known.setdefault(at, self._measured(facts) or self.legal(**facts)[0])

    def _measured(self, facts: Mapping[str, int]) -> C | None:
        """The legal configuration measured nearest to these facts."""
        from dsa_hal.selection import selection  # which reads tables itself

        legal = {tuple(asdict(c).items()): c for c in self.legal(**facts)}  # type: ignore[call-overload]
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
        kept = self._known
        object.__setattr__(self, "_known", _Always(config))
        try:
            yield
        finally:
            object.__setattr__(self, "_known", kept)

    def forget(self) -> None:
        """Ask the tables anew at the next call of each kind, and note its facts in `asked`."""
        self._known.clear()
        self.asked.clear()


def _distance(known: Mapping[str, int], facts: Mapping[str, int]) -> float:
    return sum(abs(math.log((known[name] + 1) / (size + 1))) for name, size in facts.items())


class _Always(dict[tuple[int, ...], C]):
    """Answers every key with one value."""

    def __init__(self, value: C) -> None:
        super().__init__()
        self.value = value

    def __getitem__(self, key: tuple[int, ...]) -> C:
        return self.value
