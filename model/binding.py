"""Choosing implementations once, when a model is built, and remembering which."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from dsa_hal.registry import Composite, Impl, Op
from dsa_hal.selection import explain

P = ParamSpec("P")
R = TypeVar("R")


class Binder:
    """Binds ops on arguments that have the model's shapes and no data.

    `served`: op -> label of the implementation that serves it. A composite that no backend fuses
    is listed with the ops it is made of, because those are what runs.
    """

    def __init__(self) -> None:
        self.served: dict[str, str] = {}

    def __call__(self, op: Op[P, R], *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """The function that serves calls like this one; Unsupported if there is none."""
        self._note(op, op.select(*args, **kwargs))
        return op.bind(*args, **kwargs)

    def later(self, op: Op[P, R], *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """The same, but chosen at the first call: for an op that this model may never call, and
        that nobody has to serve then."""
        chosen: list[Callable[P, R]] = []

        def call(*own: P.args, **options: P.kwargs) -> R:
            if not chosen:
                chosen.append(self(op, *args, **kwargs))
            return chosen[0](*own, **options)

        return call

    def _note(self, op: Op[..., R], impl: Impl[..., R]) -> None:
        before = self.served.get(op.name, "").split(", ")
        self.served[op.name] = ", ".join(dict.fromkeys((*filter(None, before), impl.label)))
        if impl.name == "composite" and isinstance(op, Composite):
            for part in op.uses:
                self._note(part, next(v.impl for v in explain(part) if v.question == "ok"))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor with a shape and no data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    """An int32 tensor with a shape and no data."""
    return meta(*shape, dtype=torch.int32)
