"""Cases by named axes, the makers of their inputs, and the twists that every case is run under."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Any]
"""Keyword arguments of one op call."""


class Cost(NamedTuple):
    """What one call must do at least: floating-point operations, and bytes read plus written."""

    flop: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """One row of the matrix: a name and its axes (sizes, and plain options of the op).

    model  the shape is the true model's, so `bench` times it
    traps  numbers of the known traps that this case springs (the list stands in CONTRIBUTING.md)
    """

    name: str
    axes: Mapping[str, Any]
    model: bool = False
    traps: tuple[int, ...] = ()
    seed: int = 0

    def make(self, inputs: Callable[..., Inputs], device: str | torch.device = "cpu") -> Inputs:
        """The case's arguments on `device`; the same numbers on every device, none on "meta"."""
        return inputs(Maker(device, self.seed), **self.axes)


def case(
    name: str, *, model: bool = False, traps: Sequence[int] = (), seed: int = 0, **axes: Any
) -> Case:
    """A Case with its axes as keywords: `case("odd", tokens=63, dim=576)`."""
    return Case(name, axes, model, tuple(traps), seed)


@dataclass
class Maker:
    """Source of a case's inputs. Numbers come from the CPU generator, so that every device sees the
    same; on "meta" only shapes are made. `pick` is for plain numbers (lengths, positions)."""

    device: str | torch.device
    seed: int
    pick: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        self.pick = random.Random(self.seed)
        self._generator = torch.Generator().manual_seed(self.seed)

    @property
    def meta(self) -> bool:
        return torch.device(self.device).type == "meta"

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        if self.meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        made = torch.randn(shape, generator=self._generator) * scale
        return made.to(dtype).to(self.device)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        if self.meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        made = torch.randint(low, high, shape, generator=self._generator, dtype=torch.int64)
        return made.to(dtype).to(self.device)

    def permutation(self, count: int, *, dtype: torch.dtype = torch.int32) -> Tensor:
        if self.meta:
            return torch.empty(count, dtype=dtype, device="meta")
        return torch.randperm(count, generator=self._generator).to(dtype).to(self.device)

    def tensor(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)


def run(fn: Callable[..., Any], inputs: Inputs, mutates: Sequence[str]) -> tuple[Tensor, ...]:
    """Call `fn` and return its results as one flat tuple, arguments that it writes included."""
    answer = fn(**inputs)
    if answer is None:
        results: tuple[Tensor, ...] = ()
    elif isinstance(answer, Tensor):
        results = (answer,)
    else:
        results = tuple(answer)
    return (*results, *(inputs[name] for name in mutates))


# -- twists: the same case, told differently --------------------------------------------------


def tree_map(change: Callable[[str, Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`inputs` with every tensor replaced, those inside lists (packed weights) included."""

    def each(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(name, value)
        if isinstance(value, list):
            return [each(name, item) for item in value]
        return value

    return {name: each(name, value) for name, value in inputs.items()}


def copied(inputs: Inputs) -> Inputs:
    """Fresh copies of all tensors, so that a call cannot spoil another's inputs."""
    return tree_map(lambda _, t: t.clone(), inputs)


def strided(inputs: Inputs) -> Inputs:
    """Every tensor as a view with gaps: rows apart, and not at the start of its memory. The last
    axis stays dense, as in every tensor that a slice of a larger one gives."""

    def view(_: str, t: Tensor) -> Tensor:
        if t.dim() == 0 or t.numel() == 0:
            return t.clone()
        shape = (t.shape[0] + 1, *t.shape[1:])
        if t.dim() > 1:
            shape = (*shape[:-1], shape[-1] + 16)
        inside = t.new_zeros(shape)[1:]
        if t.dim() > 1:
            inside = inside[..., : t.shape[-1]]
        inside.copy_(t)
        return inside

    return tree_map(view, inputs)


def poison(t: Tensor, mask: Tensor) -> Tensor:
    """A copy of `t` with NaN (bytes and FP8: 0xFF; integers: the largest value) where `mask` is
    set."""
    t = t.clone()
    if t.dtype == torch.float8_e4m3fn:
        t.view(torch.uint8)[mask] = 0xFF
    elif t.is_floating_point():
        t[mask] = float("nan")
    else:
        t[mask] = torch.iinfo(t.dtype).max
    return t


def poisoned(inputs: Inputs, unread: Mapping[str, Tensor]) -> Inputs:
    """NaN in everything that must not be read; `unread` maps argument names to masks."""
    return tree_map(
        lambda name, t: poison(t, unread[name]) if name in unread else t.clone(), inputs
    )


@contextmanager
def dirty_memory() -> Iterator[None]:
    """Inside the block, uninitialised memory is NaN (or a huge integer), so that a result that was
    never written shows itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Dirty(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if "empty" in func.name() and isinstance(out, Tensor) and out.numel():
                everything = torch.ones(out.shape, dtype=torch.bool, device=out.device)
                out.copy_(poison(torch.zeros_like(out), everything))
            return out

    with Dirty():
        yield


FENCE = 64
"""Elements of sentinel on either side of a fenced tensor."""


@dataclass
class Fenced:
    """Inputs that lie between sentinels. After a call, `broken()` names every tensor whose fence
    was written, and every input that changed though the op does not say it mutates it."""

    inputs: Inputs
    mutates: Sequence[str]
    _walls: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    _before: Inputs = field(default_factory=dict)

    @classmethod
    def around(cls, inputs: Inputs, mutates: Sequence[str]) -> Fenced:
        fenced = cls({}, mutates)

        def build(name: str, t: Tensor) -> Tensor:
            flat = t.contiguous().view(torch.uint8).reshape(-1) if t.numel() else t.new_empty(0)
            if not t.numel() or t.dim() == 0:
                return t.clone()
            wall = FENCE * t.element_size()
            room = torch.full((flat.numel() + 2 * wall,), 0xA5, dtype=torch.uint8, device=t.device)
            room[wall : wall + flat.numel()] = flat
            fenced._walls += [(name, room[:wall], room[wall + flat.numel() :])]
            return room[wall : wall + flat.numel()].view(t.dtype).view(t.shape)

        fenced.inputs = tree_map(build, inputs)
        fenced._before = copied(fenced.inputs)
        return fenced

    def broken(self) -> list[str]:
        found = [
            f"memory beside {name} was written"
            for name, *walls in self._walls
            if any(bool((wall != 0xA5).any()) for wall in walls)
        ]
        found += [
            f"{name} was changed, but is not in mutates"
            for name, value in self.inputs.items()
            if name not in self.mutates and not _same_bytes(value, self._before[name])
        ]
        return found


def _same_bytes(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.numel() == 0 or bool(
            (a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)).all()
        )
    if isinstance(a, list):
        return all(map(_same_bytes, a, b))
    return bool(a == b)


__all__ = [
    "Case", "Cost", "Fenced", "Inputs", "Maker", "case", "copied", "dirty_memory",
    "poison", "poisoned", "run", "strided", "tree_map",
]  # fmt: skip
