"""Short questions to the arguments of a call, as functions written for an op's own arguments, like
the methods of a dataclass: a loop over arguments would cost more than the answers are worth.

The facts of a call are what a predicate may know of it, shapes, dtypes and plain arguments, as one
hashable key. Selection remembers its answers under it, so that a called op does not ask every
predicate on every call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

_FACTS: dict[Any, str] = {
    Tensor: "{0}.shape, {0}.dtype",
    Tensor | None: "{0} if {0} is None else ({0}.shape, {0}.dtype)",
    list[Tensor]: "tuple([(t.shape, t.dtype) for t in {0}])",
}


def facts_of(fn: Callable[..., Any]) -> Callable[..., tuple[Hashable, ...]]:
    """A function with the arguments of `fn` that returns the facts of a call."""
    parameters = inspect.signature(fn, eval_str=True).parameters.values()
    return asking(fn, [_FACTS.get(p.annotation, "{0}").format(p.name) for p in parameters])


def asking(fn: Callable[..., Any], questions: Sequence[str]) -> Callable[..., Any]:
    """A function with the arguments of `fn` that returns the tuple of `questions`, expressions of
    those arguments. A mistaken call raises the TypeError that `fn` would raise."""
    arguments: list[str] = []
    names: dict[str, Any] = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        if parameter.default is parameter.empty:
            arguments.append(name)
        else:
            arguments.append(f"{name}=_{name}")
            names[f"_{name}"] = parameter.default
    answers = "".join(f"{question}, " for question in questions)
    exec(f"def {fn.__name__}({', '.join(arguments)}): return ({answers})", names)
    made: Callable[..., Any] = names[fn.__name__]
    return made
