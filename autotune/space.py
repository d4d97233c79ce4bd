"""Configurations of a kernel: which are legal for a call, and which one it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

C = TypeVar("C")


@dataclass(frozen=True)
class Space(Generic[C]):
    """The configurations of one kernel.

    name   "<op>/<implementation>", as in tuning tables
    kind   a frozen dataclass of whole numbers: tile sizes, stages, warps
    legal  facts of a call (whole numbers by name: sizes, head counts, processors) -> the
           configurations that this kernel can run with, the best guess first; never empty
    """

    name: str
    kind: type[C]
    legal: Callable[..., Sequence[C]]
    _known: dict[tuple[int, ...], C] = field(default_factory=dict, compare=False)

    def pick(self, **facts: int) -> C:
        """The configuration for a call with these facts. A call site states the same facts in the
        same order every time."""
        at = tuple(facts.values())
        try:
            return self._known[at]
        except KeyError:
            return self._known.setdefault(at, self.legal(**facts)[0])

    @contextmanager
    def forced(self, config: C) -> Iterator[None]:
        """Inside the block every call takes `config`: how a search times one after another."""
        kept, always = dict(self._known), _Always(config)
        object.__setattr__(self, "_known", always)
        try:
            yield
        finally:
            object.__setattr__(self, "_known", kept)


class _Always(dict[tuple[int, ...], C]):
    """Answers every key with one value."""

    def __init__(self, value: C) -> None:
        super().__init__()
        self.value = value

    def __getitem__(self, key: tuple[int, ...]) -> C:
        return self.value
