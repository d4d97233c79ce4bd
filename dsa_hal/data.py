"""Numbers that an op's arguments may hold, where a kernel trusts them: indices, counts, ranges.

Looking at them stalls a device, so that implementations for one do not; DSA_HAL_CHECK=1 and
`use(checked=True)` look before every call, and raise BadInput that names the number.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dsa_hal.case import Inputs
from dsa_hal.errors import BadInput

P = ParamSpec("P")
R = TypeVar("R")

Mask = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Whole:
    """Whole numbers of one argument: from `lowest` to below `limit(inputs)`.

    what   what they count, and what -1 means if it is allowed
    where  mask of the entries that are read at all, broadcast to the argument; None = every one
    """

    argument: str
    limit: Callable[[Inputs], int]
    what: str
    lowest: int = 0
    where: Mask | None = None

    def problem(self, inputs: Inputs) -> str | None:
        """The first number that is out of place, as a sentence."""
        numbers = inputs[self.argument]
        if numbers is None or not numbers.numel():
            return None
        limit = min(self.limit(inputs), torch.iinfo(numbers.dtype).max)
        wrong = (numbers < self.lowest) | (numbers >= limit)
        if self.where is not None:
            wrong &= self.where(inputs)
        if not bool(wrong.any()):
            return None
        at = wrong.nonzero()[0].tolist()
        return (
            f"{self.argument}{at} is {int(numbers[tuple(at)])};"
            f" expected {self.what}, {self.lowest} to {limit - 1}"
        )


RULES: dict[str, tuple[Whole, ...]] = {}
"""What is looked at, by op."""


def looked_at(name: str, reference: Callable[..., Any], fn: Callable[P, R]) -> Callable[P, R]:
    """`fn` behind a look at the data of each call."""
    rules = RULES.get(name, ())
    signature = inspect.signature(inspect.unwrap(reference))

    @functools.wraps(fn)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for rule in rules:
            if (problem := rule.problem(bound.arguments)) is not None:
                raise BadInput(f"{name}: {problem}")
        return fn(*args, **kwargs)

    return checked if rules else fn


def misplaced(inputs: Inputs, device: str | None) -> str | None:
    """Where tensors of one call lie on several devices, or not on the one that computes: which."""
    found: dict[str, list[str]] = {}
    for name, value in inputs.items():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor):
                found.setdefault(tensor.device.type, []).append(name)
    if len(found) <= 1 and (device is None or device in found):
        return None
    where = "; ".join(f"{', '.join(dict.fromkeys(names))} on {at}" for at, names in found.items())
    return f"tensors lie on different devices than the backend's ({where}); expected all on" + (
        f" {device}" if device else " one"
    )


def columns_below(argument: str, lengths: str) -> Mask:
    """The leftmost `lengths` columns of each row of `argument`; all, if no lengths are given."""

    def mask(inputs: Inputs) -> Tensor:
        table, some = inputs[argument], inputs[lengths]
        column = torch.arange(table.shape[-1], device=table.device)
        ends = (
            torch.tensor(table.shape[-1], device=table.device) if some is None else some[..., None]
        )
        return torch.lt(column, ends)

    return mask
