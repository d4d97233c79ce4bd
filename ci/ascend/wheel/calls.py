"""Calls of torch_npu's ops, noted at the door through which the backend makes them:
`torch.ops.npu.<name>`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor

from dsa_hal.backends.npu._library import refusal

SHAPELESS = Path(__file__).with_name("shapeless.yaml")


class Refused(Exception):
    """The backend made a call that its own constraint table forbids."""


@dataclass(frozen=True)
class Call:
    """One call: the op's name, the arguments as the backend gave them, and what it returned."""

    op: str
    given: dict[str, Any]
    results: tuple[Any, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by the schema's names, defaults included."""
        declared = getattr(torch.ops.npu, self.op).default._schema.arguments
        return {a.name: self.given.get(a.name, a.default_value) for a in declared}


@cache
def shapeless() -> dict[str, str]:
    """Ops without a shape function -> the argument whose shape and dtype their result has."""
    return {op: entry["gives"] for op, entry in yaml.safe_load(SHAPELESS.read_text()).items()}


@contextmanager
def noted() -> Iterator[list[Call]]:
    """Inside the block, every call is judged by the constraint table, made, and added to the list.
    (DSA_HAL_CHECK=1 judges too, but also reads data, of which tensors here may have none.)

    Raises Refused.
    """
    calls: list[Call] = []
    ops = torch.ops.npu

    def make(name: str, given: dict[str, Any]) -> Any:
        if (reason := refusal(name, **given)) is not None:
            raise Refused(reason)
        like = shapeless().get(name)
        if like is not None and given[like].is_meta:
            result = torch.empty_like(given[like])
        else:
            result = getattr(ops, name)(**given)
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        calls.append(Call(name, given, results))
        return result

    class Door:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            getattr(ops, name)  # an op that there is not is an AttributeError
            return lambda **given: make(name, given)

    with patch.object(torch.ops, "npu", Door()):
        yield calls
